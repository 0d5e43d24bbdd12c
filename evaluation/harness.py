"""Our models behind lm-evaluation-harness's interface: its requests become token ids, batches and stored records.

Built by ``eval.py``. The first process runs the harness; `DiffusionLM` shares the requests out to all processes of a `Team`,
whose `Worker`s decode or rate them. So scores, prompts and draws do not depend on how many there are.

* A rendered chat stays ids: the harness carries it as text (`RenderedChat`), but what a person or a model wrote in it was
  never parsed for control tokens.
* The draws of a request are keyed by task, problem and repetition; batch, order and process change nothing.
* Length and sampling come from the settings. Of a task's generation_kwargs are read ``until`` (each request's own),
  ``must_stop`` (an answer that the model did not end itself is made unlike any other) and ``max_gen_toks``: an answer never
  has more tokens. Where the canvas grows it then ends there; elsewhere the canvas is as configured and the answer is cut.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

import dllm_var
from dllm_var import GenerationConfig, Pretrained
from dllm_var.diffusion.likelihood import is_greedy, log_likelihood
from dllm_var.text.chat import CHAT_TEMPLATE, decode_text, encode_text, render_prompt
from evaluation.settings import How
from evaluation.store import Answer, Rating, Record, ResponseStore, key_of, read_records
from evaluation.team import Team

UNFINISHED = "\ufffd"  # no right answer contains it
READ = ("until", "must_stop", "max_gen_toks")


class RenderedChat(str):
    """A conversation as the harness carries it: the text of a prompt that it logs and hashes, and the ids that are meant."""

    ids: list[int]


@dataclass(frozen=True)
class Question:
    """A prompt to answer. until: what ends the text. limit: the most tokens; None: the settings' own limit."""

    key: str
    task: str
    doc_id: int
    request: int
    ids: list[int]
    until: tuple[str, ...]
    limit: int | None


@dataclass(frozen=True)
class Pair:
    """A prompt and a given answer to rate. choice: its number among the problem's answers."""

    key: str
    task: str
    doc_id: int
    request: int
    ids: list[int]
    choice: int
    answer: list[int]


Job = Question | Pair


class Worker:
    """Answers and rates in one process, and stores each record as soon as there is one."""

    def __init__(self, model: Pretrained, how: How, store: ResponseStore) -> None:
        self._model, self._how, self._store = model, how, store
        self._warm = False

    def run(self, batches: Sequence[Sequence[Job]], progress: str | None = None) -> list[tuple[str, Record]]:
        """The records of all jobs by key. progress: what to call a bar; None: no bar."""
        made = []
        total = sum(map(len, batches))
        with tqdm(total=total, desc=progress, unit="request", disable=progress is None, smoothing=0) as bar:
            for batch in batches:
                self._warm_up(batch[0].ids)
                for job, record in zip(batch, self._records(batch), strict=True):
                    self._store.add(job.key, record)
                    made.append((job.key, record))
                bar.update(len(batch))
        return made

    def _warm_up(self, ids: list[int]) -> None:
        """One token, so that what a device does once is in no measured time."""
        if not self._warm:
            dllm_var.generate(self._model, [ids], GenerationConfig(max_gen_length=1, block_length=1))
            self._warm = True

    def _records(self, batch: Sequence[Job]) -> Sequence[Record]:
        questions = [job for job in batch if isinstance(job, Question)]
        return self._answers(questions) if questions else self._ratings([job for job in batch if isinstance(job, Pair)])

    def _answers(self, batch: Sequence[Question]) -> list[Answer]:
        limit, decoding = batch[0].limit, self._how.decoding
        if limit is not None and decoding.canvas == "growing":
            decoding = replace(decoding, max_gen_length=min(limit, decoding.max_gen_length))
        started = time.perf_counter()
        found = dllm_var.generate(self._model, [q.ids for q in batch], decoding, requests=[q.request for q in batch])
        latency = time.perf_counter() - started
        answers = []
        for question, answer in zip(batch, found, strict=True):
            cut = limit is not None and len(answer.tokens) > limit
            tokens = answer.tokens[:limit]
            answers.append(
                Answer(
                    task=question.task, doc_id=question.doc_id, request=question.request, prompt_length=len(question.ids),
                    text=until_stop(decode_text(self._model.tokenizer, tokens), question.until), tokens=tokens,
                    raw_length=len(answer.raw), stop_reason="length" if cut else answer.stop_reason,
                    forwards=answer.forwards, positions=answer.positions, decided=len(tokens) if cut else answer.decided,
                    seconds=latency / len(batch), latency=latency,
                )
            )  # fmt: skip
        return answers

    def _ratings(self, batch: Sequence[Pair]) -> list[Rating]:
        network, special, how = self._model.model, self._model.special, self._how
        pairs = [(pair.ids, pair.answer) for pair in batch]
        rows = {"batch_size": how.batch_size, "cfg_scale": how.decoding.cfg_scale}
        started = time.perf_counter()
        found = log_likelihood(
            network, special.mask, pairs, samples=how.samples, sampling=how.sampling, seed=how.seed,
            requests=[pair.request for pair in batch], **rows,
        )  # fmt: skip
        greedy = is_greedy(network, special.mask, pairs, known=special.known, **rows)
        seconds = (time.perf_counter() - started) / len(batch)
        return [
            Rating(
                task=pair.task, doc_id=pair.doc_id, request=pair.request, choice=pair.choice, prompt_length=len(pair.ids),
                length=len(pair.answer), value=bound.value, standard_error=bound.standard_error, samples=bound.samples,
                greedy=own, seconds=seconds,
            )
            for pair, bound, own in zip(batch, found, greedy, strict=True)
        ]  # fmt: skip


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of these strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def request_number(task: str, doc_id: int, repeat: int) -> int:
    """The key of a request's draws, the same in every run."""
    return int.from_bytes(hashlib.sha256(f"{task}\n{doc_id}\n{repeat}".encode()).digest()[:6], "big")


