"""Instruction files become token ids: every sample once, in order, whatever stops the work; nothing dropped unsaid."""

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dllm_var.text.chat import CHAT_TEMPLATE, SPECIAL_TOKEN_NAMES, decode_text, render_prompt
from dllm_var.text.special_tokens import BOS, EOS, control_ids
from dllm_var.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "dataset" / "transfer_text2token.py"

spec = importlib.util.spec_from_file_location("transfer_text2token", SCRIPT)
transfer = importlib.util.module_from_spec(spec)
sys.modules["transfer_text2token"] = transfer
spec.loader.exec_module(transfer)

GOOD = [
    {"instruction": "Add the numbers.", "input": "12 30", "output": "12 + 30 = 42\n#### 42"},
    {"instruction": "Say hello.", "input": None, "output": "hello"},
    {"instruction": None, "input": "What does <|eot_id|> mean?", "output": "It ends a turn: <|eot_id|><|endoftext|>."},
    {"instruction": "Repeat.", "output": " café 猫 "},
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL_TOKEN_NAMES), initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(["user assistant Add the numbers. hello"] * 4, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **named).save_pretrained(folder)
    return folder


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, bytes) else json.dumps(record).encode() for record in records)
    path.write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    """Two files, one in a subfolder."""
    write_lines(tmp_path / "in" / "b.jsonl", GOOD[:2])
    write_lines(tmp_path / "in" / "a" / "z.json", GOOD[2:])
    return tmp_path / "in"


def run(folder, output, tokenizer_folder, *options):
    """Exit code, what was printed, what was complained about."""
    out, err = io.StringIO(), io.StringIO()
    command = [
        "--input_dir",
        str(folder),
        "--output_file",
        str(output),
        "--tokenizer_model",
        str(tokenizer_folder),
        *options,
    ]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = transfer.main(command)
        except SystemExit as ended:
            code = ended.code
    return code, out.getvalue(), err.getvalue()


def read(output):
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def summary_of(output):
    return json.loads(output.with_name(output.name + ".summary.json").read_text(encoding="utf-8"))


def test_files_are_read_in_sorted_order_at_any_depth_and_every_line_keeps_its_origin(folder, tmp_path, tokenizer_folder):
    code, _, _ = run(folder, tmp_path / "out.jsonl", tokenizer_folder)
    samples = read(tmp_path / "out.jsonl")
    assert code == 0
    assert [sample["id"] for sample in samples] == ["a/z:1", "a/z:2", "b:1", "b:2"]
    assert [sample["source"] for sample in samples] == ["a/z.json"] * 2 + ["b.jsonl"] * 2
    assert all(sample["num_tokens"] == len(sample["input_ids"]) for sample in samples)


