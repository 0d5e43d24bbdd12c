"""FP8: how far it is from bf16, what it covers, and that checkpoints, resuming and recomputation do not notice it."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from dllm_var.diffusion.objective import masked_cross_entropy
from dllm_var.model.checkpoint import load_config, load_model, save_model
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.model.speed import compile_network
from dllm_var.pretrained import resolve_folder
from sft_training import build
from sft_training.config import Fp8Section, SftConfig
from sft_training.overrides import compose_settings
from sft_training.precision import apply_fp8, check_fp8, covered_layers
from sft_training.records import read_metrics
from sft_training.sft import prepare, train

Settings = Callable[..., SftConfig]
LENGTHS = [3 + (5 * i) % 19 for i in range(60)]
MATRICES = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")

pytestmark = pytest.mark.filterwarnings("ignore:FP8 on a CPU is for testing")


def losses(config: SftConfig) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(Path(config.output_dir)) if "loss" in line}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tiny(dtype: torch.dtype, **fp8: Any) -> LLaDAModelLM:
    model = load_model(resolve_folder("tiny"), dtype).train()
    if fp8:
        apply_fp8(model, **fp8)
    return model


def gradients(model: LLaDAModelLM) -> tuple[float, Tensor]:
    """Loss and all gradients in one row, as the Trainer computes them: autocast with float32 weights, none with bfloat16."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, 440, (2, 64), generator=generator)
    masked = torch.rand(2, 64, generator=generator) < 0.5
    targets = clean[masked]
    share = torch.full((len(targets),), 1 / len(targets))
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.float32):
        loss = model(
            clean.masked_fill(masked, model.config.mask_token_id), logits_for=masked,
            project=lambda hidden, head: masked_cross_entropy(hidden, head, targets, share)[0],
        ).logits  # fmt: skip
    loss.backward()
    return loss.item(), torch.cat([value.grad.double().flatten() for value in model.parameters()])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_fp8_point_where_those_in_bf16_do(dtype: torch.dtype, recipe: str) -> None:
    torch.manual_seed(0)  # new weights: those of the bundled model would be another matter after every training of it
    model = LLaDAModelLM(load_config(resolve_folder("tiny"))).to(dtype).train()
    other = deepcopy(model)
    apply_fp8(other, "torchao", recipe)
    (plain, wanted), (loss, found) = gradients(model), gradients(other)
    assert loss == pytest.approx(plain, rel=0.01)
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.99
    error = (found - wanted).norm() / wanted.norm()
    assert 0.02 < error < 0.15  # bf16 itself is 0.01 from float32: less than 0.02 would not be FP8


