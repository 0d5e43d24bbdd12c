"""Checkpoint folders: equal bits after a round trip, and a name for everything that is wrong with one."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_var.model import checkpoint
from dllm_var.model.checkpoint import load_config, load_model, save_model, verify_checkpoint
from dllm_var.model.config import LLaDAConfig
from dllm_var.model.kv_store import KVStore
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.model.shards import canonical_name, file_hash

MakeModel = Callable[..., LLaDAModelLM]
INDEX = "model.safetensors.index.json"
WTE = "model.transformer.wte.weight"


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """A small saved checkpoint: one file, 21 tensors."""
    save_model(make_model(), tmp_path / "ck")
    return tmp_path / "ck"


@pytest.fixture
def sharded(make_model: MakeModel, tmp_path: Path) -> Path:
    """The same model in several shards."""
    save_model(make_model(), tmp_path / "shards", max_shard_bytes=20_000)
    return tmp_path / "shards"


def _equal_bits(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype
        and torch.equal(ours[name].contiguous().view(torch.uint8), theirs[name].contiguous().view(torch.uint8))
        for name in ours
    )


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _edit_json(path: Path, **changes: Any) -> None:
    fields = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value != "DROP"}), encoding="utf-8")


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_save_then_load_gives_equal_bits(
    make_model: MakeModel, tmp_path: Path, shard_bytes: int, dtype: torch.dtype, tied: bool
) -> None:
    model = make_model(weight_tying=tied, n_kv_heads=2).to(dtype)
    model.model.transformer["wte"].weight[0, 0] = float("nan")
    summary = save_model(model, tmp_path, max_shard_bytes=shard_bytes)
    again = load_model(tmp_path)
    assert _equal_bits(model, again)
    assert not again.training
    assert again.config.dtype == dtype
    assert all(value.requires_grad for value in again.parameters())
    assert summary == verify_checkpoint(tmp_path)
    assert summary.dtypes == (dtype,)
    assert summary.tensors == len(model.state_dict())
    assert summary.parameters == sum(value.numel() for value in model.parameters())
    assert summary.nbytes == sum(value.numel() * value.element_size() for value in model.parameters())


def test_a_checkpoint_of_others_keeps_its_bits_and_fields(
    golden_model: LLaDAModelLM, golden_folder: Path, golden_fields: dict[str, Any], tmp_path: Path
) -> None:
    save_model(golden_model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(golden_folder / "model.safetensors").keys()
    assert _equal_bits(load_model(tmp_path), golden_model)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for name, value in golden_fields.items():
        assert name in ("auto_map", "transformers_version") or written[name] == value
    assert written["dtype"] == written["torch_dtype"] == "float32"
    assert written["model_type"] == "llada"
    generation = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (256, 256)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_written_by_transformers_loads(make_model: MakeModel, tmp_path: Path, tied: bool) -> None:
    """The Trainer saves its checkpoints so."""
    model = make_model(weight_tying=tied).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert _equal_bits(load_model(tmp_path), model)
    assert _equal_bits(LLaDAModelLM.from_pretrained(tmp_path), model)


def test_dtype_can_be_chosen_on_loading_and_on_saving(folder: Path, make_model: MakeModel, tmp_path: Path) -> None:
    half = load_model(folder, dtype=torch.bfloat16)
    assert _equal_bits(half, make_model().to(torch.bfloat16))
    save_model(make_model(), tmp_path / "half", dtype=torch.bfloat16)
    assert _equal_bits(load_model(tmp_path / "half"), half)
    assert load_config(tmp_path / "half").dtype == torch.bfloat16


def test_shards_stay_under_the_limit_and_the_index_adds_up(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text(encoding="utf-8"))
    files = sorted(sharded.glob("*.safetensors"))
    assert len(files) > 2
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    sizes = [sum(value.nbytes for value in load_file(file).values()) for file in files]
    assert max(sizes) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes)


def test_shards_may_group_tensors_in_any_way(sharded: Path, make_model: MakeModel) -> None:
    """Released shards group by kind of tensor: here the names are dealt out to the files like cards."""
    files = sorted(sharded.glob("*.safetensors"))
    weights = {name: value for file in files for name, value in load_file(file).items()}
    dealt = {file: dict(list(weights.items())[i :: len(files)]) for i, file in enumerate(files)}
    for file, some in dealt.items():
        save_file(some, file)
    _edit_json(sharded / INDEX, weight_map={name: file.name for file, some in dealt.items() for name in some})
    assert _equal_bits(load_model(sharded), make_model())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "base_model.model.module._orig_mod."]
)
@pytest.mark.parametrize("bare", [False, True])
def test_prefixes_of_wrappers_and_a_bare_backbone_are_accepted(
    folder: Path, make_model: MakeModel, prefix: str, bare: bool
) -> None:
    _rewrite(folder, lambda w: {prefix + (name.removeprefix("model.") if bare else name): v for name, v in w.items()})
    assert _equal_bits(load_model(folder), make_model())


def test_names_of_parts_that_were_compiled_inside_are_accepted() -> None:
    assert canonical_name("model._orig_mod.transformer.wte.weight") == WTE
    assert canonical_name("module.model.transformer.blocks.0._orig_mod.q_proj.weight") == (
        "model.transformer.blocks.0.q_proj.weight"
    )
    assert canonical_name("lm_head.weight") == "lm_head.weight"


def test_a_compiled_or_adapted_model_is_saved_under_plain_names(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.model = torch.compile(model.model, backend="eager")
    assert any("_orig_mod" in name for name in model.state_dict())
    save_model(model, tmp_path)
    assert _equal_bits(load_model(tmp_path), make_model())


def test_extra_state_is_dropped(folder: Path, make_model: MakeModel) -> None:
    extra = {"model.transformer.blocks.0.q_proj._extra_state": torch.zeros(3, dtype=torch.uint8)}
    _rewrite(folder, lambda w: w | extra)
    assert _equal_bits(load_model(folder), make_model())


def test_logits_at_far_positions_are_right_although_loading_began_on_the_meta_device(
    folder: Path, make_model: MakeModel
) -> None:
    """A rotary table kept in a buffer would come back as garbage, and short positions might hide it."""
    ids, far = torch.tensor([[1, 39, 2, 39]]), torch.tensor([[0, 1_000, 30_000, 30_001]])
    expected = make_model()(ids, positions=far).logits
    for loaded in (load_model(folder), LLaDAModelLM.from_pretrained(folder).eval()):
        assert torch.equal(loaded(ids, positions=far).logits, expected)
        kv = KVStore(loaded.config, 1, 4, 0, torch.float32, "cpu")
        assert torch.equal(loaded(ids, positions=far, kv=kv, slots=torch.arange(4)[None]).logits, expected)


def test_weights_outlive_the_files_they_came_from(folder: Path, make_model: MakeModel) -> None:
    model = load_model(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert _equal_bits(model, make_model())


def test_loading_draws_no_random_number_and_leaves_torch_as_it_was(folder: Path) -> None:
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.empty(0).device
    load_model(folder, dtype=torch.bfloat16)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.get_default_dtype(), torch.empty(0).device)


# --- what is wrong with a folder -------------------------------------------------------------------------------------


def test_a_folder_that_is_none_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        load_model(tmp_path / "file")
    with pytest.raises(ValueError, match=r"not a checkpoint folder: it has no config\.json"):
        load_model(tmp_path)


def test_a_folder_without_weights_is_said_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(folder)


def test_pickles_are_refused_and_never_opened(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"only as pickles \(pytorch_model\.bin\)"):
        load_model(folder)
    assert not (tmp_path / "sprung").exists()


def test_remote_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_llada.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')", encoding="utf-8")
    (folder / "configuration_llada.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')", encoding="utf-8")
    _edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"})
    load_model(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": "DROP"}, r"config\.json: config\.json lacks n_kv_heads"),
        ({"block_type": "sequential"}, r"config\.json: config field block_type='sequential' is not supported"),
        ({"model_type": "Dream"}, "model_type='Dream' is not supported"),
    ],
)
def test_a_bad_config_is_named_with_its_file(folder: Path, changes: dict[str, Any], message: str) -> None:
    _edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_a_config_that_is_no_json_object_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json (cannot be read as JSON|must hold a JSON object)"):
        load_model(folder)


def test_missing_tensors_are_named_and_counted(folder: Path) -> None:
    _rewrite(folder, lambda w: {name: value for name, value in w.items() if name != WTE})
    with pytest.raises(ValueError, match=rf"lacks 1 tensor\(s\) of the model: {WTE}\."):
        load_model(folder)
    _rewrite(folder, lambda w: {name: value for name, value in w.items() if ".blocks.1." not in name})
    with pytest.raises(ValueError, match=r"lacks 10 tensor\(s\).*blocks\.1\.attn_norm\.weight.*, … \(10 in all\)"):
        load_model(folder)


def test_surplus_tensors_are_named_and_counted(folder: Path) -> None:
    _rewrite(folder, lambda w: w | {"model.transformer.blocks.0.q_proj.lora_A.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"holds 1 tensor\(s\) the model has not: .*q_proj\.lora_A\.weight"):
        load_model(folder)


def test_misshaped_tensors_are_named_with_both_shapes(folder: Path) -> None:
    _rewrite(folder, lambda w: w | {WTE: torch.zeros(41, 32)})
    with pytest.raises(ValueError, match=rf"{WTE} is \[41, 32\], the config asks for \[40, 32\]"):
        load_model(folder)


def test_missing_and_surplus_are_told_together(folder: Path) -> None:
    _rewrite(folder, lambda w: {name.replace("wte", "embed"): value for name, value in w.items()})
    with pytest.raises(ValueError, match=r"lacks 1 .*wte\.weight; it holds 1 .*embed\.weight"):
        load_model(folder)


def test_a_tensor_given_twice_is_named_with_both_places(folder: Path) -> None:
    _rewrite(folder, lambda w: w | {f"module.{WTE}": w[WTE].clone()})
    with pytest.raises(ValueError, match=rf"holds {WTE} twice: as .* in model\.safetensors and as .* in model\.safetensors"):
        load_model(folder)


def test_foreign_dtypes_are_named(folder: Path) -> None:
    _rewrite(folder, lambda w: w | {WTE: w[WTE].double()})
    with pytest.raises(ValueError, match=rf"not float32, bfloat16 or float16: {WTE} \(F64\)"):
        load_model(folder)


def test_several_dtypes_need_a_choice(folder: Path) -> None:
    _rewrite(folder, lambda w: w | {WTE: w[WTE].bfloat16()})
    with pytest.raises(ValueError, match=r"several dtypes \(torch\.bfloat16, torch\.float32\).*dtype="):
        load_model(folder)
    assert load_model(folder, dtype=torch.float32).dtype == torch.float32


def test_a_truncated_file_is_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_model(folder)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    next(sharded.glob("model-00002-of-*")).unlink()
    with pytest.raises(ValueError, match=r"names 1 shard\(s\) that are not there: model-00002-of-"):
        load_model(sharded)


def test_shards_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(ValueError, match="holds shards but no"):
        load_model(sharded)


def test_an_index_that_disagrees_with_its_shards_is_refused_by_name(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text(encoding="utf-8"))["weight_map"]
    home = weight_map[WTE]
    other = next(file for file in weight_map.values() if file != home)
    _edit_json(sharded / INDEX, weight_map={**weight_map, WTE: other})
    with pytest.raises(ValueError, match=rf"{home} holds {WTE}, which .* does not say|says that {other} holds {WTE}, but"):
        load_model(sharded)
    _edit_json(sharded / INDEX, weight_map={**weight_map, "model.transformer.ghost": home})
    with pytest.raises(ValueError, match=rf"says that {home} holds model\.transformer\.ghost, but it does not"):
        load_model(sharded)
    _edit_json(sharded / INDEX, weight_map={name: file for name, file in weight_map.items() if name != WTE})
    with pytest.raises(ValueError, match=rf"{home} holds {WTE}, which .* does not say"):
        load_model(sharded)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/model.safetensors", "pytorch_model.bin", "", 3])
def test_an_index_cannot_point_outside_its_folder(sharded: Path, shard: Any) -> None:
    _edit_json(sharded / INDEX, weight_map={WTE: shard})
    with pytest.raises(ValueError, match=r"weight_map\[.*\]=.* must be the name of a safetensors file"):
        load_model(sharded)


def test_an_index_without_a_weight_map_is_refused(sharded: Path) -> None:
    _edit_json(sharded / INDEX, weight_map="DROP")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_model(sharded)


def test_a_wrong_total_size_fails_the_verification(sharded: Path) -> None:
    _edit_json(sharded / INDEX, metadata={"total_size": 5})
    with pytest.raises(ValueError, match="says total_size=5, but the shards hold"):
        verify_checkpoint(sharded)


def test_what_fp8_layers_left_in_a_shard_does_not_fail_the_verification(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text(encoding="utf-8"))
    shard, name = index["weight_map"][WTE], "model.transformer.blocks.0.q_proj._extra_state"
    extra = torch.zeros(3, dtype=torch.uint8)
    save_file({**load_file(sharded / shard), name: extra}, sharded / shard, metadata={"format": "pt"})
    size = index["metadata"]["total_size"] + extra.nbytes
    _edit_json(sharded / INDEX, weight_map=index["weight_map"] | {name: shard}, metadata={"total_size": size})
    assert verify_checkpoint(sharded).nbytes == size - extra.nbytes


def test_single_file_and_index_together_are_refused(sharded: Path, folder: Path) -> None:
    (sharded / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds both"):
        load_model(sharded)


def test_too_little_memory_is_one_clear_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"needs 0\.0 GB of memory as torch\.float32, but only 0\.0 GB are free on cpu: "):
        load_model(folder)
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: None)
    load_model(folder)


def test_files_that_the_system_remembers_are_free_memory_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CGROUP", tmp_path)
    statistics = "anon 500\nactive_file 1000\ninactive_file 2000"
    for name, content in (("memory.max", "4000"), ("memory.current", "3500"), ("memory.stat", statistics)):
        (tmp_path / name).write_text(f"{content}\n", encoding="ascii")
    assert checkpoint.free_memory(torch.device("cpu")) == 3500
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert checkpoint.free_memory(torch.device("cpu")) != 3500


def test_free_memory_is_known_here_or_said_to_be_unknown() -> None:
    free = checkpoint.free_memory(torch.device("cpu"))
    assert free is None or free > 2**20
    assert checkpoint.free_memory(torch.device("meta")) is None


# --- saving ----------------------------------------------------------------------------------------------------------


def test_saving_replaces_old_weights_and_leaves_other_files(sharded: Path, make_model: MakeModel) -> None:
    (sharded / "tokenizer.json").write_text("{}", encoding="utf-8")
    other = make_model(seed=1)
    save_model(other, sharded)
    assert sorted(path.name for path in sharded.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert _equal_bits(load_model(sharded), other)


def test_saving_into_the_folder_a_model_came_from_is_safe(folder: Path, make_model: MakeModel) -> None:
    save_model(load_model(folder), folder, max_shard_bytes=20_000)
    assert _equal_bits(load_model(folder), make_model())


def test_a_save_that_fails_while_writing_leaves_the_old_checkpoint(
    sharded: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full_disk(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("No space left on device")
        save_file(*args, **kwargs)

    before = sorted(path.name for path in sharded.iterdir())
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(make_model(seed=1), sharded, max_shard_bytes=20_000)
    assert sorted(path.name for path in sharded.iterdir()) == before
    assert _equal_bits(load_model(sharded), make_model())


@pytest.mark.parametrize("crash_at", range(1, 8))
def test_a_save_that_dies_while_replacing_leaves_nothing_that_loads(
    sharded: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    calls, replace = [], checkpoint.os.replace

    def dies(*args: Any) -> None:
        calls.append(args)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(checkpoint.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        save_model(make_model(seed=1), sharded, max_shard_bytes=20_000)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(sharded)


def test_weights_that_read_back_differently_are_an_error(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad_disk(weights: dict[str, Tensor], path: Path, **more: Any) -> None:
        save_file({name: value + (name == WTE) for name, value in weights.items()}, path, **more)

    monkeypatch.setattr(checkpoint, "save_file", bad_disk)
    with pytest.raises(ValueError, match=f"{WTE} was not written as it is in memory"):
        save_model(make_model(), tmp_path)
    with pytest.raises(ValueError, match="not a checkpoint folder"):
        load_model(tmp_path)


def test_a_model_that_is_not_its_configs_is_refused_before_anything_is_written(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model()
    model.model.transformer["blocks"][0].q_proj.adapter = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"not those of its config: .*q_proj\.adapter\.weight"):
        save_model(model, tmp_path / "ck")
    assert not (tmp_path / "ck").exists()
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be 1 or more"):
        save_model(make_model(), tmp_path / "ck", max_shard_bytes=0)


def test_further_config_fields_are_written(make_model: MakeModel, tmp_path: Path) -> None:
    save_model(make_model(), tmp_path, config_fields={"eot_token_id": 37})
    assert load_config(tmp_path).eot_token_id == 37
    assert isinstance(load_config(tmp_path), LLaDAConfig)


def test_written_files_are_readable_by_those_who_may_read_the_folder(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_the_hash_of_a_file_is_that_of_all_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000  # more than is read at once
    (tmp_path / "some.bin").write_bytes(content)
    assert file_hash(tmp_path / "some.bin") == hashlib.sha256(content).hexdigest()
