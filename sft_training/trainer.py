"""A `transformers.Trainer` that trains a mask predictor: loss on masked positions, exact resume, token counts.

Called by ``sft.py``. The head runs inside the wrapped model's forward (through `project`), so that DDP and DeepSpeed see
every parameter used. Data position and weights of a checkpoint are written by us, everything else by the library.

Legend: B rows of a micro-batch, L tokens of a row, M masked positions.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from dllm_var.diffusion.objective import masked_cross_entropy, token_weights
from dllm_var.model.llada import LLaDAModelLM
from sft_training.adapters import save_network, seed_dropout
from sft_training.checkpoints import POSITION_FILE, complete, could_not_write, is_full, staging
from sft_training.config import SftConfig
from sft_training.data import Collate, Counts, RowStream
from sft_training.guard import StepGuard
from sft_training.optimizer import build_optimizer
from sft_training.records import trace_rows
from sft_training.sharding import acting, inside, network_of, shards_weights
from sft_training.tally import Tally


class SftTrainer(Trainer):
    """See the module. The model's weights are float32 or bfloat16; autocast is the library's business."""

    def __init__(
        self,
        model: LLaDAModelLM,
        args: TrainingArguments,
        config: SftConfig,
        stream: RowStream,
        collate: Collate,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=stream, data_collator=collate, callbacks=callbacks)
        self.config, self.stream, self.tokenizer, self.network = config, stream, tokenizer, model
        # token_sum_global is normalised over the whole optimizer step, so that accumulation must not divide it again.
        self.loss_is_scaled_for_ga = config.loss.name == "token_sum_global"
        self.rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.parameters = sum(value.numel() for value in model.parameters())  # counted before anything cuts them up
        self.guard = StepGuard(config.training.on_nan)
        self.add_callback(self.guard)
        self._staging: Path | None = None
        process = config.forward_process
        self.tally = Tally(process.t_min, process.t_max, stream.mixture.names, args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW or Muon with AdamW, see ``optimizer.py``."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                self.network if model is None else model,
                self.config.training.optimizer,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
            )
            self.decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What was saved, with the learning rate, decay and betas of this start, which the saved ones would overrule."""
        kind = self.config.training.optimizer
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"training.optimizer={kind!r} cannot take up what {checkpoint} holds ({error}): give the one that the run "
                "began with, or start anew with resume=never."
            ) from error
        if checkpoint is None:
            return
        scheduler, groups = self.lr_scheduler, inside(self.optimizer).param_groups
        scheduler.base_lrs = [self.args.learning_rate] * len(groups)
        for group, decay, schedule in zip(groups, self.decays, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["weight_decay"] = self.args.learning_rate, decay
            group["lr"] = self.args.learning_rate * schedule(scheduler.last_epoch)
            if "betas" in group:
                group["betas"] = (self.args.adam_beta1, self.args.adam_beta2)
        scheduler._last_lr = [group["lr"] for group in groups]

    def _run_epoch(self, **everything: Any) -> None:
        """The library takes a step before it looks whether all are taken: a run may have ended before it wrote its model."""
        self.control.should_training_stop = self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(**everything)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, and (token_sum_global) the masked tokens in all of them on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._before = self._tr_loss.clone(), self.tally.sums.clone()
        if self.config.loss.name != "token_sum_global" or not batches:
            return batches, None
        masked = torch.tensor(float(sum(batch["counts"].masked for batch in batches)), device=device)
        return batches, self.accelerator.reduce(masked, "sum")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        prepared["t"] = inputs["t"].to(self.args.device)  # under DeepSpeed the library would round the levels to bfloat16
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The configured loss of a micro-batch; 0, and connected to every weight, when it has no masked token."""
        counts: Counts = inputs["counts"]
        if self.config.training.trace_rows:
            trace_rows(Path(self.config.output_dir), self.args.process_index, counts)
        if self.config.adapter.dropout and self.config.adapter.kind != "none":
            seed_dropout(self.args.seed, counts.rows)
        masked: Tensor = inputs["masked"]
        targets, t = inputs["clean"][masked], inputs["t"][masked]  # [M]
        weights = token_weights(
            self.config.loss.name, t, masked=counts.masked, responses=counts.response, masked_global=num_items_in_batch
        )
        each: list[Tensor] = []

        def project(hidden: Tensor, head: Tensor) -> Tensor:
            total, losses = masked_cross_entropy(hidden, head, targets, weights, self.config.loss.chunk)
            each.append(losses)
            return total

        outputs = model(
            input_ids=inputs["noisy"],
            attention_mask=inputs["real"],
            positions=inputs["positions"],
            query_mask=inputs["sees"],
            logits_for=masked,
            project=project,
        )
        loss = outputs["logits"]
        if num_items_in_batch is not None:
            loss = loss * self.args.world_size  # gradients are averaged over ranks
        self.tally.add(inputs, each[0])
        self.guard.note(counts, loss)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was seen since the last line, summed over ranks, and the passes over the data."""
        rows = self.state.global_step * self.rows_per_step
        if "train_loss" in logs and self.state.global_step == self._initial_global_step:
            return  # the summary of no step
        if "loss" in logs:
            logs |= self.tally.logs(lambda sums: self.accelerator.reduce(sums, "sum")) | self.stream.metrics(rows)
            self.guard.correct(logs)
            if self.config.loss.name == "next_token":  # nothing is masked, so there is no level
                for name in [name for name in logs if name.startswith("ce/t_")]:
                    del logs[name]
        self.state.epoch = self.stream.progress(rows)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Forward and backward of a micro-batch, attention left out."""
        return 6 * self.parameters * int(inputs["noisy"].numel())

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.guard.refuses(self.accelerator, norm, self.state.global_step + 1, Path(self.config.output_dir)):
            return norm
        model.zero_grad()  # without gradients an optimizer moves neither a weight nor its own state
        self._tr_loss.copy_(self._before[0])
        self.tally.sums.copy_(self._before[1])
        return None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, step = Path(self.config.output_dir), self.state.global_step
        self._staging = staging(run, step)  # where the library takes the run folder to be
        self._together(lambda: self._write_checkpoint(model, trial))
        self._together(lambda: complete(run, step, self.args.save_total_limit) if self.args.should_save else None)
        self._staging = None

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            position = self.stream.state(self.state.global_step * self.rows_per_step)
            (folder / POSITION_FILE).write_text(json.dumps(position), encoding="utf-8")
        super()._save_checkpoint(model, trial)

    def _together(self, save: Callable[[], object]) -> None:
        """A part of saving, done by all processes; when one of them cannot, all stop and nothing half written stays."""
        problem: Exception | None = None
        try:
            save()
        except Exception as error:  # the tokenizer's writer knows no class of its own
            if not (isinstance(error, OSError | RuntimeError | SafetensorError) or is_full(error)):
                raise
            problem = error
        alone = problem is not None and acting(self) not in ("none", "ddp")  # the others wait for it inside the library
        if alone or self.accelerator.reduce(torch.tensor(float(problem is not None), device=self.args.device)).item():
            assert self._staging is not None
            if self.args.should_save or alone:
                shutil.rmtree(self._staging, ignore_errors=True)
            what = f"checkpoint-{self.state.global_step}"
            reason = problem or "another process could not"
            raise could_not_write(what, self._staging.parent, reason, self._bytes()) from problem

    def _bytes(self) -> int:
        """Bytes of weights and optimizer in a checkpoint, as far as this process holds them."""
        state = tree_leaves(self.optimizer.state_dict())
        tensors = [*self.network.parameters(), *(leaf for leaf in state if isinstance(leaf, Tensor))]
        return sum(tensor.nbytes for tensor in tensors)

    def whole_network(self) -> LLaDAModelLM:
        """The network with all weights, for the first process to save. Where they are sharded all processes must call."""
        if not shards_weights(acting(self)):
            return self.network
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        return network_of(self.network, weights) if self.is_world_process_zero() else self.network

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = output_dir if output_dir is not None else self.config.output_dir
            sharded = state_dict is not None and shards_weights(acting(self))
            save_network(network_of(self.network, state_dict) if sharded else self.network, folder)
            self.tokenizer.save_pretrained(folder)
