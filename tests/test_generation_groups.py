"""The Hydra groups ``configs/generation`` and ``configs/cache``: what each file says is what Python does by default."""

import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from dllm_var import GenerationConfig
from dllm_var.decoding.methods import CACHES, METHODS, SAMPLING

CONFIGS = Path(__file__).parents[1] / "configs"


def _compose(*overrides: str) -> Any:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(overrides=[override if "." in override else f"+{override}" for override in overrides])


def _config(*overrides: str) -> GenerationConfig:
    groups = _compose(*overrides)
    return GenerationConfig.from_groups(groups.generation, groups.get("cache"))


def test_there_is_a_file_for_every_method_and_every_cache() -> None:
    assert {file.stem for file in (CONFIGS / "generation").glob("*")} == set(METHODS)
    assert {file.stem for file in (CONFIGS / "cache").glob("*")} == set(CACHES)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_s_file_is_its_defaults(method: str) -> None:
    assert _config(f"generation={method}") == GenerationConfig(method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_s_file_holds_every_option_that_it_reads_and_no_other(method: str) -> None:
    values = dict(_compose(f"generation={method}").generation)
    expected = {"method": method, **METHODS[method].options, **SAMPLING}
    if method == "dllm_var":
        expected["threshold"] = None  # 0.9 gives way to another rule, so it cannot stand there
    assert values == expected
    assert {name: type(value) for name, value in values.items()} == {n: type(value) for n, value in expected.items()}


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_s_file_holds_every_option_that_it_reads_and_no_other(cache: str) -> None:
    values = dict(_compose("generation=vanilla", f"cache={cache}").cache)
    assert values == {"name": cache, **{name.removeprefix("cache_"): v for name, v in CACHES[cache].options.items()}}


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("generation/*")) + sorted(CONFIGS.glob("cache/*")), ids=lambda f: f.stem
)
def test_every_file_and_every_option_in_it_is_explained(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert max(map(len, lines)) <= 125
    options = [line for line in lines if not line.startswith("# ")]
    assert re.fullmatch(rf"(method|name): {file.stem}", options[0])
    assert all(re.fullmatch(r"\w+: \S+ +# \S.+", line) for line in options[1:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cache", CACHES)
def test_every_pair_composes_to_what_python_makes_of_it(method: str, cache: str) -> None:
    try:
        expected = GenerationConfig(method=method, cache=cache)
    except ValueError as refusal:
        with pytest.raises(ValueError, match=re.escape(str(refusal))):
            _config(f"generation={method}", f"cache={cache}")
    else:
        assert _config(f"generation={method}", f"cache={cache}") == expected


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (["generation=vanilla", "generation.threshold=0.9"], {"method": "vanilla", "threshold": 0.9}),
        (["generation=vanilla", "generation.factor=1"], {"method": "vanilla", "factor": 1}),
        (["generation=vanilla", "generation.sigma=10"], {"method": "vanilla", "sigma": 10}),
        (["generation=dllm_var", "generation.factor=1"], {"factor": 1}),
        (["generation=dllm_var", "generation.gamma=0.1"], {"gamma": 0.1}),
        (["generation=dllm_var", "generation.wide_in_thres=0.6"], {"wide_in_thres": 0.6}),
        (["generation=dllm_var", "generation.threshold=0.7"], {"threshold": 0.7}),
        (["generation=klass", "generation.threshold=0.6"], {"method": "klass", "threshold": 0.6}),
        (["generation=vanilla", "generation.gen_length=16"], {"method": "vanilla", "gen_length": 16}),
        (
            ["generation=vanilla", "cache=d2cache", "cache.sigma=3", "generation.sigma=5"],
            {"method": "vanilla", "cache": "d2cache", "cache_sigma": 3, "sigma": 5},
        ),
        (
            ["generation=wino", "cache=prefix", "cache.use_dual=true"],
            {"method": "wino", "cache": "prefix", "use_dual": True},
        ),
    ],
)
def test_an_override_does_what_the_option_does_in_python(overrides: list[str], options: dict[str, Any]) -> None:
    assert _config(*overrides) == GenerationConfig(**options)


def test_two_rules_exclude_each_other_as_in_python() -> None:
    with pytest.raises(ValueError, match=r"factor=1 and threshold=0\.9 exclude each other"):
        _config("generation=dllm_var", "generation.factor=1", "generation.threshold=0.9")


def test_a_key_that_is_no_option_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"generation\.treshold is no option: did you mean generation\.threshold"):
        GenerationConfig.from_groups(_compose("generation=vanilla", "+generation.treshold=0.9").generation)
