"""`scripts/replay_golden.py`: what it compares, what it lists, and how it ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_var.model.checkpoint import load_model

GOLDEN = Path(__file__).parents[1] / "golden" / "decode"


@pytest.fixture(scope="module")
def replay(script: Any) -> Any:
    return script("scripts/replay_golden.py")


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Write cases, changed by a function, into a folder of their own."""

    def build(change: Any, file: str = "dllm_var.json", count: int = 2) -> list[str]:
        content = json.loads((GOLDEN / file).read_text())
        content["cases"] = content["cases"][:count]
        for case in content["cases"]:
            change(case)
        (tmp_path / file).write_text(json.dumps(content))
        beside = ["--model", str(GOLDEN.parent / "tiny_llada"), "--frequencies", str(GOLDEN.parent / "token_freq.json")]
        return ["--golden", str(tmp_path), *beside]

    return build


def _other_token(case: dict[str, Any]) -> None:
    case["output_ids"][3] ^= 1


def test_matching_cases_end_well(replay: Any, capsys: Any) -> None:
    assert replay.main(["--golden", str(GOLDEN), "--method", "llada_vanilla_batch"]) == 0
    assert "compared 8 cases: all match or are explained; 0 not offered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_other_token, "tokens differ from position 3"),
        (lambda case: case.update(forward_passes=1), "forwards, 1 recorded"),
        (lambda case: case["trace"].reverse(), "forward 0 fixed positions"),
    ],
)
def test_a_difference_in_tokens_forwards_or_order_fails(
    change: Any, said: str, replay: Any, folder: Any, capsys: Any
) -> None:
    assert replay.main(folder(change)) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "trace", "said"),
    [
        ("wino_orig.json", "trace_remask", "took back"),
        ("dllm_var.json", "trace_edit", "replaced"),
        ("daedal_orig.json", "trace_gen_length", "saw a length of"),
    ],
)
def test_what_was_taken_back_replaced_and_seen_is_compared(
    file: str, trace: str, said: str, replay: Any, folder: Any, capsys: Any
) -> None:
    def change(case: dict[str, Any]) -> None:
        case[trace] = case[trace][::-1] if trace in case else [[99]] * case["forward_passes"]

    assert replay.main(folder(lambda case: None, file=file, count=1)) == 0
    assert replay.main(folder(change, file=file, count=1)) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("mark", ["near_tie", "optional"])
def test_a_near_tie_or_optional_case_is_reported_but_does_not_fail(mark: str, replay: Any, folder: Any, capsys: Any) -> None:
    assert replay.main(folder(lambda case: (_other_token(case), case.update({mark: True})))) == 0
    assert "differs (near tie or optional): dllm_var-p000" in capsys.readouterr().out


def test_ends_taken_out_of_the_probabilities_are_a_defect_that_is_imitated(
    replay: Any, folder: Any, tmp_path: Path, capsys: Any
) -> None:
    """A case that was made here, by what tests/golden/README.md says of the recorded program."""
    case = json.loads((GOLDEN / "llada_vanilla.json").read_text())["cases"][0]
    prompt = [258, 259, *b"seq 3 11=", 257, 260]
    model, mask, ends = load_model(GOLDEN.parent / "tiny_llada"), 270, [256, 257]
    row = torch.tensor([prompt + [mask] * 32])
    for _ in range(32):
        with torch.no_grad():
            logits = model(input_ids=row).logits[0]
        proposed = logits.argmax(-1)
        logits[:, ends] = -torch.inf
        confidence = logits.softmax(-1).gather(1, proposed[:, None])[:, 0].masked_fill(row[0] != mask, -1)
        row[0, confidence.argmax()] = proposed[confidence.argmax()]
    params = {"gen_length": 32, "steps": 32, "block_length": 32, "confidence_eos_eot_inf": True}
    made = {
        **case,
        "params": params,
        "prompt_ids": prompt,
        "output_ids": row[0, len(prompt) :].tolist(),
        "forward_passes": 32,
    }
    made.pop("trace", None)
    arguments = folder(lambda case: None)
    (tmp_path / "dllm_var.json").write_text(json.dumps([made]))
    assert replay.main([*arguments, "--method", "llada_vanilla"]) == 0
    assert "rests on 'ends taken out'" in capsys.readouterr().out