def test_chat_samples_are_the_inference_prompt_the_answer_and_both_ends(folder, tmp_path, tokenizer_folder):
    run(folder, tmp_path / "out.jsonl", tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    eot, eos = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|endoftext|>"])
    questions = ["What does <|eot_id|> mean?", "Repeat.", "Add the numbers.\n\n12 30", "Say hello."]
    answers = [GOOD[2]["output"], "café 猫", GOOD[0]["output"], "hello"]
    for sample, question, answer in zip(read(tmp_path / "out.jsonl"), questions, answers, strict=True):
        prompt, response = sample["input_ids"][: sample["prompt_length"]], sample["input_ids"][sample["prompt_length"] :]
        assert prompt == render_prompt(tokenizer, [{"role": "user", "content": question}])
        assert response[-2:] == [eot, eos]
        assert control_ids(tokenizer).isdisjoint(response[:-2])
        assert decode_text(tokenizer, response) == answer


def test_plain_samples_are_the_bare_texts_and_eos(folder, tmp_path, tokenizer_folder):
    run(folder, tmp_path / "out.jsonl", tokenizer_folder, "--template", "plain")
    tokenizer = load_tokenizer(tokenizer_folder)
    sample = read(tmp_path / "out.jsonl")[2]
    ids, border = sample["input_ids"], sample["prompt_length"]
    assert decode_text(tokenizer, ids[:border]) == "Add the numbers.12 30"
    assert tokenizer.decode(ids[border:]) == GOOD[0]["output"] + "<|endoftext|>"


def test_the_summary_counts_samples_tokens_eos_and_fields_that_are_not_used(folder, tmp_path, tokenizer_folder):
    write_lines(folder / "c.jsonl", [{"output": "alone", "history": []}, b"", b"  "])
    code, printed, _ = run(folder, tmp_path / "out.jsonl", tokenizer_folder)
    samples, summary = read(tmp_path / "out.jsonl"), summary_of(tmp_path / "out.jsonl")
    assert code == 0
    assert (summary["samples"], summary["lines"], summary["blank_lines"], summary["samples_without_prompt"]) == (5, 7, 2, 1)
    assert summary["tokens"] == sum(sample["num_tokens"] for sample in samples)
    assert summary["prompt_tokens"] == sum(sample["prompt_length"] for sample in samples)
    assert summary["eos_tokens"] == 5
    assert summary["eos_share_of_tokens"] == 5 / summary["tokens"]
    assert sum(summary["lengths_up_to"].values()) == 5
    assert summary["unused_fields"] == {"history": 1}
    assert summary["sources"] == ["a/z.json", "b.jsonl", "c.jsonl"]
    assert "history (1 lines)" in printed
    assert "█" in printed


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path, tokenizer_folder):
    write_lines(
        tmp_path / "in" / "a.jsonl",
        [b"\xef\xbb\xbf" + json.dumps(GOOD[1]).encode() + b"\r", json.dumps(GOOD[1]).encode() + b"\r"],
    )
    assert run(tmp_path / "in", tmp_path / "out", tokenizer_folder)[0] == 0
    first, second = read(tmp_path / "out")
    assert first["input_ids"] == second["input_ids"]


BAD = [b"{", b"[1]", {"instruction": "q"}, {"output": 3}, {"instruction": "q", "output": " "}, b'{"output": "\xff"}']


def test_by_default_the_first_bad_line_stops_the_work_with_file_and_line(folder, tmp_path, tokenizer_folder):
    write_lines(folder / "a" / "zz.jsonl", [GOOD[0], {"instruction": "q"}, b"{"])
    code, printed, complaint = run(folder, tmp_path / "out.jsonl", tokenizer_folder)
    assert (code, printed) == (1, "")
    assert "a/zz.jsonl:2: the field 'output' is missing" in complaint
    assert "--on_error skip" in complaint
    assert not (tmp_path / "out.jsonl").exists()


def test_a_mended_file_is_read_anew(folder, tmp_path, tokenizer_folder):
    write_lines(folder / "c.jsonl", [b"{"])
    assert run(folder, tmp_path / "out.jsonl", tokenizer_folder)[0] == 1
    write_lines(folder / "c.jsonl", [GOOD[1]])
    assert run(folder, tmp_path / "out.jsonl", tokenizer_folder)[0] == 0
    assert len(read(tmp_path / "out.jsonl")) == 5


def test_skipped_lines_are_counted_by_reason_with_their_places(folder, tmp_path, tokenizer_folder):
    write_lines(folder / "c.jsonl", [*BAD, GOOD[0], b"{"])
    code, printed, _ = run(folder, tmp_path / "out.jsonl", tokenizer_folder, "--on_error", "skip")
    summary = summary_of(tmp_path / "out.jsonl")
    assert code == 0
    assert summary["samples"] == 5
    assert summary["dropped"] == {
        "not JSON": 2, "not an object": 1, "no output field": 1, "field not text": 1, "empty response": 1, "not UTF-8": 1,
    }  # fmt: skip
    assert summary["dropped_first_places"]["not JSON"] == ["c.jsonl:1", "c.jsonl:8"]
    assert "2 not JSON: c.jsonl:1, c.jsonl:8" in printed


