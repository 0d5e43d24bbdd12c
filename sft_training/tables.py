"""Samples in tables: Parquet files, and datasets of the Hugging Face hub or of a local folder, through `datasets`.

Called by ``build.py``. A table has the columns of tokenised samples (``input_ids`` with ``prompt_length`` or ``loss_runs``)
or of text (``instruction``, ``input``, ``output``), and may have ``id``; other columns are not read. `datasets` keeps a copy
in its cache folder (HF_DATASETS_CACHE) from which any row can be read without holding the others in memory: a Parquet file
itself gives nothing less than a row group, and the order of training is a shuffle of all rows.
"""

import glob
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError

from dllm_var.text.instructions import FIELDS
from sft_training.samples import Sample, SampleRules

TOKENS = ("input_ids", "prompt_length", "loss_runs")
# What `datasets` raises for files, folders and names that are not what they should be; ArrowInvalid is a ValueError.
UNUSABLE = (OSError, ValueError, TypeError, LookupError, NotImplementedError, pa.ArrowException, DatasetsError)


class TableSamples:
    """The rows of a table, numbered.

    Args:
        table: with the known columns only.
        parts: name, size and rows of what it was made of, in order.
        rules: what makes a sample of a row.
    """

    def __init__(self, table: datasets.Dataset, parts: Sequence[tuple[str, int, int]], rules: SampleRules) -> None:
        self.table, self.parts, self.rules = table, list(parts), rules
        self.text = "input_ids" not in table.column_names
        self._first = [0, *accumulate(rows for _, _, rows in parts)]
        self._rules = rules.fingerprint(text=self.text)

    def __len__(self) -> int:
        return len(self.table)

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and rows of every part."""
        return [[Path(name).name, size, rows] for name, size, rows in self.parts] + self._rules

    def __getitem__(self, index: int) -> Sample:
        part = bisect_right(self._first, index) - 1
        name, row = self.parts[part][0], index - self._first[part] + 1
        try:
            sample = self.rules.sample(self.table[index], f"{Path(name).stem}:{row}", text=self.text)
        except UNUSABLE as error:
            kind = "an instruction record" if self.text else "a tokenised sample"
            raise ValueError(f"{name}, row {row} is not {kind}: {str(error).rstrip('.')}.") from error
        return sample if len(self.parts) == 1 else replace(sample, key=f"{part}/{sample.key}")


def open_parquet(files: Sequence[Path], rules: SampleRules) -> TableSamples:
    """The rows of some Parquet files.

    Raises:
        ValueError: a file that cannot be read, has no row, lacks a column or has one of another type, naming it.
    """
    parts, schemas = [], []
    for path in files:
        try:
            size, head = path.stat().st_size, pq.ParquetFile(path)
            parts.append((str(path), size, head.metadata.num_rows))
            schemas.append(head.schema_arrow)
        except UNUSABLE as error:
            raise ValueError(f"{path} cannot be read as a Parquet file: {_first_line(error)}.") from error
        if parts[-1][2] == 0:
            raise ValueError(f"{path} is empty: it holds no sample.")
    columns = known_columns(schemas[0], str(files[0]), rules)
    for path, schema in zip(files, schemas, strict=True):
        ours = known_columns(schema, str(path), rules)
        if ours != columns:
            raise ValueError(f"{files[0]} has the columns {columns}, {path} has {ours}: make two sources of them.")
    try:
        names = [glob.escape(str(path)) for path in files]
        table = datasets.load_dataset("parquet", data_files=names, split="train", columns=columns)
    except UNUSABLE as error:
        cause = error.__cause__ or error
        raise ValueError(f"{files[0]} (of {len(names)} Parquet files) cannot be read: {_first_line(cause)}.") from error
    return TableSamples(table, parts, rules)


def open_hub(option: str, name: str, split: str, rules: SampleRules) -> TableSamples:
    """A dataset of the hub, or of a folder: one that `datasets` saved, or one with Parquet or JSON Lines files.

    Raises:
        ValueError: it is not there (or, offline, not in the cache), lacks the split or a column, or is empty.
    """
    try:
        if Path(name).is_dir() and any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise ValueError(f"it has the splits {', '.join(loaded)}")
                loaded = loaded[split]
            elif str(loaded.split or "train") != split:
                raise ValueError(f"it is the split {loaded.split or 'train'!s}")
        else:
            loaded = datasets.load_dataset(name, split=split)
    except UNUSABLE as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = "it is empty" if isinstance(error, IndexError) else _first_line(cause or error)  # of what has no row at all
        raise ValueError(
            f"{option}={name!r}, split {split!r} cannot be loaded: {reason}. Give a dataset of the hub (online, or already "
            "in the cache), or the folder of one that was saved."
        ) from error
    place = f"{option}={name!r}, split {split!r}"
    if len(loaded) == 0:
        raise ValueError(f"{place} is empty: it holds no sample.")
    table = loaded.select_columns(known_columns(loaded.features.arrow_schema, place, rules))
    return TableSamples(table, [(f"{name}[{split}]", _extent(table), len(table))], rules)


def _extent(table: datasets.Dataset) -> int:
    """Tokens of a table of tokens, bytes of the answers of a table of text: how much it holds, however it is stored."""
    if "input_ids" in table.column_names:
        return pc.sum(pc.list_value_length(table.data.column("input_ids"))).as_py()
    return pc.sum(pc.binary_length(table.data.column("output"))).as_py()


def known_columns(schema: pa.Schema, place: str, rules: SampleRules) -> list[str]:
    """The columns that are read, in a fixed order.

    Raises:
        ValueError: those of a sample are not complete, or one has the wrong type.
    """
    if "input_ids" in schema.names:
        wanted = ("id", *TOKENS)
        if not {"prompt_length", "loss_runs"} & set(schema.names):
            raise ValueError(f"{place} lacks the column prompt_length (or loss_runs); it has {', '.join(schema.names)}.")
    elif "output" in schema.names:
        wanted = ("id", *FIELDS)
        rules.need_tokenizer(place)
    else:
        raise ValueError(
            f"{place} has the columns {', '.join(schema.names) or '(none)'}: needed are input_ids and prompt_length (for "
            "tokens), or instruction, input and output (for text)."
        )
    found = [name for name in wanted if name in schema.names]
    for name in found:
        words, fits = _wanted_type(name)
        kind = schema.field(name).type
        if not fits(kind) and not (pa.types.is_null(kind) and name not in ("input_ids", "output")):
            raise ValueError(f"{place}: the column {name} holds {kind}, it must hold {words}.")
    return found


def _wanted_type(name: str) -> tuple[str, Any]:
    if name == "input_ids":
        return "lists of whole numbers", lambda kind: _is_list(kind) and pa.types.is_integer(kind.value_type)
    if name == "loss_runs":
        return (
            "lists of pairs of whole numbers",
            lambda kind: _is_list(kind) and _is_list(kind.value_type) and pa.types.is_integer(kind.value_type.value_type),
        )
    if name == "prompt_length":
        return "whole numbers", pa.types.is_integer
    if name == "id":
        return "text or whole numbers", lambda kind: _is_text(kind) or pa.types.is_integer(kind)
    return "text", _is_text


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