@pytest.mark.parametrize("recipe", RECIPES)
def test_real_and_emulated_products_agree(recipe: str) -> None:
    found = []
    for emulate in (False, True):
        layer = tiny(torch.bfloat16, backend="torchao", recipe=recipe, emulate=emulate).model.transformer.blocks[0].ff_out
        x = torch.randn(32, 512, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        found.append((y.double(), x.grad.double(), layer.weight.grad.double()))
    for real, emulated in zip(*found, strict=True):
        assert (real - emulated).norm() < 0.01 * emulated.norm()


def test_the_matrices_of_the_blocks_are_covered_and_neither_the_head_nor_a_name(start_folder: Path) -> None:
    plain, model = (LLaDAModelLM(load_config(start_folder)) for _ in range(2))
    apply_fp8(model, "torchao", "tensorwise")
    wanted = [f"model.transformer.blocks.{layer}.{name}" for layer in range(2) for name in MATRICES]
    assert model.fp8_report == {"backend": "torchao", "recipe": "tensorwise", "emulate": False, "layers": wanted}
    swapped = [name for name, layer in model.named_modules() if type(layer).__name__ == "Float8Linear"]
    assert sorted(swapped) == sorted(wanted)
    assert type(model.model.transformer.ff_out) is nn.Linear
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_a_model_whose_sides_do_not_fit_is_refused_by_name(start_folder: Path) -> None:
    shape = load_config(start_folder)
    shape.mlp_hidden_size = 40
    with pytest.raises(ValueError, match=r"blocks\.0\.ff_proj maps 32 to 40, but FP8 products need multiples of 16"):
        check_fp8(Fp8Section("torchao"), shape, on_cpu=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.ff_proj"):
        apply_fp8(LLaDAModelLM(shape), "torchao", "tensorwise")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("precision.fp8.backend=msamp",), r"precision\.fp8\.backend='msamp': choose one of torchao, te"),
        (
            ("precision.fp8.recipe=delayed",),
            r"precision\.fp8\.recipe='delayed': with backend=torchao choose one of tensorwise",
        ),
        (("precision.fp8.backend=te", "precision.fp8.recipe=rowwise"), "with backend=te choose one of tensorwise"),
        (("precision.fp8.backend=te", "precision.fp8.emulate=true"), r"emulate=true: only backend=torchao"),
        (("precision.fp8.backend=te", "training.compile=true"), r"training\.compile=true with precision\.fp8\.backend=te"),
        (("precision.dtype=fp32",), r"precision\.dtype='fp32' with FP8: .* set precision\.dtype=bf16"),
        (("adapter=qlora",), r"adapter\.kind='qlora' with precision\.fp8\.backend=torchao: only adapter=lora goes with FP8"),
        (("adapter=lora", "precision.fp8.backend=te"), r"only with backend=torchao"),
        (("packing.max_length=50", "training.local_batch_size=1"), r"packing\.max_length=50 .* take max_length=64"),
        (("precision.fp8.scale=1",), r"precision\.fp8\.scale does not exist.*backend, recipe, emulate"),
    ],
)
def test_settings_that_contradict_fp8_are_refused(options: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compose_settings(["dataset.files=any", "precision=fp8", *options])


@pytest.mark.parametrize("group", ["auto", "bf16", "fp32"])
def test_the_other_precisions_have_no_fp8(group: str) -> None:
    assert compose_settings(["dataset.files=any", f"precision={group}"]).precision.fp8.backend is None


def test_a_machine_that_cannot_is_told_so_before_a_model_is_built(
    settings: Settings, write_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_training.sft.build_model", lambda config: pytest.fail("a model was built"))
    config = settings(write_samples(LENGTHS), "precision=fp8")
    shape, fp8 = load_config(Path(config.model.config)), config.precision.fp8
    with pytest.raises(ValueError, match=r"backend=te needs an NVIDIA GPU: on a CPU take precision\.fp8\.backend=torchao"):
        prepare(settings(write_samples(LENGTHS), "precision=fp8", "precision.fp8.backend=te"))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"backend=torchao needs torchao\.float8, which does not load .*pip install"):
        prepare(config)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    for capability, recipe, needed in [((8, 0), "tensorwise", "8.9"), ((8, 9), "rowwise", "9.0")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        with pytest.raises(
            ValueError, match=rf"recipe={recipe} needs a GPU of compute capability {needed} .* A100 has 8\.\d"
        ):
            check_fp8(replace(fp8, recipe=recipe), shape, on_cpu=False)
        check_fp8(replace(fp8, recipe=recipe, emulate=True), shape, on_cpu=False)
    check_fp8(fp8, shape, on_cpu=False)  # 8.9 is enough for tensorwise
    with pytest.raises(ValueError, match=r"needs transformer_engine\.pytorch, which does not load \(.*\): pip install"):
        check_fp8(replace(fp8, backend="te"), shape, on_cpu=False)


def test_fp8_on_a_cpu_is_said_to_be_for_testing(start_folder: Path) -> None:
    with pytest.warns(UserWarning, match="FP8 on a CPU is for testing"):
        check_fp8(Fp8Section("torchao"), load_config(start_folder), on_cpu=True)


def test_a_run_in_fp8_follows_bf16_and_exports_a_plain_model(settings: Settings, write_samples: Any) -> None:
    files, steps = write_samples(LENGTHS * 3), "training.max_steps=16"
    plain, config = (settings(files, f"precision={name}", steps, output=name) for name in ("bf16", "fp8"))
    train(plain)
    trainer = train(config)
    assert losses(config) == pytest.approx(losses(plain), rel=0.01)
    assert losses(config) != losses(plain)
    facts = json.loads((Path(config.output_dir) / "run.json").read_text(encoding="utf-8"))
    assert facts["autocast"] == "bf16"
    assert facts["fp8"] == trainer.network.fp8_report
    assert len(facts["fp8"]["layers"]) == 14
    assert json.loads((Path(plain.output_dir) / "run.json").read_text(encoding="utf-8"))["fp8"] is None
    again = load_model(Path(config.output_dir) / "final")
    ids = torch.arange(97, 120)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, LLaDAModelLM.forward(trainer.network.eval(), ids).logits)
        trained = LLaDAModelLM.forward(trainer.network.train(), ids.repeat(16, 1)).logits
    assert not torch.equal(trained[0], again(ids).logits[0])


def test_a_resumed_run_in_fp8_equals_one_that_never_stopped(settings: Settings, write_samples: Any) -> None:
    more = ("precision.fp8.recipe=rowwise", "training.gradient_checkpointing=true", "training.save_steps=2")
    options = ("precision=fp8", *more, "training.max_steps=3")
    whole, again = (settings(write_samples(LENGTHS), *options, output=name) for name in ("whole", "again"))
    train(whole)
    Path(again.output_dir).mkdir()
    shutil.copytree(Path(whole.output_dir) / "checkpoint-2", Path(again.output_dir) / "checkpoint-2")
    train(again)
    assert list(losses(again)) == [3]
    assert losses(again)[3] == losses(whole)[3]
    final, wanted = (load_model(Path(config.output_dir) / "final").state_dict() for config in (again, whole))
    assert equal(final, wanted)


def test_the_network_compiles_into_one_graph_with_the_same_gradients() -> None:
    shape = load_config(resolve_folder("tiny"))
    shape.n_layers, found = 1, []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = LLaDAModelLM(shape).train()
        apply_fp8(model, "torchao", "tensorwise")
        if compiled:  # up to the generation of code, which takes minutes
            model.model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        found.append(gradients(model))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_the_compiler_gets_a_cache_of_its_own_although_torchao_names_the_shared_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for named, kept in ((default_cache_dir(), False), ("/mine", True)):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named)
        compile_network(LLaDAModelLM(load_config(resolve_folder("tiny"))), dynamic=False)
        assert (os.environ["TORCHINDUCTOR_CACHE_DIR"] == named) is kept