def test_samples_longer_than_the_limit_are_counted_and_never_cut(folder, tmp_path, tokenizer_folder):
    run(folder, tmp_path / "all.jsonl", tokenizer_folder)
    everything = read(tmp_path / "all.jsonl")
    longest = max(sample["num_tokens"] for sample in everything)
    assert run(folder, tmp_path / "same.jsonl", tokenizer_folder, "--max_length", str(longest))[0] == 0
    assert read(tmp_path / "same.jsonl") == everything
    assert run(folder, tmp_path / "short.jsonl", tokenizer_folder, "--max_length", str(longest - 1))[0] == 0
    assert read(tmp_path / "short.jsonl") == [sample for sample in everything if sample["num_tokens"] < longest]
    assert summary_of(tmp_path / "short.jsonl")["dropped"] == {"longer than max_length": 1}


def test_when_nothing_is_left_no_empty_file_is_written(folder, tmp_path, tokenizer_folder):
    code, _, complaint = run(folder, tmp_path / "out" / "t.jsonl", tokenizer_folder, "--max_length", "2")
    assert code == 1
    assert "no line gave a sample" in complaint
    assert "4 longer than max_length" in complaint
    assert list((tmp_path / "out").iterdir()) == []


def test_finished_work_is_recognised_and_not_done_again(folder, tmp_path, tokenizer_folder, monkeypatch):
    out = tmp_path / "out.jsonl"
    run(folder, out, tokenizer_folder)
    before = out.stat()
    monkeypatch.setattr(transfer, "tokenise", None)
    code, printed, _ = run(folder, out, tokenizer_folder, "--num_workers", "3")
    assert code == 0
    assert "already complete" in printed
    assert out.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("change", ["template", "length", "source", "tokenizer"])
def test_other_settings_are_never_taken_for_the_same_work(folder, tmp_path, tokenizer_folder, change):
    out = tmp_path / "out.jsonl"
    run(folder, out, tokenizer_folder)
    first, options, model = out.read_bytes(), [], tokenizer_folder
    if change == "template":
        options = ["--template", "plain"]
    elif change == "length":
        options = ["--max_length", "60"]
    elif change == "source":
        write_lines(folder / "b.jsonl", GOOD[1:3])
    else:
        other = load_tokenizer(tokenizer_folder)
        other.add_tokens(["numbers"])
        model = tmp_path / "other"
        other.save_pretrained(model)
    code, printed, _ = run(folder, out, model, *options)
    assert code == 0
    assert "already complete" not in printed
    assert out.read_bytes() != first


class Killed(BaseException):
    """Stands for a kill."""


def watched(seen, survive):
    """`tokenise` that notes its chunks and is killed after `survive` of them."""
    honest = transfer.tokenise

    def tokenise(tokenizer, recipe, chunk):
        if len(seen) == survive:
            raise Killed
        seen.append((chunk.source, chunk.first_line))
        return honest(tokenizer, recipe, chunk)

    return tokenise


def test_stopped_between_any_two_chunks_the_rest_is_added_once(folder, tmp_path, tokenizer_folder, monkeypatch):
    write_lines(folder / "c.jsonl", [*BAD, *GOOD] * 3)
    options = ["--on_error", "skip", "--max_length", "70"]
    monkeypatch.setattr(transfer, "CHUNK_LINES", 3)
    all_chunks = []
    with monkeypatch.context() as patched:
        patched.setattr(transfer, "tokenise", watched(all_chunks, survive=1000))
        run(folder, tmp_path / "whole.jsonl", tokenizer_folder, *options)
    assert len(all_chunks) == 12
    for survive in range(len(all_chunks)):
        out, before, after = tmp_path / f"out{survive}.jsonl", [], []
        with monkeypatch.context() as patched:
            patched.setattr(transfer, "tokenise", watched(before, survive))
            with pytest.raises(Killed):
                run(folder, out, tokenizer_folder, *options)
        with monkeypatch.context() as patched:
            patched.setattr(transfer, "tokenise", watched(after, survive=1000))
            run(folder, out, tokenizer_folder, *options)
        assert before + after == all_chunks, "the second run goes on where the first was stopped"
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert summary_of(out) == summary_of(tmp_path / "whole.jsonl")


