"""Opening a tokenizer folder: local files only, never remote code, never a question on the terminal.

Called wherever a tokenizer is needed: `dllm_var.load_pretrained`, the SFT entry point and the scripts in ``dataset/``.
"""

from importlib.resources import files
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

BUNDLED_NAME = "tiny"


def tokenizer_folder(name_or_folder: str | Path) -> Path:
    """The folder meant by a user: the bundled model's for the word 'tiny', else the folder itself.

    Raises:
        ValueError: it is no folder, or a folder without tokenizer.json.
    """
    bundled = str(name_or_folder) == BUNDLED_NAME
    folder = Path(str(files("dllm_var") / "bundled" / BUNDLED_NAME)) if bundled else Path(name_or_folder)
    if not folder.is_dir():
        raise ValueError(
            f"tokenizer {str(name_or_folder)!r} is not a folder: give one that holds tokenizer.json, "
            f"or the word {BUNDLED_NAME!r} for the bundled tokenizer."
        )
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"folder {str(folder)!r} holds no tokenizer.json, so it has no tokenizer that can be used here.")
    return folder


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder (or 'tiny').

    Raises:
        ValueError: no such folder, no tokenizer.json in it, or files that do not make a tokenizer.
    """
    folder = tokenizer_folder(name_or_folder)
    try:
        # An empty model config is handed over so that the folder's own is not read: it may name remote code.
        loaded = AutoTokenizer.from_pretrained(
            str(folder), config=PreTrainedConfig(), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the library raises bare Exception for a broken tokenizer.json
        raise ValueError(f"the tokenizer in {str(folder)!r} cannot be read: {error}") from error
    if not isinstance(loaded, PreTrainedTokenizerBase) or not loaded.is_fast:
        raise ValueError(f"the tokenizer in {str(folder)!r} is not one that tokenizer.json describes in full.")
    return loaded
