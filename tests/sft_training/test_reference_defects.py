"""The nineteen defects of the published training code, each as a direct check that this code has not got it.

The numbers are those of the list that the work started from; most are tested in depth where the part itself is tested.
"""

import ast
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_var import Pretrained
from dllm_var.diffusion.corruption import corrupt
from dllm_var.diffusion.objective import masked_cross_entropy, token_weights
from dllm_var.diffusion.packing import Row
from dllm_var.model.checkpoint import load_config
from dllm_var.text.special_tokens import SpecialTokens, resolve
from sft_training.build import build_collate, build_model, build_stream, open_files, sample_rules
from sft_training.config import SftConfig
from sft_training.data import RowStream
from sft_training.overrides import compose_settings
from sft_training.prefetch import read_ahead
from sft_training.samples import find_files
from sft_training.tally import Tally
from sft_training.validation import Validator

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = SpecialTokens(mask=270, eos=256, pad=256, eot=257, bos=258)
LENGTHS = [3 + (7 * i) % 23 for i in range(40)]

Make = Callable[..., tuple[SftConfig, RowStream]]


@pytest.fixture
def make(settings: Callable[..., SftConfig], write_samples: Callable[..., Path]) -> Make:
    """Settings, and the stream of rows that they give."""
    files = write_samples(LENGTHS)

    def build(*more: str) -> tuple[SftConfig, RowStream]:
        config = settings(files, *more)
        return config, build_stream(config, 288, SPECIAL)

    return build


def batch_of(config: SftConfig, rows: list[Row]) -> dict[str, Any]:
    return build_collate(config, SPECIAL)(rows)


def test_01_ranks_share_the_rows_out_and_none_is_trained_twice(make: Make) -> None:
    parts = [
        [row.index for row in islice(IterableDatasetShard(make()[1], 2, num_processes=2, process_index=rank), 8)]
        for rank in (0, 1)
    ]
    assert set(parts[0]).isdisjoint(parts[1])
    assert sorted(parts[0] + parts[1]) == list(range(16))


def test_02_masks_do_not_depend_on_threads_order_or_anything_drawn_before(make: Make) -> None:
    config, stream = make("dataset.prefetch_steps=3")
    rows = list(islice(stream, 8))
    torch.rand(7)
    again = list(islice(make("dataset.prefetch_steps=0")[1], 8))
    together, backwards = batch_of(config, rows), batch_of(config, again[::-1])
    for name in ("noisy", "masked", "t"):
        assert torch.equal(together[name], backwards[name].flip(0)), name


def test_03_few_rows_are_read_ahead_and_masks_are_drawn_when_a_batch_is_fetched(make: Make) -> None:
    made = []
    items = iter(lambda: made.append(None) or len(made), None)
    reader = read_ahead(items, make()[0].dataset.prefetch_steps)
    next(reader)
    reader.close()
    assert len(made) <= 8
    assert all(not (row.ids == SPECIAL.mask).any() for row in islice(make("view.tail_share=0")[1], 8))


def test_04_the_data_go_on_where_they_stood(make: Make) -> None:
    stream = make()[1]
    rows = list(islice(stream, 12))
    later = make()[1]
    later.restore(stream.state(8))
    for ours, theirs in zip(islice(later, 4), rows[8:], strict=True):
        assert (ours.index, ours.pieces) == (theirs.index, theirs.pieces)
        assert np.array_equal(ours.noise, theirs.noise)


def test_05_the_order_of_files_does_not_come_from_the_disk_or_from_chance(tmp_path: Path) -> None:
    for name in ("b.jsonl", "c.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    names = [str(tmp_path / name) for name in ("c.jsonl", "a.jsonl", "b.jsonl")]
    assert find_files("files", names) == find_files("files", str(tmp_path / "*.jsonl")) == sorted(tmp_path.glob("*.jsonl"))


def test_06_every_sample_of_a_row_can_have_a_level_of_its_own(make: Make) -> None:
    for per, wanted in (("row", 1), ("sample", 2)):
        config, stream = make(f"forward_process.t_per={per}")
        row = next(row for row in stream if len(row.pieces) == 2)
        assert len(batch_of(config, [row])["t"][0, : int(row.real.sum())].unique()) == wanted


def test_07_a_micro_batch_without_a_masked_token_has_loss_0_and_a_gradient() -> None:
    hidden, head = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    for loss in ("plain_mean", "token_sum_global", "elbo"):
        weights = token_weights(loss, torch.ones(0), masked=0, responses=0, masked_global=0)
        total, _ = masked_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.long), weights)
        total.backward()
        assert total.item() == 0.0
        assert head.grad is not None
        assert not head.grad.any()


def test_08_every_token_of_a_step_can_weigh_the_same_wherever_it_was_computed() -> None:
    few, many = torch.rand(3), torch.rand(17)  # cross-entropies of two micro-batches
    sums = {
        loss: sum(
            (part * token_weights(loss, torch.ones(len(part)), masked=len(part), responses=20, masked_global=20)).sum()
            for part in (few, many)
        )
        for loss in ("plain_mean", "token_sum_global")
    }
    assert sums["token_sum_global"] == pytest.approx(torch.cat([few, many]).mean())
    assert sums["plain_mean"] == pytest.approx(few.mean() + many.mean())


def test_09_control_tokens_are_looked_up_and_nowhere_written_as_numbers(tokenizer: Any, start_folder: Path) -> None:
    assert resolve(tokenizer, load_config(start_folder)) == replace(SPECIAL, known=len(tokenizer))
    for folder in ("dllm_var", "sft_training", "dataset"):
        for file in (ROOT / folder).rglob("*.py"):
            numbers = {node.value for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Constant)}
            assert not {126336, 126081, 126348} & {value for value in numbers if type(value) is int}, file


