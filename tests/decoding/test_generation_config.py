"""`GenerationConfig`: everything is checked at construction, and every refusal says what to do."""

import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from dllm_var.decoding.config import NEEDS, RULES, GenerationConfig
from dllm_var.decoding.methods import CACHES, COLUMNS, MATRIX, METHODS, SAMPLING
from dllm_var.decoding.option_checks import CHECKS

OPTIONS = set(
    """
    method cache max_gen_length gen_length block_length initial_gen_length steps num_transfer_tokens threshold factor gamma
    kl_threshold kl_history_length kl_warmup unmask_strategy wide_in_thres narrow_out_thres remask_budget enable_editing
    edit_threshold remasking sigma debias clip_alpha lambd position_prior special_token_freq frequency_file
    initial_eot_expand_thres decode_eot_expand_thres low_conf_expand_thres num_check_last_eot expansion_factor eos_tail
    logits_eos_inf confidence_eos_eot_inf early_stop stop_until_eos use_dual rollout_p rollout_include_masked current_k
    cache_sigma inflate_w kp kr rou temperature top_p top_k score_distribution cfg_scale seed
    """.split()
)


def test_the_options_are_these_and_no_others() -> None:
    assert {field.name for field in fields(GenerationConfig)} == OPTIONS


def test_every_option_has_a_check_and_a_method_or_cache_that_reads_it() -> None:
    read = set(SAMPLING).union(*(m.options for m in METHODS.values()), *(c.options for c in CACHES.values()))
    assert set(CHECKS) == read == OPTIONS - {"method", "cache"}


