"""`GenerationConfig`: everything is checked at construction, and every refusal says what to do."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from dllm_var.decoding.config import CHECKS, COMMON, METHODS, GenerationConfig

OPTIONS = {
    "method", "cache", "max_gen_length", "gen_length", "block_length", "steps", "threshold", "remasking", "logits_eos_inf",
    "confidence_eos_eot_inf", "early_stop", "temperature", "cfg_scale", "seed",
}  # fmt: skip


def test_the_options_are_these_and_no_others() -> None:
    assert {field.name for field in fields(GenerationConfig)} == OPTIONS


def test_every_option_has_a_check_and_a_method_that_reads_it() -> None:
    read = set(COMMON).union(*(method.defaults for method in METHODS.values()))
    assert set(CHECKS) == read == OPTIONS - {"method", "cache"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_with_its_defaults(method: str) -> None:
    config = GenerationConfig(method=method)
    assert config.cache == METHODS[method].caches[0]
    assert config.temperature == 0
    assert config.blocks == -(-config.response_limit // config.block_length)


def test_the_default_is_dllm_var_with_its_published_threshold() -> None:
    config = GenerationConfig()
    assert (config.method, config.cache, config.threshold, config.early_stop) == ("dllm_var", "block_commit", 0.9, True)
    assert config.gen_length is None


def test_vanilla_is_pure_diffusion_with_one_token_per_step_unless_told_otherwise() -> None:
    config = GenerationConfig(method="vanilla", gen_length=48)
    assert (config.block_length, config.steps, config.threshold) == (48, 48, None)
    assert GenerationConfig(method="vanilla", threshold=0.9).steps is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_gen_length", 0), ("max_gen_length", 2.5), ("max_gen_length", True), ("block_length", -1), ("threshold", -0.1),
        ("threshold", float("nan")), ("threshold", "0.9"), ("temperature", -1), ("temperature", float("inf")),
        ("cfg_scale", -0.5), ("seed", 1.5), ("early_stop", 1),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_name_value_and_what_is_right(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*is not (a |True)") as error:
        GenerationConfig(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "wish"}, "method='wish' is unknown: choose one of dllm_var, vanilla"),
        ({"steps": 8}, "steps=8 has no effect with method='dllm_var'.*use method='vanilla'"),
        ({"method": "vanilla", "max_gen_length": 8}, "max_gen_length=8 has no effect.*use method='dllm_var'"),
        ({"remasking": "random"}, "remasking='random' has no effect"),
        ({"method": "vanilla", "remasking": "high"}, "remasking='high' is not one of 'low_confidence', 'random'"),
        ({"method": "vanilla", "steps": 8, "threshold": 0.9}, "steps=8 and threshold=0.9 exclude each other"),
        ({"method": "vanilla", "gen_length": 32, "block_length": 8, "steps": 3}, r"steps=3 must lie in 4\.\.32"),
        ({"method": "vanilla", "gen_length": 8, "steps": 9}, r"steps=9 must lie in 1\.\.8"),
        ({"method": "vanilla", "cache": "block_commit"}, "cache='block_commit' does not go.*fixed.*use cache='none'"),
        ({"cache": "magic"}, "cache='magic' does not go.*unknown.*'block_commit' or 'none'"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GenerationConfig(**options)


def test_a_changed_copy_is_checked_again_and_nothing_can_be_set() -> None:
    config = GenerationConfig(block_length=16)
    assert replace(config, threshold=0.5).block_length == 16
    with pytest.raises(ValueError, match="threshold=-1"):
        replace(config, threshold=-1)
    with pytest.raises(FrozenInstanceError):
        config.threshold = 0.5  # type: ignore[misc]
