"""A task of the harness with documents from anywhere and prompts that no number of processes changes.

Built by `evaluation.tasks.build`.
"""

from typing import Any

from datasets import DatasetDict
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask


class OneStream(ContextSampler):
    """Draws the examples of every document as a single process would that asks all of them.

    The harness draws from one random stream in each process, so the examples of a document would hang on the number of
    processes. Here each process also makes, and throws away, the draws for the documents of the others.
    """

    ahead = between = 0  # draws to throw away before the next document, and before each one after it

    def share(self, rank: int, processes: int) -> None:
        """Begin with document ``rank``; the next one is ``processes`` further."""
        self.ahead, self.between = rank, processes - 1

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **kwargs: Any) -> Any:
        """``n`` examples, ``eval_doc`` not among them."""
        for _ in range(self.ahead):
            super().sample(n, eval_doc, df)
        self.ahead = self.between
        return super().sample(n, eval_doc, df)


class ProtocolTask(ConfigurableTask):
    """A task as its yaml has it, over given documents or those that the hub has.

    Args:
        config: what the yaml says.
        documents: the splits that it names; None: load ``dataset_path`` from the hub.
        seed: of the examples.
        instead: for the error message, what a user without the hub can do.

    Raises:
        ValueError: the hub does not give the data.
    """

    def __init__(self, config: dict[str, Any], documents: DatasetDict | None, seed: int, instead: str) -> None:
        self._documents, self._seed, self._instead = documents, seed, instead
        super().__init__(config=config)
        if self.fewshot_cfg.sampler == "default":
            self.sampler = OneStream(self.sampler.df)
        self.set_fewshot_seed(seed)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The documents, without the network if they were given."""
        if self._documents is not None:
            self.dataset = self._documents
            return
        try:
            super().download(dataset_kwargs, **kwargs)
        except Exception as error:  # network, access rights, no such data set: the library raises a dozen kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"the data set {self.DATASET_PATH} could not be had from the hub ({reason.rstrip('.')}). {self._instead}"
            ) from error

    def build_all_requests(self, *, rank: int = 0, world_size: int = 1, **options: Any) -> None:
        """The requests of this process; the same text for a document however many processes there are."""
        self.set_fewshot_seed(self._seed)
        if isinstance(self.sampler, OneStream):
            self.sampler.share(rank, world_size)
        super().build_all_requests(rank=rank, world_size=world_size, **options)
