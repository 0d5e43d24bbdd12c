"""A `transformers.Trainer` that trains a mask predictor: loss on masked positions, exact resume, token counts.

Called by ``sft.py``. The head runs inside the wrapped model's forward (through `project`), so that DDP and DeepSpeed see
every parameter used. Data position and weights of a checkpoint are written by us, everything else by the library.

Legend: B rows of a micro-batch, L tokens of a row, M masked positions.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from dllm_var.diffusion.objective import masked_cross_entropy, token_weights
from dllm_var.model.checkpoint import save_model
from dllm_var.model.llada import LLaDAModelLM
from sft_training.config import SftConfig
from sft_training.data import Collate, Counts, RowStream
from sft_training.optimizer import build_optimizer
from sft_training.records import trace_rows

POSITION_FILE = "data_position.json"
LEVELS = 4  # the loss is also logged for this many equal ranges of the mask level
COUNTED = ("prompt", "response", "masked", "eos")


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
        self._parameters = sum(value.numel() for value in model.parameters())
        # What was seen since the last log line: counted tokens, then sum and number of cross-entropies by mask level.
        self._seen = torch.zeros(len(COUNTED) + 2 * LEVELS, dtype=torch.float64, device=args.device)
        low, high = config.forward_process.t_min, config.forward_process.t_max
        self._edges = torch.linspace(low, high, LEVELS + 1, device=args.device)

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
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, and (token_sum_global) the masked tokens in all of them on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.config.loss.name != "token_sum_global" or not batches:
            return batches, None
        masked = torch.tensor(float(sum(batch["counts"].masked for batch in batches)), device=device)
        return batches, self.accelerator.reduce(masked, "sum")

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
            query_mask=inputs["sees"],
            logits_for=masked,
            project=project,
        )
        loss = outputs["logits"]
        if num_items_in_batch is not None:
            loss = loss * self.args.world_size  # gradients are averaged over ranks
        self._count(counts, t, each[0])
        return (loss, outputs) if return_outputs else loss

    def _count(self, counts: Counts, t: Tensor, losses: Tensor) -> None:
        level = torch.bucketize(t, self._edges[1:-1], right=True)
        self._seen[: len(COUNTED)] += torch.tensor([getattr(counts, name) for name in COUNTED], device=self._seen.device)
        sums = torch.zeros(LEVELS, device=t.device).index_add_(0, level, losses)
        self._seen[len(COUNTED) :] += torch.cat([sums, torch.bincount(level, minlength=LEVELS)])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was seen since the last line, summed over ranks, and the passes over the data."""
        if "loss" in logs:
            seen = self.accelerator.reduce(self._seen, "sum").tolist()
            self._seen.zero_()
            logs |= {f"tokens/{name}": seen[i] for i, name in enumerate(COUNTED)}
            for i in range(LEVELS):
                total, number = seen[len(COUNTED) + i], seen[len(COUNTED) + LEVELS + i]
                if number:
                    logs[f"ce/t_{self._edges[i]:.2f}-{self._edges[i + 1]:.2f}"] = total / number
            logs["data/dropped_samples"] = self.stream.dropped
        self.state.epoch = self.stream.progress(self.state.global_step * self.rows_per_step)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Forward and backward of a micro-batch, attention left out."""
        return 6 * self._parameters * int(inputs["noisy"].numel())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self.config.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            position = self.stream.state(self.state.global_step * self.rows_per_step)
            (folder / POSITION_FILE).write_text(json.dumps(position), encoding="utf-8")
        super()._save_checkpoint(model, trial)  # writes trainer_state.json last: without it a checkpoint does not count

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = output_dir if output_dir is not None else self.config.output_dir
            save_model(self.network, folder)
            self.tokenizer.save_pretrained(folder)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The latest complete checkpoint of a run, None when there is none."""
    found = [path for path in output_dir.glob("checkpoint-*") if is_checkpoint(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds all that a run needs to go on."""
    number = folder.name.rpartition("-")[2]
    return number.isdigit() and all((folder / name).is_file() for name in (POSITION_FILE, "trainer_state.json"))


def resume_stream(stream: RowStream, checkpoint: Path) -> None:
    """Put the data where the checkpoint left it.

    Raises:
        ValueError: other data or other settings of the rows than then, or another number of rows in a step.
    """
    stream.restore(json.loads((checkpoint / POSITION_FILE).read_text(encoding="utf-8")))
    steps = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    if stream.first_row != steps * stream.rows_per_step:
        raise ValueError(
            f"{checkpoint} took {stream.first_row} rows for {steps} steps, this run takes {stream.rows_per_step} a step: "
            "keep training.local_batch_size * training.grad_accum_steps * processes as it was, or start anew with "
            "resume=never."
        )