def test_10_no_sample_is_cut_unless_asked_and_what_an_epoch_leaves_over_is_counted(make: Make) -> None:
    for mode, cut in (("whole", False), ("split", True)):
        stream = make(f"packing.mode={mode}", "dataset.epochs=1")[1]
        rows = list(stream)
        assert any(start for row in rows for *_, start in row.pieces) == cut
        one_by_one = make(f"packing.mode={mode}", "dataset.epochs=1", "training.grad_accum_steps=1")[1]
        one_by_one.rows_per_step = 1
        assert len(rows) + stream.left_over == len(list(one_by_one))


def test_11_training_validates_the_loss_under_fixed_noise_and_the_ends_of_answers(make: Make, tokenizer: Any) -> None:
    config = make("validation.samples=2", "validation.decodes=0", "validation.block_length=8")[0]
    held_out = open_files("validation.files", config.dataset.files, sample_rules(config, 288, SPECIAL, tokenizer))
    found = Validator(config.validation, held_out, Pretrained(build_model(config), tokenizer, SPECIAL), print)
    measured = found.measure()
    assert measured == found.measure()
    assert {"loss_t0.1", "loss_t0.9", "elbo", "eos_recall_d0", "eos_recall_d16", "eos_precision"} <= measured.keys()


def test_12_tokens_are_counted_by_kind_and_summed_over_ranks_instead_of_guessed(make: Make) -> None:
    config, stream = make("view.tail_share=0")
    rows = list(islice(stream, 4))
    batch = batch_of(config, rows)
    seen = Tally(0.1, 0.9, ["data"], torch.device("cpu"))
    seen.add(batch, torch.ones(batch["counts"].masked))
    other_rank = torch.zeros_like(seen.sums)
    other_rank[:4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    logs = seen.logs(lambda sums: sums + other_rank)
    samples = sum(len(row.pieces) for row in rows)
    assert logs["tokens/prompt"] == 5 * samples + 1
    assert logs["tokens/response"] == sum(int(row.response.sum()) for row in rows) + 2
    assert logs["tokens/masked"] == int((batch["noisy"] == SPECIAL.mask).sum()) + 3
    assert logs["tokens/eos"] == 2 * samples + 4


def test_13_what_is_known_of_a_batch_is_numbers_and_no_tensor(make: Make) -> None:
    config, stream = make()
    counts = batch_of(config, list(islice(stream, 2)))["counts"]
    assert not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(vars(counts)))
    assert isinstance(counts.prompt, int)


@pytest.mark.parametrize("name", ["1e5", "3.10", "007", "0x10", "1_0", "true", "a.b-e7", "null.d"])
def test_14_a_name_that_looks_like_a_number_stays_the_name_it_is(name: str) -> None:
    settings = compose_settings([f"dataset.files={name}", f"output_dir={name}", f"model.path={name}"])
    assert (settings.dataset.files, settings.output_dir, settings.model.path) == (name, name, name)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))])
        return made


def test_15_the_full_logits_never_exist() -> None:
    masked, width, vocabulary, chunk = 512, 8, 4096, 16
    hidden, head = torch.randn(masked, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    with Largest() as largest:
        masked_cross_entropy(hidden, head, torch.arange(masked), chunk=chunk)[0].backward()
    assert largest.elements <= chunk * vocabulary < masked * vocabulary / 8


def test_16_every_file_is_valid_in_the_oldest_python_that_is_promised() -> None:
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in ("dllm_var", "sft_training", "dataset", "scripts", "evaluation"):
        for file in (ROOT / folder).rglob("*.py"):
            ast.parse(file.read_text(encoding="utf-8"), filename=str(file), feature_version=(3, 10))


def test_17_there_is_one_corruption_and_a_batch_holds_what_it_gives(make: Make) -> None:
    config, stream = make("forward_process.t_per=sample")
    row = next(iter(stream))
    batch = batch_of(config, [row])
    ids, response, noise, level = (torch.from_numpy(x)[None] for x in (row.ids, row.response, row.noise, row.level))
    made = corrupt(ids, response, noise, config.process_settings().level(level), mask_id=SPECIAL.mask, stop=SPECIAL.stop)
    assert torch.equal(batch["noisy"], made.noisy)
    assert torch.equal(batch["masked"], made.masked)
    places = (
        file for folder in ("dllm_var", "sft_training", "dataset", "scripts") for file in (ROOT / folder).rglob("*.py")
    )
    found = [file for file in places if "\ndef corrupt(" in file.read_text(encoding="utf-8")]
    assert found == [ROOT / "dllm_var" / "diffusion" / "corruption.py"]


def test_18_blocks_are_computed_again_in_the_backward_without_code_from_elsewhere(make: Make) -> None:
    config, stream = make()
    batch = batch_of(config, list(islice(stream, 2)))
    gradients = []
    for saving in (False, True):
        model = build_model(config).train()
        if saving:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = [0]
        model.model.transformer["blocks"][0].register_forward_pre_hook(lambda *_, n=calls: n.__setitem__(0, n[0] + 1))
        model(batch["noisy"], batch["real"]).logits.square().mean().backward()
        assert calls == [1 + saving]
        gradients.append([value.grad for value in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_19_every_command_of_the_readme_has_a_check() -> None:
    spec = importlib.util.spec_from_file_location("readme_checks", ROOT / "tests" / "test_readme.py")
    assert spec is not None
    assert spec.loader is not None
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    assert len(checks.commands()) >= 10
    assert set(checks.commands()) <= set(checks.COMMANDS)