def test_a_variant_that_is_not_offered_is_counted_and_a_file_of_something_else_named(
    replay: Any, folder: Any, tmp_path: Path, capsys: Any
) -> None:
    arguments = folder(lambda case: case["params"].update(alg="random"), file="klass_orig.json", count=1)
    assert replay.main(arguments) == 2
    assert "not offered: klass_orig" in capsys.readouterr().out
    (tmp_path / "klass_orig.json").write_text("{}")
    assert replay.main(arguments) == 2
    assert "klass_orig.json: a list of cases, or an object with one as 'cases', belongs there" in capsys.readouterr().err


def test_what_is_not_offered_is_listed_and_counted(replay: Any, folder: Any, capsys: Any) -> None:
    def rename(case: dict[str, Any]) -> None:
        case["method"] = "telepathy" if case["id"].endswith("1") else case["method"]

    assert replay.main(folder(rename, count=3)) == 0
    out = capsys.readouterr().out
    assert "not offered: telepathy" in out
    assert "compared 2 cases: all match or are explained; 1 not offered" in out


def test_a_run_that_compares_nothing_does_not_look_like_success(replay: Any, folder: Any, capsys: Any) -> None:
    assert replay.main(folder(lambda case: case.update(method="telepathy"))) == 2
    captured = capsys.readouterr()
    assert "not offered: telepathy" in captured.out
    assert "nothing was compared" in captured.err


def test_a_case_that_rests_on_a_defect_is_listed_with_it_and_limited_in_number(
    replay: Any, folder: Any, capsys: Any
) -> None:
    arguments = folder(lambda case: None, file="fast_dllm_v1.json", count=1)
    assert replay.main([*arguments, "--method", "fast_dllm_v1"]) == 0
    out = capsys.readouterr().out
    assert "rests on 'last pair': fast_dllm_v1-p000: row 0: tokens differ from position 23" in out
    assert "last pair                   1             1  Fast-dLLM's factor takes the last token as well" in out
    assert replay.main(arguments) == 1  # one of one case is too many of a whole folder
    assert "tokens that a defect changes: 1 cases, 100.0%" in capsys.readouterr().out


def test_a_difference_that_the_defect_does_not_explain_fails(replay: Any, folder: Any, capsys: Any) -> None:
    assert replay.main([*folder(_other_token, file="fast_dllm_v1.json", count=1), "--method", "fast_dllm_v1"]) == 1
    assert "DIFFERS: fast_dllm_v1-p000" in capsys.readouterr().out


def test_likelihoods_are_compared_within_a_tolerance(replay: Any, folder: Any, capsys: Any) -> None:
    def shift(by: float) -> Any:
        return lambda case: case.update(log_likelihood=case["log_likelihood"] + by)

    assert replay.main(folder(shift(1e-4), file="llada_loglik.json", count=1)) == 0
    assert replay.main(folder(shift(0.1), file="llada_loglik.json", count=1)) == 1
    assert "DIFFERS: llada_loglik-p000: log-likelihood" in capsys.readouterr().out


def test_a_mask_left_behind_an_eos_is_compared_as_eos(replay: Any, folder: Any) -> None:
    assert replay.main(folder(lambda case: None, file="d2c_stop_until_eos.json", count=1)) == 0
    drop = folder(lambda case: case["params"].pop("stop_until_eos"), file="d2c_stop_until_eos.json", count=1)
    assert replay.main(drop) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--golden", str(GOLDEN), "--method", "wish"], "--method wish: no such method"),
        (["--golden", "nowhere"], "no recorded cases"),
        (["--golden", str(GOLDEN), "--model", "nowhere"], "nowhere does not exist"),
    ],
)
def test_a_wrong_argument_is_a_usage_error(arguments: list[str], said: str, replay: Any, capsys: Any) -> None:
    assert replay.main(arguments) == 2
    assert said in capsys.readouterr().err