def test_adapters_go_on_top_of_frozen_layers_in_fp8(
    settings: Settings, write_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "FIRST_LOOK", 0)  # these are ids of another tokenizer than that of "tiny"
    config = settings(
        write_samples(LENGTHS), "precision=fp8", "adapter=lora", "adapter.r=4", "model=tiny", "model.config=null",
        "model.tokenizer=null", "training.max_steps=1",
    )  # fmt: skip
    trainer = train(config)
    assert len(trainer.network.fp8_report["layers"]) == 7 * 6
    assert len(losses(config)) == 1
    trained = {name.rpartition(".lora_")[0] for name, value in trainer.network.named_parameters() if value.requires_grad}
    assert len(trained) == 3 * 6


def test_recomputing_blocks_gives_the_same_gradients() -> None:
    plain, saving = (tiny(torch.float32, backend="torchao", recipe="tensorwise") for _ in range(2))
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradients(plain)[1], gradients(saving)[1])


class FakeLinear(nn.Module):
    """What Transformer Engine's layer looks like from outside; the kernel is a plain product in the recipe's name."""

    calls: list[tuple[bool, Any]] = []  # noqa: RUF012
    active: tuple[bool, Any] = (False, None)

    def __init__(self, in_features: int, out_features: int, *, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        FakeLinear.calls.append(FakeLinear.active)
        return nn.functional.linear(x, self.weight)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pytest.fail("an extra state was loaded")


@contextmanager
def fake_autocast(enabled: bool = True, recipe: Any = None) -> Iterator[None]:
    FakeLinear.active = (enabled, recipe)
    yield
    FakeLinear.active = (False, None)


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> type:
    """A stand-in for the package, which needs a GPU even to be imported."""
    names = (
        "transformer_engine",
        "transformer_engine.pytorch",
        "transformer_engine.common",
        "transformer_engine.common.recipe",
    )
    modules = {name: ModuleType(name) for name in names}
    modules["transformer_engine.pytorch"].Linear = FakeLinear
    modules["transformer_engine.pytorch"].autocast = fake_autocast
    scaling = type("Float8CurrentScaling", (), {})
    modules["transformer_engine.common.recipe"].Float8CurrentScaling = scaling
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(FakeLinear, "calls", [])
    return scaling


def test_transformer_engine_shares_the_weights_and_every_training_product_runs_in_its_context(
    transformer_engine: type, tmp_path: Path
) -> None:
    plain = tiny(torch.bfloat16)
    model = tiny(torch.bfloat16)
    before = dict(model.named_parameters())
    apply_fp8(model, "te", "tensorwise")
    assert model.fp8_report["layers"] == covered_layers(plain)
    assert all(value is before[name] for name, value in model.named_parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(gradients(model)[1], gradients(plain)[1])  # the stand-in computes in bf16
    recomputed = 2 * 7 * 6  # forward and again in the backward, the last block's last product aside if it is not needed
    assert recomputed - 6 <= len(FakeLinear.calls) <= recomputed
    assert all(enabled and isinstance(recipe, transformer_engine) for enabled, recipe in FakeLinear.calls)
    FakeLinear.calls.clear()
    model.eval()(torch.arange(3, 9)[None])
    assert len(FakeLinear.calls) == 7 * 6
    assert not any(enabled for enabled, _ in FakeLinear.calls)
    save_model(model, tmp_path)
    saved = load_model(tmp_path)
    assert saved.dtype == torch.bfloat16
    assert equal(saved.state_dict(), plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
