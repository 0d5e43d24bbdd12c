"""Validation while training: the loss under fixed noise, whether the model knows where answers end, and a few answers.

A callback of ``sft.py``. In packed rows the loss says little about stopping: there the next prompt gives the end away. So
the end is also looked for as decoding looks for it, with nothing but masks to the right.

Legend: B rows, L longest canvas, M wanted positions.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dllm_var.decoding.config import GenerationConfig
from dllm_var.diffusion.corruption import uniforms
from dllm_var.diffusion.decoding_view import Bools, Ints
from dllm_var.diffusion.objective import masked_cross_entropy
from dllm_var.generation import generate
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.pretrained import Pretrained
from sft_training.config import ValidationSection
from sft_training.samples import Sample, Samples

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
POSITIONS = (0, 16, 64, 256)  # where the ranges begin by which ends are told apart, in tokens of the answer
ROWS = 16  # canvases of one forward

Metrics = dict[str, float]
Project = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Canvas:
    """What the model sees of a sample [n], which positions are asked [n], and the clean ids [n]."""

    ids: Ints
    wanted: Bools
    clean: Ints


@dataclass(frozen=True)
class Answer:
    """A sample as decoding meets it: its prompt, and its first answer without the stop tokens."""

    prompt: Ints
    tokens: Ints


class Validator(TrainerCallback):
    """Measures every `every` steps and after the last one, on the first process.

    Args:
        section: the settings. samples: held-out data; those too long for the model are left out and counted.
        pretrained: the model in training, its tokenizer and control tokens.
        log: takes the measured values (the trainer's own).
        together: no process holds all weights, so that all of them compute the same measurements, in step.
    """

    def __init__(
        self,
        section: ValidationSection,
        samples: Samples,
        pretrained: Pretrained,
        log: Callable[[Metrics], None],
        together: bool = False,
    ) -> None:
        self.section, self.pretrained, self.log, self.together = section, pretrained, log, together
        context = pretrained.model.config.max_sequence_length - 2 * section.block_length
        self.samples: list[Sample] = []
        left_out = 0
        for sample in map(samples.__getitem__, range(len(samples))):
            fits = len(sample.ids) <= context and bool(sample.response.any())
            left_out += not fits
            if fits:
                self.samples.append(sample)
            if len(self.samples) == section.samples:
                break
        if not self.samples:
            raise ValueError(f"validation.files: no sample has a response and at most {context} tokens.")
        if left_out:
            logging.getLogger(__name__).warning(
                "validation.files: %d of the first %d samples are left out, for more than %d tokens or no response.",
                left_out, left_out + len(self.samples), context,
            )  # fmt: skip

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        due = state.global_step % self.section.every == 0 or state.global_step == state.max_steps
        if due and (self.together or state.is_world_process_zero):
            pending = control.should_log  # logging takes this step's own log line for done
            self.log({f"eval_{name}": value for name, value in self.measure().items()})
            control.should_log = pending

    @torch.no_grad()
    def measure(self) -> Metrics:
        """All measurements, with the model in evaluation mode and uncompiled (its shapes differ from batch to batch)."""
        model = self.pretrained.model
        training = model.training
        model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                return {**self.noisy_loss(), **self.stopping(), **self.decodes()}
        finally:
            model.train(training)

    def noisy_loss(self) -> Metrics:
        """Mean cross-entropy per masked token at each level and over all of them, and the ELBO-weighted loss.

        The noise is the same at every call, stop tokens are always masked. In `elbo` they count only where the noise would
        have masked them anyway.
        """
        special = self.pretrained.special
        metrics: Metrics = {}
        total, number, bound = 0.0, 0, 0.0
        for t in LEVELS:
            canvases, drawn = [], []
            for sample in self.samples:
                below = uniforms(len(sample.ids), self.section.seed, sample.key, "validation") < t
                masked = sample.response & (below | np.isin(sample.ids, special.stop))
                canvases.append(Canvas(np.where(masked, special.mask, sample.ids), masked, sample.ids))
                drawn.append(below[masked])
            losses = np.concatenate(list(self._losses(canvases)))
            by_noise = losses[np.concatenate(drawn)]
            metrics[f"loss_t{t}"] = float(losses.mean()) if len(losses) else 0.0
            total, number = total + float(losses.sum()), number + len(losses)
            bound += float(by_noise.sum()) / t / sum(int(sample.response.sum()) for sample in self.samples) / len(LEVELS)
        return {"loss": total / max(number, 1), "elbo": bound, **metrics}

    def stopping(self) -> Metrics:
        """Is the end seen where it is, and only there, with only masks to the right?

        `eos_recall_d<D>`: the whole answer is visible and D masks follow the place of its end; is a stop token the
        likeliest there? `eos_false_stop`: the answer is cut at a random place and a block of masks follows; is a stop
        token the likeliest at the first of them? `eos_precision` compares the ends at distance block_length with these
        cuts, where block_length - 1 masks follow the place asked about. With `_at_<A>-<B>` the same of only those ends
        and cuts that lie A…B tokens into the answer.
        """
        block = self.section.block_length
        metrics: Metrics = {}
        answers = [answer_of(sample, self.pretrained.special.stop) for sample in self.samples]
        ended = [answer for answer in answers if answer is not None]
        if not ended:
            return {}
        ends, hits = np.array([len(answer.tokens) for answer in ended]), {}
        for distance in sorted({0, block // 2, block, 2 * block}):
            hits[distance] = self._stops([self._probe(answer, len(answer.tokens), distance) for answer in ended])
            metrics[f"eos_recall_d{distance}"] = float(hits[distance].mean())
        cuts, places = [], []
        for sample, answer in zip(self.samples, answers, strict=True):
            if answer is not None and len(answer.tokens):
                where = int(float(uniforms(1, self.section.seed, sample.key, "cut")[0]) * len(answer.tokens))
                cuts.append(self._probe(answer, where, block - 1))
                places.append(where)
        wrong = self._stops(cuts) if cuts else np.zeros(0, bool)
        every = np.stack(list(hits.values()))  # [distances, answers]
        metrics |= {"eos_recall": float(every.mean()), **_stop_rates(hits[block], wrong)}
        for low, high in zip(POSITIONS, (*POSITIONS[1:], np.inf), strict=True):
            at_end, at_cut = (ends >= low) & (ends < high), (np.array(places) >= low) & (np.array(places) < high)
            name = f"at_{low}+" if high == np.inf else f"at_{low}-{high - 1}"
            if at_end.any():
                metrics[f"eos_recall_{name}"] = float(every[:, at_end].mean())
            if at_end.any() and at_cut.any():
                metrics |= {f"{key}_{name}": rate for key, rate in _stop_rates(hits[block][at_end], wrong[at_cut]).items()}
        return metrics

    def decodes(self) -> Metrics:
        """Answers to some prompts: the share that is right to the token, and the mean error of their lengths."""
        answers = (answer_of(sample, self.pretrained.special.stop) for sample in self.samples)
        chosen = list(islice((answer for answer in answers if answer is not None), self.section.decodes))
        if not chosen:
            return {}
        config = GenerationConfig(
            max_gen_length=self.section.max_gen_length,
            block_length=self.section.block_length,
            threshold=self.section.threshold,
        )
        made = generate(self.pretrained, [answer.prompt.tolist() for answer in chosen], config, batch_size=ROWS)
        pairs = list(zip(made, chosen, strict=True))
        return {
            "exact_match": float(np.mean([ours.tokens == theirs.tokens.tolist() for ours, theirs in pairs])),
            "length_error": float(np.mean([abs(len(ours.tokens) - len(theirs.tokens)) for ours, theirs in pairs])),
            "stops_by_eos": float(np.mean([ours.stop_reason == "eos" for ours in made])),
            "tokens_per_forward": sum(ours.decided for ours in made) / sum(ours.forwards for ours in made),
        }

    def _probe(self, answer: Answer, visible: int, masks_after: int) -> Canvas:
        start = len(answer.prompt) + visible
        mask = np.full(1 + masks_after, self.pretrained.special.mask, np.int64)
        ids = np.concatenate([answer.prompt, answer.tokens[:visible], mask])
        return Canvas(ids, np.arange(len(ids)) == start, ids)

    def _losses(self, canvases: Sequence[Canvas]) -> Iterator[Ints]:
        for part in _batches(canvases):
            targets = torch.from_numpy(np.concatenate([canvas.clean[canvas.wanted] for canvas in part]))
            yield self._ask(part, lambda hidden, head, y=targets: masked_cross_entropy(hidden, head, y.to(hidden.device))[1])

    def _stops(self, canvases: Sequence[Canvas]) -> Bools:
        found = [self._ask(part, _likeliest) for part in _batches(canvases)]
        return np.isin(np.concatenate(found), self.pretrained.special.stop)

    def _ask(self, canvases: Sequence[Canvas], project: Project) -> Any:
        """What `project` makes of the wanted positions of some canvases, in order [M]."""
        model: LLaDAModelLM = self.pretrained.model
        longest = max(len(canvas.ids) for canvas in canvases)
        ids = np.full((len(canvases), longest), self.pretrained.special.pad, np.int64)
        real, wanted = np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)
        for row, canvas in enumerate(canvases):
            n = len(canvas.ids)
            ids[row, :n], real[row, :n], wanted[row, :n] = canvas.ids, True, canvas.wanted
        device = next(model.parameters()).device
        tensors = (torch.from_numpy(array).to(device) for array in (ids, real, wanted))
        given, mask, rows = tensors
        return model(input_ids=given, attention_mask=mask, logits_for=rows, project=project).logits.cpu().numpy()


def answer_of(sample: Sample, stop: tuple[int, ...]) -> Answer | None:
    """Prompt and first answer of a sample, up to its first stop token; None when the answer has no end (a cut sample)."""
    prompt = sample.prompt
    response = sample.ids[len(prompt) :][sample.response[len(prompt) :]]
    ends = np.flatnonzero(np.isin(response, stop))
    return Answer(prompt, response[: int(ends[0])]) if len(ends) else None


def _stop_rates(right: Bools, wrong: Bools) -> Metrics:
    """False stops and precision, from what was found at ends (``right``) and inside answers (``wrong``)."""
    hit, false = float(right.mean()), float(wrong.mean()) if len(wrong) else 0.0
    return {"eos_false_stop": false, "eos_precision": hit / (hit + false) if hit + false else 0.0}


def _likeliest(hidden: Tensor, head: Tensor) -> Tensor:
    return (hidden @ head.to(hidden.dtype).T).argmax(-1)


def _batches(canvases: Sequence[Canvas]) -> Iterator[Sequence[Canvas]]:
    for start in range(0, len(canvases), ROWS):
        yield canvases[start : start + ROWS]
