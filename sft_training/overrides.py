"""From composed YAML and command-line overrides to typed settings; an unknown key is an error that lists the known ones.

Called by ``sft.py`` and ``dataset/inspect_rows.py``, and with a schema of its own by ``evaluation/settings.py``. Hydra alone
accepts ``+training.foo=1`` without a word, and its message for a mistyped key names no other.
"""

import difflib
import os
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft_training.config import SftConfig, check

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GROUPS = frozenset(path.name for path in CONFIGS.glob("*") if path.is_dir())
Schema = TypeVar("Schema")


def compose_settings(overrides: list[str]) -> SftConfig:
    """The settings of ``configs/sft.yaml`` with these overrides, for programs that are not Hydra applications.

    Raises:
        ValueError: as `check_overrides` and `typed` say, or a group without the option that was asked for.
    """
    return typed(compose_file("sft", check_overrides(overrides)))


def compose_file(name: str, overrides: list[str]) -> DictConfig:
    """``configs/<name>.yaml`` with these overrides.

    Raises:
        ValueError: Hydra refuses them, for instance a group without the option that was asked for.
    """
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose(name, overrides)
    except HydraException as error:
        raise ValueError(" ".join(str(error).split("Config search path")[0].split())) from error


def typed(config: DictConfig) -> SftConfig:
    """The composed configuration as typed sections, every rule checked.

    Raises:
        ValueError: an unknown key (with the list of valid ones), a value of the wrong type, or settings that contradict.
    """
    built = fill(config, SftConfig)
    check(built)
    return built


def check_folder(option: str, folder: Path) -> None:
    """Whether a folder is there, or could be made, to write into; nothing is made.

    Raises:
        ValueError: naming the option.
    """
    if folder == Path():
        raise ValueError(f"{option} is empty, or the folder that you are in: name one of its own.")
    if str(folder).startswith("~"):
        raise ValueError(f"{option}={folder}: no shell has replaced the ~ there: write $HOME{str(folder)[1:]}.")
    try:
        near = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    except OSError as error:
        raise ValueError(f"{option}={folder} cannot be a folder ({error.strerror}): give another one.") from error
    if not near.is_dir():
        raise ValueError(f"{option}={folder}: {near} is a file: give a folder.")
    if not os.access(near, os.W_OK | os.X_OK):
        raise ValueError(f"{option}={folder}: you may not write to {near}: give another folder.")


def fill(config: DictConfig, schema: type[Schema]) -> Schema:
    """The composed configuration as an object of a dataclass.

    Raises:
        ValueError: an unknown key (with the list of valid ones), or a value of the wrong type.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    _refuse_unknown(plain, schema, "")
    try:
        built = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except OmegaConfBaseException as error:
        raise ValueError(f"{getattr(error, 'full_key', None) or 'config'}: {str(error).splitlines()[0]}") from error
    assert isinstance(built, schema)
    return built


def check_overrides(arguments: Sequence[str], schema: type = SftConfig, groups: Collection[str] = GROUPS) -> list[str]:
    """Look at command-line overrides before Hydra does, because its message for a mistyped key lists nothing.

    Args:
        arguments: the command line. groups: names that choose a file of a group.
        schema: the dataclass with the valid keys; those of a ``dict`` in it are its reader's business.

    Returns:
        The same command line, with quotes where a word is wanted and Hydra would not read one.

    Raises:
        ValueError: a value that cannot be read, or a key that no section has, with the valid ones.
    """
    words = [_keep_word(argument, schema) for argument in arguments]
    for word in words:
        if word.startswith("-") or not ("=" in word or word.startswith("~")):
            continue
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            reason = " ".join(str(error).split("See https")[0].split())
            raise ValueError(
                f"{word} cannot be read ({reason}). A value with signs like = or ( needs quotes in quotes: KEY=\"'VALUE'\"."
            ) from error
        key = override.key_or_group
        chosen_group = key in groups and not isinstance(override.value(), dict)
        if key.split(".")[0] == "hydra" or "/" in key or chosen_group:
            continue
        node: Any = schema
        for depth, part in enumerate(key.split(".")):
            if dict in (get_origin(node), *map(get_origin, get_args(node))):
                break
            if not is_dataclass(node) or part not in get_type_hints(node):
                raise _unknown(key, node, ".".join(key.split(".")[:depth]), part)
            node = get_type_hints(node)[part]
    return words


def _keep_word(argument: str, schema: type) -> str:
    """An override with quotes where a word is wanted and Hydra would read a number (1e5), several words (a,b), or nothing at
    all (a=b.jsonl)."""
    key, sign, value = argument.partition("=")
    node: Any = schema
    for part in key.lstrip("+").split("."):
        node = get_type_hints(node).get(part) if is_dataclass(node) else None
    if not sign or node not in (str, str | None, Any):
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
        quoted = override.is_sweep_override() or isinstance(override.value(), bool | int | float)
    except HydraException:
        quoted = True
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'" if quoted else argument


def _refuse_unknown(values: dict[Any, Any], section: Any, path: str) -> None:
    hints = get_type_hints(section)
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise _unknown(full, section, path, str(key))
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                valid = ", ".join(f.name for f in fields(hints[key]))
                raise ValueError(f"config key {full}={value!r} is a section: set one of its keys ({valid}).")
            _refuse_unknown(value, hints[key], full)
        elif isinstance(value, list) and is_dataclass(item := (get_args(hints[key]) or (None,))[0]):
            for number, entry in enumerate(value):
                if not isinstance(entry, dict):
                    raise ValueError(f"config key {full}[{number}]={entry!r}: give {{name: …}} and so on.")
                _refuse_unknown(entry, item, f"{full}[{number}]")


def _unknown(key: str, section: Any, path: str, part: str) -> ValueError:
    where = f"{path}." if path else ""
    if not is_dataclass(section):
        return ValueError(f"config key {key} does not exist: {path} holds a value, not a section.")
    valid = [f.name for f in fields(section)]
    near = difflib.get_close_matches(part, valid, n=1)
    hint = f" Did you mean {where}{near[0]}?" if near else ""
    return ValueError(f"config key {key} does not exist.{hint} Valid keys of {path or 'the config'}: {', '.join(valid)}.")
