"""A task of the harness with documents from anywhere and the same prompts at every call.

Built by `evaluation.tasks.build`.
"""

from typing import Any

from datasets import DatasetDict
from lm_eval.api.task import ConfigurableTask


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

    def build_all_requests(self, **options: Any) -> None:
        """The requests of all documents, with the same examples at every call.

        The harness draws examples from one random stream. It sees a single process: what several of them share are the
        requests (`evaluation.team`).
        """
        self.set_fewshot_seed(self._seed)
        super().build_all_requests(**options)
