"""`scripts/replay_golden.py`: what it compares, what it lists, and how it ends."""

import json
from pathlib import Path
from typing import Any

import pytest

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
        return ["--golden", str(tmp_path), "--model", str(GOLDEN.parent / "tiny_llada")]

    return build


def _other_token(case: dict[str, Any]) -> None:
    case["output_ids"][3] ^= 1


def test_matching_cases_end_well(replay: Any, capsys: Any) -> None:
    assert replay.main(["--golden", str(GOLDEN), "--method", "llada_vanilla_batch"]) == 0
    assert "compared 8 cases: all match; 0 not offered yet" in capsys.readouterr().out


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


@pytest.mark.parametrize("mark", ["near_tie", "optional"])
def test_a_near_tie_or_optional_case_is_reported_but_does_not_fail(mark: str, replay: Any, folder: Any, capsys: Any) -> None:
    assert replay.main(folder(lambda case: (_other_token(case), case.update({mark: True})))) == 0
    assert "differs (near tie or optional): dllm_var-p000" in capsys.readouterr().out


def test_what_is_not_offered_is_listed_and_counted(replay: Any, folder: Any, capsys: Any) -> None:
    arguments = folder(lambda case: None, count=7)  # five without editing, two with
    assert replay.main(arguments) == 0
    out = capsys.readouterr().out
    assert "not offered yet: dllm_var: enable_editing=True" in out
    assert "compared 5 cases: all match; 2 not offered yet" in out


def test_a_run_that_compares_nothing_does_not_look_like_success(replay: Any, folder: Any, capsys: Any) -> None:
    assert replay.main(folder(lambda case: case.update(method="telepathy"))) == 2
    captured = capsys.readouterr()
    assert "not offered yet: telepathy: the whole method" in captured.out
    assert "nothing was compared" in captured.err


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
