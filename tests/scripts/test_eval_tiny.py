"""The evaluation of the bundled model counts what it says, and its yardstick is the same network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm_var import Generation, load_pretrained

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "dataset")]

import eval_ar_twin  # noqa: E402
from eval_ar_twin import as_llama  # noqa: E402
from eval_tiny import Score  # noqa: E402
from tiny_corpus import Problem  # noqa: E402


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "eval_tiny.py"), *arguments], capture_output=True, text=True, timeout=250
    )


def answered(text: str, stop_reason: str = "eos") -> Generation:
    tokens = [7] * len(text)
    return Generation(
        tokens=tokens,
        raw=tokens,
        stop_reason=stop_reason,
        forwards=2,
        positions=9,
        steps=[],
        confidence=[],
        blocks=[],
        text=text,
    )


def test_an_answer_counts_only_when_it_is_exact_and_ended_by_the_model() -> None:
    problems = [Problem("spell", str(i), "?", "four") for i in range(4)]
    answers = [answered("four"), answered("four", "length"), answered("four"), answered("fou")]
    score = Score.of(problems, answers)
    assert (score.exact, score.by_eos, score.right_length) == (0.5, 0.75, 0.75)
    assert score.tokens_per_forward == pytest.approx((5 + 4 + 5 + 4) / 8)
    assert score.longest == 5


def test_the_last_line_is_json_with_every_figure_of_the_tables(tmp_path: Path) -> None:
    done = run(
        "--prompts", "3", "--tasks", "spell", "word", "--settings", "block 16", "no cache", "--output", str(tmp_path / "r")
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line == json.loads((tmp_path / "r").read_text(encoding="utf-8"))
    assert list(line["settings"]) == ["block 16", "no cache"]
    for found in line["settings"].values():
        assert set(found["tasks"]) == {"spell", "word"}
        assert found["macro_exact"] == pytest.approx(sum(t["exact"] for t in found["tasks"].values()) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "nowhere"),
        (("--prompts", "0"), "--prompts"),
        (("--tasks", "chess"), "chess"),
        (("--prompts", "700", "--tasks", "spell", "table"), "task table has no 700 different held-out problems"),
    ],
)
def test_a_wrong_argument_is_named_in_one_sentence_before_anything_is_measured(
    arguments: tuple[str, ...], message: str
) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@torch.inference_mode()
def test_the_autoregressive_yardstick_is_our_network_under_a_causal_mask() -> None:
    pretrained = load_pretrained("tiny")
    ids = torch.randint(10, 440, (2, 40), generator=torch.Generator().manual_seed(0))
    causal = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, -1, -1)
    ours = pretrained.model(ids, query_mask=causal).logits
    theirs = as_llama(pretrained.model, pretrained.special)(ids).logits
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_an_autoregressive_answer_counts_only_when_a_stop_token_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained = load_pretrained("tiny")
    assert pretrained.tokenizer is not None
    text = pretrained.tokenizer.encode("seven", add_special_tokens=False)
    monkeypatch.setattr(eval_ar_twin, "continuations", lambda *_: [text, [*text, pretrained.special.eos]])
    found = eval_ar_twin.answer(
        as_llama(pretrained.model, pretrained.special), pretrained.tokenizer, pretrained.special, ["?"] * 2
    )
    assert found == [None, "seven"]