def test_every_default_passes_its_own_check() -> None:
    for part in (*METHODS.values(), *CACHES.values()):
        for name, default in {**SAMPLING, **part.options}.items():
            assert default is None or CHECKS[name][0](default), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_with_its_defaults(method: str) -> None:
    config = GenerationConfig(method=method)
    assert config.cache == ("block_commit" if method == "dllm_var" else "none")
    assert config.temperature == 0
    assert config.blocks == -(-config.response_limit // config.block_length)
    read = {"method", "cache", *SAMPLING, *METHODS[method].options}
    assert all(getattr(config, name) is None for name in OPTIONS - read)


@pytest.mark.parametrize("method", METHODS)
def test_a_configuration_copied_with_all_its_values_is_the_same(method: str) -> None:
    config = GenerationConfig(method=method)
    assert replace(config, seed=0) == config


def test_the_default_is_dllm_var_with_its_published_threshold() -> None:
    config = GenerationConfig()
    assert (config.method, config.cache, config.threshold, config.early_stop) == ("dllm_var", "block_commit", 0.9, True)
    assert config.gen_length is None
    assert config.rule == "threshold"


def test_vanilla_is_pure_diffusion_with_one_token_per_step_unless_told_otherwise() -> None:
    config = GenerationConfig(method="vanilla", gen_length=48)
    assert (config.block_length, config.steps, config.threshold, config.rule) == (48, 48, None, "schedule")
    for rule in ({"threshold": 0.9}, {"factor": 1.0}, {"num_transfer_tokens": 2}):
        assert GenerationConfig(method="vanilla", **rule).steps is None


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"factor": 1.0}, "factor"), ({"gamma": 0.1}, "entropy_bound"), ({"wide_in_thres": 0.6}, "wino"),
        ({"kl_threshold": 0.01}, "klass"), ({"threshold": 0.7}, "threshold"),
    ],
)  # fmt: skip
def test_another_rule_takes_the_place_of_the_default_threshold(options: dict[str, float], rule: str) -> None:
    config = GenerationConfig(**options)
    assert config.rule == rule
    assert config.threshold == (options.get("threshold") or (0.9 if rule == "klass" else None))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_gen_length", 0), ("max_gen_length", 2.5), ("max_gen_length", True), ("block_length", -1), ("threshold", -0.1),
        ("threshold", float("nan")), ("threshold", "0.9"), ("temperature", -1), ("temperature", float("inf")),
        ("cfg_scale", -0.5), ("seed", 1.5), ("early_stop", 1), ("factor", 0), ("sigma", 0.0), ("top_p", 0), ("top_p", 1.1),
        ("top_k", 0), ("lambd", float("inf")), ("clip_alpha", 0), ("kl_history_length", 0), ("frequency_file", 3),
        ("block_length", 10**20), ("threshold", 10**400), ("sigma", 1e200), ("cache_sigma", 1e200), ("cfg_scale", 1e39),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_name_value_and_what_is_right(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*is not (a |the |True)") as error:
        GenerationConfig(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "wish"}, "method='wish' is unknown: choose one of dllm_var, vanilla"),
        ({"cache": "magic"}, "cache='magic' is unknown: choose one of block_commit, none"),
        ({"steps": 8}, "steps=8 has no effect with method='dllm_var'.*use method='vanilla'"),
        ({"method": "vanilla", "max_gen_length": 8}, "max_gen_length=8 has no effect.*use method='dllm_var' or 'daedal'"),
        ({"method": "ar", "sigma": 8}, "sigma=8 has no effect with method='ar'"),
        ({"method": "vanilla", "kp": 3}, "kp=3 has no effect with cache='none'.*use cache='dllm'"),
        ({"method": "vanilla", "remasking": "high"}, "remasking='high' is not one of 'low_confidence', 'random'"),
        ({"method": "vanilla", "steps": 8, "threshold": 0.9}, "threshold=0.9 and steps=8 exclude each other"),
        ({"factor": 1.0, "threshold": 0.9}, "factor=1.0 and threshold=0.9 exclude each other"),
        ({"kl_threshold": 0.1, "gamma": 0.2}, "kl_threshold=0.1 and gamma=0.2 exclude each other"),
        ({"method": "vanilla", "steps": 8, "num_transfer_tokens": 2}, "steps=8 and num_transfer_tokens=2 exclude"),
        ({"enable_editing": True, "wide_in_thres": 0.6}, "enable_editing=True and wide_in_thres exclude each other"),
        (
            {"temperature": 1.0, "top_p": 0.5, "score_distribution": "tempered"},
            "top_p=0.5 and score_distribution='tempered' leave threshold=0.9 without meaning.*'raw'",
        ),
        (
            {"temperature": 1.0, "top_k": 2, "score_distribution": "tempered"},
            "top_k=2 and score_distribution='tempered' leave threshold=0.9 without meaning.*'raw'",
        ),
        (
            {"method": "wino", "temperature": 1.0, "top_p": 0.5, "score_distribution": "tempered"},
            "top_p=0.5 and score_distribution='tempered' leave wide_in_thres=0.6 without meaning.*'raw'",
        ),
        ({"sigma": 10, "lambd": 0.2}, "sigma=10 and lambd=0.2 exclude each other.*lambd=0"),
        ({"method": "pc_sampler", "sigma": 10}, "sigma=10 and lambd=0.25 exclude each other"),
        ({"debias": True, "remasking": "entropy"}, "debias=True weighs confidence.*not 'entropy'"),
        ({"lambd": 1.5, "position_prior": "linear"}, "lambd=1.5 is a share.*at most 1"),
        ({"position_prior": "linear"}, "lambd=0.0 is a share.*more than 0"),
        ({"method": "vanilla", "gen_length": 32, "block_length": 8, "steps": 3}, r"steps=3 must lie in 4\.\.32"),
        ({"method": "vanilla", "gen_length": 8, "steps": 9}, r"steps=9 must lie in 1\.\.8"),
        ({"method": "klass", "gen_length": 8, "block_length": 4, "steps": 1}, r"steps=1 must lie in 2\.\.8"),
        ({"method": "daedal", "initial_gen_length": 64, "max_gen_length": 32}, "initial_gen_length=64 is above"),
        ({"method": "vanilla", "cache": "block_commit"}, "cache='block_commit' does not go.*fixed.*use cache='none'"),
        ({"cache": "prefix"}, "cache='prefix' does not go.*grows.*use cache='block_commit' or 'none'"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GenerationConfig(**options)


OTHER = {
    "kl_history_length": 3, "kl_warmup": False, "unmask_strategy": "min_kl", "narrow_out_thres": 0.8,
    "remask_budget": "current", "edit_threshold": 0.5, "clip_alpha": 3.0, "special_token_freq": "trivial",
    "frequency_file": "counts.json", "top_p": 0.5, "top_k": 3, "score_distribution": "tempered",
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDS)
def test_an_option_that_only_shapes_another_one_is_refused_without_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*has no effect without {NEEDS[name]}"):
        GenerationConfig(**{name: OTHER[name]})
    default = {**SAMPLING, **METHODS["dllm_var"].options}[name]
    assert getattr(GenerationConfig(**{name: default}), name) == default  # changes nothing, so it may be said


@pytest.mark.parametrize("bound", RULES)
def test_a_bound_of_zero_is_a_bound(bound: str) -> None:
    if bound != "factor":
        assert getattr(GenerationConfig(**{bound: 0.0}), bound) == 0.0
        assert GenerationConfig(**{bound: 0.0}).rule == RULES[bound]
    assert GenerationConfig(kl_threshold=0.0, kl_history_length=3).kl_history_length == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "is not of the form"),
        ("[1]", "is not of the form"),
        ('{"num_token": 3}', "is not of the form"),
        ('{"num_token": 1e400, "counts": {}}', "is not of the form"),
        ('{"num_token": 3, "counts": {"x": 1}}', "is not of the form"),
        ('{"num_token": 3, "counts": {"1": 0}}', "every count must be at least 1"),
        ('{"num_token": 3, "counts": {"-1": 1}}', "every id at least 0"),
        ('{"num_token": 3, "counts": {"1": 4}}', "num_token at least the sum"),
        ('{"num_token": 0, "counts": {}}', "num_token at least"),
    ],
)
def test_a_frequency_file_is_looked_into_at_once(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=rf"frequency_file=.*counts\.json.*{said}"):
        GenerationConfig(debias=True, frequency_file=str(file))