def test_files_that_change_while_they_are_read_are_noticed(folder, tmp_path, tokenizer_folder, monkeypatch):
    honest = transfer.tokenise

    def meddled(tokenizer, recipe, chunk):
        write_lines(folder / "b.jsonl", GOOD)
        return honest(tokenizer, recipe, chunk)

    monkeypatch.setattr(transfer, "tokenise", meddled)
    code, _, complaint = run(folder, tmp_path / "out.jsonl", tokenizer_folder)
    assert code == 1
    assert "changed while they were read" in complaint
    assert not (tmp_path / "out.jsonl").exists()


def test_interrupting_says_that_the_work_can_go_on(folder, tmp_path, tokenizer_folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "tokenise", interrupted)
    code, _, complaint = run(folder, tmp_path / "out.jsonl", tokenizer_folder)
    assert (code, complaint.splitlines()[-1]) == (130, "Stopped. The same command goes on from here.")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--input_dir", "nowhere"], "--input_dir 'nowhere' is not a folder"),
        (["--tokenizer_model", "nowhere"], "tokenizer 'nowhere' is not a folder"),
        (["--max_length", "0"], "--max_length 0 must be at least 1"),
        (["--max_length", "many"], "invalid int value: 'many'"),
        (["--num_workers", "-2"], "--num_workers -2 must be at least 1"),
        (["--template", "alpaca"], "choose from"),
        (["--on_error", "shrug"], "choose from"),
        (["--output_file", "."], "is a folder"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_code_2(folder, tmp_path, tokenizer_folder, options, complaint):
    code, printed, said = run(folder, tmp_path / "out.jsonl", tokenizer_folder, *options)
    assert (code, printed) == (2, "")
    assert complaint in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_an_output_among_the_inputs_is_refused(folder, tmp_path, tokenizer_folder):
    code, _, complaint = run(folder, folder / "a" / "out.jsonl", tokenizer_folder)
    assert code == 2
    assert "lies inside --input_dir" in complaint


def test_a_folder_without_instruction_files_is_refused(tmp_path, tokenizer_folder):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("hello")
    code, _, complaint = run(tmp_path / "in", tmp_path / "out.jsonl", tokenizer_folder)
    assert code == 2
    assert "holds no *.jsonl or *.json file" in complaint


def test_two_files_whose_samples_would_share_ids_are_refused(folder, tmp_path, tokenizer_folder):
    write_lines(folder / "b.json", GOOD)
    code, _, complaint = run(folder, tmp_path / "out.jsonl", tokenizer_folder)
    assert code == 2
    assert "same ids" in complaint


def test_a_file_that_is_not_ours_is_not_overwritten(folder, tmp_path, tokenizer_folder):
    (tmp_path / "out.jsonl").write_text("precious")
    code, _, complaint = run(folder, tmp_path / "out.jsonl", tokenizer_folder)
    assert code == 2
    assert "not an output of this script" in complaint
    assert (tmp_path / "out.jsonl").read_text() == "precious"


def test_a_tokenizer_without_the_chat_tokens_is_refused_before_any_work(folder, tmp_path):
    words = Tokenizer(models.WordLevel({"q": 0, "</s>": 1}, unk_token="q"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "bare")
    code, _, complaint = run(folder, tmp_path / "out.jsonl", tmp_path / "bare")
    assert code == 2
    assert "<|eot_id|> does not resolve to one id" in complaint
    assert run(folder, tmp_path / "out.jsonl", tmp_path / "bare", "--template", "plain")[0] == 0


def children_of(process):
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_until(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


@pytest.mark.dist
def test_killed_with_its_workers_running_it_ends_the_same_and_leaves_no_worker_behind(tmp_path, tokenizer_folder):
    records = [
        {"instruction": f"Add {i} and {i * 7}.", "input": None, "output": f"The sum is {i * 8}. " * 12} for i in range(8_000)
    ]
    write_lines(tmp_path / "in" / "sums.jsonl", records)
    out = tmp_path / "out.jsonl"
    progress = out.with_name(out.name + ".progress.json")
    command = [sys.executable, str(SCRIPT), "--input_dir", str(tmp_path / "in"), "--output_file", str(out)]
    command += ["--tokenizer_model", str(tokenizer_folder), "--num_workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: progress.exists() or process.poll() is not None, 200, "the first safe point")
        workers = children_of(process)
        assert len(workers) >= 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists(), "the kill must come before the end"
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 30, "the end of the workers")
    done = json.loads(progress.read_text())["state"]["line"] - 1
    assert 0 < done < len(records)
    code, _, said = run(tmp_path / "in", out, tokenizer_folder)
    assert code == 0
    assert f"Going on at sums.jsonl:{done + 1}." in said
    assert run(tmp_path / "in", tmp_path / "whole.jsonl", tokenizer_folder)[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.dist
def test_two_workers_write_the_same_file_as_one(folder, tmp_path, tokenizer_folder):
    write_lines(folder / "c.jsonl", [*BAD, *GOOD] * 200)
    assert run(folder, tmp_path / "one.jsonl", tokenizer_folder, "--on_error", "skip")[0] == 0
    command = [sys.executable, str(SCRIPT), "--input_dir", str(folder), "--output_file", str(tmp_path / "two.jsonl")]
    command += ["--tokenizer_model", str(tokenizer_folder), "--num_workers", "2", "--on_error", "skip"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert summary_of(tmp_path / "two.jsonl") == summary_of(tmp_path / "one.jsonl")
    assert "804   from 2,004 lines" in done.stdout


def test_files_in_linked_folders_are_read_and_links_to_nothing_or_in_a_circle_are_refused(tmp_path):
    write_lines(tmp_path / "elsewhere" / "more.jsonl", GOOD)
    folder = tmp_path / "in"
    write_lines(folder / "own.jsonl", GOOD)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert [source.name for source in transfer.find_sources(folder)] == ["linked/more.jsonl", "own.jsonl"]
    with pytest.raises(ValueError, match=r"elsewhere/out\.jsonl' lies where --input_dir leads"):
        transfer.check_output(tmp_path / "elsewhere" / "out.jsonl", folder, transfer.find_sources(folder))
    transfer.check_output(tmp_path / "out.jsonl", folder, transfer.find_sources(folder))
    (folder / "gone.json").symlink_to(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"gone\.json' is a link to nothing: mend or remove it"):
        transfer.find_sources(folder)
    (folder / "gone.json").unlink()
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    with pytest.raises(ValueError, match=r"linked/back' is a link to a folder that it lies in: remove it"):
        transfer.find_sources(folder)


def test_files_with_other_endings_are_told_and_a_name_that_is_no_text_is_refused(folder, tmp_path, tokenizer_folder):
    for name in ("more.jsonl.gz", "MORE.JSONL", ".hidden"):
        (folder / name).write_bytes(b"")
    code, _, told = run(folder, tmp_path / "one.jsonl", tokenizer_folder, "--on_error", "skip")
    assert code == 0
    assert "not read, since they end neither in .jsonl nor in .json: MORE.JSONL, more.jsonl.gz" in told
    with open(os.fsencode(folder) + b"/\xe9.jsonl", "w") as file:
        file.write("{}")
    with pytest.raises(ValueError, match="is not UTF-8: rename it"):
        transfer.find_sources(folder)