class DiffusionLM(LM):
    """The model as the harness sees it, in the first process; a single rank to the harness, whatever the team's size.

    Attributes:
        records: of every request so far. reused: how many of them an earlier run had stored. unread: what tasks ask for in
            generation_kwargs that is not read, by name.
    """

    def __init__(self, model: Pretrained, how: How, team: Team, store: ResponseStore, settings: Mapping[str, Any]) -> None:
        """store: of this process. settings: everything beside prompt and stop strings that an answer depends on."""
        super().__init__()
        self._model, self._how, self._team = model, how, team
        self._settings = key_of(settings, asdict(how.decoding))
        self._worker = Worker(model, how, store)
        self._stored = read_records(store.folder)
        self.records: dict[str, Record] = {}
        self.unread: dict[str, Any] = {}
        self.reused = 0

    @property
    def tokenizer_name(self) -> str:
        return "dllm_var"

    def chat_template(self, chat_template: bool | str = False) -> str:
        return CHAT_TEMPLATE

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text that knows its ids; without a generation prompt the last message stays open."""
        ids = render_prompt(self._model.tokenizer, chat_history, continue_final_message=not add_generation_prompt)
        chat = RenderedChat(self._model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        chat.ids = ids
        return chat

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, each cut at its request's own stop strings."""
        questions = [self._question(request, repeat) for request, repeat in _with_repeats(requests)]
        records = self._run(questions, lambda question: (question.limit or 0, len(question.ids)))
        texts = []
        for request, record in zip(requests, records, strict=True):
            assert isinstance(record, Answer)
            unfinished = request.args[1].get("must_stop") and record.stop_reason != "eos"
            texts.append(record.text + UNFINISHED * bool(unfinished))
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The Monte-Carlo bound for each answer, and whether the model itself would give it."""
        pairs = [self._pair(request, repeat) for request, repeat in _with_repeats(requests)]
        records = self._run(pairs, lambda pair: len(pair.ids) + len(pair.answer))
        return [(record.value, record.greedy) for record in map(_rating, records)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise ValueError(
            f"task {requests[0].task_name} asks for the perplexity of whole texts, of which a masked diffusion model has no "
            "exact value: choose a task that generates, or one that ranks answers."
        )

    def _question(self, request: Instance, repeat: int) -> Question:
        context, options = request.args
        self.unread |= {name: value for name, value in options.items() if name not in READ}
        until = options.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        if "" in until:
            raise ValueError(f"task {request.task_name} has an empty stop string, so every answer would be empty.")
        limit = options.get("max_gen_toks")
        limit = None if limit is None or limit >= self._how.decoding.response_limit else int(limit)
        ids = context.ids if isinstance(context, RenderedChat) else encode_text(self._model.tokenizer, context)
        number = request_number(request.task_name, request.doc_id, repeat)
        key = key_of(self._settings, "answer", number, ids, until, limit)
        return Question(key, request.task_name, request.doc_id, number, ids, until, limit)

    def _pair(self, request: Instance, repeat: int) -> Pair:
        context, answer = request.args
        if isinstance(context, RenderedChat):
            ids = context.ids
        else:  # a space at the border belongs to the word behind it, or it would be a token of its own
            bare = context.rstrip()
            ids, answer = encode_text(self._model.tokenizer, bare), context[len(bare) :] + answer
        scored = encode_text(self._model.tokenizer, answer)
        if not scored:
            raise ValueError(f"problem {request.doc_id} of task {request.task_name} has an empty answer to rate.")
        number = request_number(request.task_name, request.doc_id, repeat)  # shared by all answers to a problem
        key = key_of(self._settings, "rating", number, ids, scored, self._how.samples, self._how.sampling, self._how.seed)
        return Pair(key, request.task_name, request.doc_id, number, ids, request.idx, scored)

    def _run(self, jobs: Sequence[Any], length: Callable[[Any], Any]) -> list[Record]:
        """The record of each job: a stored one, or one that the team makes now, the longest first."""
        missing = {job.key: job for job in jobs if job.key not in self._stored}
        self.reused += len({job.key for job in jobs} & self._stored.keys())
        batches = _batches(sorted(missing.values(), key=length, reverse=True), self._how.batch_size)
        shares = [batches[rank :: self._team.size] for rank in range(self._team.size)]
        if missing:
            name = "requests" if self._team.size == 1 else f"requests of process 1 of {self._team.size}"
            own = self._worker.run(self._team.hand_out(shares), progress=name)
            made = [each for share in self._team.bring_together(own) for each in share]
            assert sorted(key for key, _ in made) == sorted(missing)  # everything once
            self._stored.update(made)
        self.records |= {job.key: self._stored[job.key] for job in jobs}
        return [self.records[job.key] for job in jobs]


def _batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Jobs in order, those of one batch of one limit."""
    made = []
    for _, group in groupby(jobs, key=lambda job: job.limit if isinstance(job, Question) else None):
        alike = list(group)
        made += [alike[start : start + size] for start in range(0, len(alike), size)]
    return made


def _rating(record: Record) -> Rating:
    assert isinstance(record, Rating)
    return record


def _with_repeats(requests: Sequence[Instance]) -> list[tuple[Instance, int]]:
    """Each request with how many times the same one came before."""
    seen: Counter[int] = Counter()
    numbered = []
    for request in requests:
        numbered.append((request, seen[id(request)]))
        seen[id(request)] += 1
    return numbered