def test_both_names_of_the_counts_are_read(tmp_path: Path) -> None:
    for key in ("counts", "p_baseline_dict"):
        (tmp_path / "counts.json").write_text(json.dumps({"num_token": 3, key: {"1": 2}}))
        assert GenerationConfig(debias=True, frequency_file=str(tmp_path / "counts.json")).debias


def test_a_changed_copy_is_checked_again_and_nothing_can_be_set() -> None:
    config = GenerationConfig(block_length=16)
    assert replace(config, threshold=0.5).block_length == 16
    with pytest.raises(ValueError, match="threshold=-1"):
        replace(config, threshold=-1)
    with pytest.raises(FrozenInstanceError):
        config.threshold = 0.5  # type: ignore[misc]


def test_the_matrix_has_a_verdict_for_every_pair_and_a_note_for_all_but_the_sound_ones() -> None:
    policies = {*RULES.values(), "schedule", "daedal", "pc_sampler", "certainty_prior", "editing", "cfg"}
    assert set(MATRIX) == policies
    for row in MATRIX.values():
        assert tuple(row) == COLUMNS
        for pair in row.values():
            assert pair.verdict in ("sound", "rule", "refused")
            assert bool(pair.note) == (pair.verdict != "sound")


PAIRS = [
    (method, cache, dual)
    for method in METHODS
    for cache in CACHES
    for dual in (False, True)
    if cache == "prefix" or not dual
]


@pytest.mark.parametrize(("method", "cache", "dual"), PAIRS)
def test_a_pair_is_taken_or_refused_with_its_reason_and_one_that_works(method: str, cache: str, dual: bool) -> None:
    own = GenerationConfig(method=method)
    pair: dict[str, Any] = {"method": method, "cache": cache, **({"use_dual": True} if dual else {})}
    refused = [MATRIX[policy]["dual" if dual else cache] for policy in own.policies]
    refused = [verdict for verdict in refused if verdict.verdict == "refused"]
    if not refused and own.canvas in CACHES[cache].canvases:
        assert GenerationConfig(**pair).cache == cache
        return
    with pytest.raises(ValueError, match=f"cache='{cache}'.* does not go with method='{method}'") as error:
        GenerationConfig(**pair)
    assert all(verdict.note in str(error.value) for verdict in refused[:1])
    others = str(error.value).split("use cache=")[1].rstrip(".").split(" or ")
    assert others
    for other in others:
        assert GenerationConfig(method=method, cache=other.strip("'")).cache == other.strip("'")


def test_groups_are_one_configuration_and_null_leaves_an_option_out() -> None:
    generation = {"method": "vanilla", "gen_length": 16, "steps": None, "factor": 1.0}
    cache = {"name": "d2cache", "sigma": 3.0, "current_k": None}
    config = GenerationConfig.from_groups({**generation, "seed": 4}, cache)
    assert config == GenerationConfig(method="vanilla", gen_length=16, factor=1.0, cache="d2cache", cache_sigma=3.0, seed=4)
    assert GenerationConfig.from_groups({"method": "dllm_var"}) == GenerationConfig()
    assert GenerationConfig.from_groups({"method": "vanilla", "sigma": 4.0}, {"name": "none"}).sigma == 4.0


@pytest.mark.parametrize(
    ("generation", "cache", "said"),
    [
        ({"treshold": 0.9}, None, r"generation\.treshold is no option: did you mean generation\.threshold"),
        ({"metod": "ar"}, None, r"did you mean generation\.method"),
        ({}, {"rolout_p": 0.1}, r"cache\.rolout_p is no option: did you mean cache\.rollout_p"),
        ({}, {"cache_sigma": 0.1}, r"cache\.cache_sigma is no option: did you mean cache\.sigma"),
        ({"kp": 3}, None, r"generation\.kp is no option"),
        ({}, {"name": "block_commit", "kp": 3}, "kp=3 has no effect with cache='block_commit'"),
    ],
)
def test_a_mistyped_key_of_a_group_is_refused_with_the_nearest_one(
    generation: dict[str, object], cache: dict[str, object] | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        GenerationConfig.from_groups(generation, cache)
