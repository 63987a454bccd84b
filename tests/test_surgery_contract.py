"""The contract of a swapped model: parameters, undo, copies, pickles, autocast, gradients,
compiling, image sizes, choice of layers, and what is an error.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import (
    Gated,
    Model,
    PlainAttention,
    PlainNetwork,
    Sharper,
    build,
    example_of,
    gradients,
    hf,
    images,
    one_thread,
    registered,
    run,
    same,
    snapshot,
    timm_vit,
)
from networks import awaken as awake
from torch import Tensor, nn

import mitaswap
from mitaswap import MitaswapError, Recipe, TokenLayout
from mitaswap.errors import SwapError
from mitaswap.mechanisms import SiteShape
from mitaswap.surgery import Handle, recipe_of, swap, swapped_sites, walk

EACH_ROUTE = ["timm-vit", "hf-vit", "hand-made"]
SPECS = ["standard", "linear", "agent(n=4)", "mita(m=4,k=4)"]


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def mechanisms_of_the_tests() -> Iterator[None]:
    with registered(gated=Gated, sharper=Sharper):
        yield


def any_size(**kwargs: Any) -> Model:
    """A timm network for images of every size."""
    torch.manual_seed(0)
    return awake(timm_vit(dynamic_img_size=True, **kwargs)).eval()


# ------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", EACH_ROUTE)
def test_parameters_keep_their_names_and_storages(name: str, spec: str) -> None:
    model, example = build(name), example_of(name)
    before = {key: value.data_ptr() for key, value in model.state_dict(keep_vars=True).items()}
    with swap(model, spec, example=example):
        after = {key: value.data_ptr() for key, value in model.state_dict(keep_vars=True).items()}
    assert list(after.items()) == list(before.items())


@pytest.mark.parametrize("name", EACH_ROUTE)
def test_learned_extras_stand_beside_the_parameters(name: str) -> None:
    model, example = build(name), example_of(name)
    before = {key: value.data_ptr() for key, value in model.state_dict(keep_vars=True).items()}
    sites = walk(model, example)
    handle = swap(model, "gated", example=example)
    state = model.state_dict(keep_vars=True)
    extras = {f"{site.path}.mitaswap.gate" for site in sites}
    assert state.keys() - before.keys() == extras
    assert {key: value.data_ptr() for key, value in state.items() if key in before} == before
    assert extras <= {key for key, _ in model.named_parameters()}, "an optimiser would miss them"

    moved = {key: value + 0.01 for key, value in model.state_dict().items()}
    model.load_state_dict(moved)  # strict: the extras travel with the weights
    grads = gradients(model, example)
    assert all(torch.is_nonzero(grads[key].abs().sum()) for key in extras)
    handle.undo()
    assert model.state_dict().keys() == before.keys()


def test_extras_take_the_dtype_of_their_layer() -> None:
    model = build("timm-vit").double()
    swap(model, "gated")
    assert all(part.gate.dtype == torch.float64 for part in swapped_sites(model).values())
    assert run(model, images().double()).dtype == torch.float64


# ------------------------------------------------------------------------------------------- undo


def test_snapshot_sees_what_a_swap_could_leave_behind() -> None:
    """The negative control of every "leaves no trace" here."""
    model = build("hf-vit")
    attention: Any = model.get_submodule("vit.layers.0.attention")
    own = attention.config

    def hooked() -> Callable[[], None]:
        return attention.register_forward_hook(lambda *_: None).remove

    def attribute() -> Callable[[], None]:
        attention.left = 1
        return lambda: delattr(attention, "left")

    def child() -> Callable[[], None]:
        attention.left = nn.Identity()
        return lambda: delattr(attention, "left")

    def config() -> Callable[[], None]:
        attention.config = copy.copy(own)
        return lambda: setattr(attention, "config", own)

    def mode() -> Callable[[], None]:
        attention.train()
        return lambda: attention.eval() and None

    def kind() -> Callable[[], None]:
        original = type(attention)
        attention.__class__ = type("Other", (original,), {})
        return lambda: setattr(attention, "__class__", original)

    before = snapshot(model)
    for change in (hooked, attribute, child, config, mode, kind):
        put_back = change()
        assert snapshot(model) != before, change.__name__
        put_back()
        assert snapshot(model) == before, change.__name__


@pytest.mark.parametrize("name", [*EACH_ROUTE, "timm-volo"])
def test_undo_is_exact_also_after_an_exception(name: str) -> None:
    model, example = build(name), example_of(name)
    run(model, example)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), swap(model, "gated", example=example) as swapped:
        assert swapped is model
        run(model, example)
        assert snapshot(model) != before
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_handle_undoes_once_and_revert_says_when_there_is_nothing() -> None:
    model = build("timm-vit")
    handle = swap(model, "linear")
    assert [site.path for site in handle.sites] == ["blocks.0.attn", "blocks.1.attn"]
    handle.undo()
    before = snapshot(model)
    handle.undo()
    assert snapshot(model) == before
    with pytest.raises(SwapError, match="nothing is swapped in this VisionTransformer"):
        mitaswap.revert(model)


class BreaksAtTheSecondSite(Gated):
    """Fails while the mechanisms are built."""

    built = 0

    def build(self, site: SiteShape) -> None:
        type(self).built += 1
        if self.built == 2:
            raise RuntimeError("no memory for site 2")


class BreaksWhenMoved(Gated):
    """Fails while the mechanisms are installed."""

    moved = 0

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        type(self).moved += 1
        if self.moved == self.at:
            raise RuntimeError("no memory on the device")
        return super()._apply(*args, **kwargs)

    at = 1


class BreaksWhenMovedSecond(BreaksWhenMoved):
    """The same after one site is done."""

    moved, at = 0, 3


class BreaksInUse(Gated):
    """Fails in the forward that verifies the swap."""

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        raise RuntimeError("kernel not found")


@pytest.mark.parametrize("name", EACH_ROUTE)
@pytest.mark.parametrize(
    "broken",
    [BreaksAtTheSecondSite, BreaksWhenMoved, BreaksWhenMovedSecond, BreaksInUse],
    ids=["built", "installed-first", "installed-second", "verified"],
)
def test_a_swap_that_fails_half_way_leaves_no_trace(name: str, broken: type[Gated]) -> None:
    model, example = build(name), example_of(name)
    run(model, example)
    model.train()
    before = snapshot(model)
    fresh = type(broken.__name__, (broken,), {"moved": 0, "built": 0})
    with registered(broken=fresh), pytest.raises(RuntimeError, match=r"no memory|kernel not found"):
        swap(model, "broken", example=example)
    assert snapshot(model) == before


# ------------------------------------------------------------------------------- copies and pickles


@pytest.mark.parametrize("spec", ["gated", "mita(m=4,k=4)"])
@pytest.mark.parametrize("name", EACH_ROUTE)
def test_a_copy_is_independent(name: str, spec: str) -> None:
    model, example = build(name), example_of(name)
    swap(model, spec, example=example)
    twin = copy.deepcopy(model)
    assert swapped_sites(twin).keys() == swapped_sites(model).keys()
    with torch.no_grad():
        output = run(model, example)
        assert torch.equal(run(twin, example), output)
        for weight in twin.parameters():
            weight.mul_(1.5)
        assert torch.equal(run(model, example), output), "the original uses the copy's weights"
        changed = run(twin, example)
        assert not torch.equal(changed, output), "the copy uses the original's weights"
        mitaswap.revert(model)
        assert torch.equal(run(twin, example), changed)
        mitaswap.revert(twin)
        with swap(model, "standard", example=example), torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)
            assert torch.equal(run(twin, example), run(model, example))
    assert snapshot(twin)["modules"].keys() == snapshot(model)["modules"].keys()


def test_a_copy_tracks_its_own_grid() -> None:
    model = any_size()
    swap(model, "mita(m=4,k=4)")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        output = run(model, images())
        run(twin, images(32, 96))
    trackers = [m.get_submodule("blocks.0.attn")._mitaswap.tracker for m in (model, twin)]
    assert [tracker.grid for tracker in trackers] == [(4, 4), (2, 6)]
    assert torch.equal(run(model, images()), output)
    mitaswap.revert(twin)
    hooks = [h for m in twin.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks


@pytest.mark.parametrize("name", [*EACH_ROUTE, "timm-volo", "hf-data2vec"])
def test_pickle_in_this_process(name: str) -> None:
    model, example = build(name), example_of(name)
    swap(model, "mita(m=4,k=4)", example=example)
    with torch.no_grad():
        output = run(model, example)
        for again in (pickle.loads(pickle.dumps(model)), saved_and_loaded(model)):
            assert torch.equal(run(again, example), output)
            mitaswap.revert(again)
            assert not swapped_sites(again)


def saved_and_loaded(model: nn.Module) -> Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


READER = """
import sys, torch
model_output_pairs = torch.load(sys.argv[1], weights_only=False)
for model, example, output in model_output_pairs:
    again = model(**example) if isinstance(example, dict) else model(example)
    again = getattr(again, "logits", again)
    assert torch.equal(again, output), "another output"
    assert any("mitaswap" in name for name, _ in model.named_modules()), "not swapped any more"
print(len(model_output_pairs), "read")
"""


def test_torch_load_in_a_process_that_has_imported_nothing_else(tmp_path: Path) -> None:
    pairs = []
    for name in ("timm-vit", "hf-vit"):
        model, example = build(name), example_of(name)
        swap(model, "mita(m=4,k=4)", example=example)
        with torch.no_grad():
            pairs.append((model, example, run(model, example)))
    torch.save(pairs, tmp_path / "models.pt")
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "models.pt")],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(Path(mitaswap.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "2 read", done.stderr


# ------------------------------------------------------------------------- gradients and precision


@pytest.mark.parametrize(
    "name", [*EACH_ROUTE, "timm-beit", "timm-eva02", "hf-beit-relative", "hf-dinov3"]
)
def test_gradients_of_standard_are_those_of_the_untouched_model(name: str) -> None:
    model, example = build(name).train(), example_of(name)
    untouched = gradients(model, example)
    assert any(g is not None and g.abs().sum() > 0 for g in untouched.values())
    with swap(model, "standard", example=example):
        assert same(gradients(model, example), untouched)
    with swap(model, "sharper", example=example):
        assert not same(gradients(model, example), untouched)


def checkpointed(model: Model) -> Model:
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("spec", ["standard", "gated", "mita(m=4,k=4)"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-eva02", "hf-vit", "hf-dinov2-registers"])
def test_gradient_checkpointing_changes_nothing(name: str, spec: str) -> None:
    model, example = build(name).train(), example_of(name)
    swap(model, spec, example=example)
    plain = gradients(model, example)
    calls: list[str] = []
    with Handle(model, []).observe(lambda path, *_: calls.append(path)):
        again = gradients(checkpointed(model), example)
    assert len(calls) == 4, "two layers, forward and recomputed"
    assert same(again, plain)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", EACH_ROUTE)
def test_autocast_bfloat16(name: str, spec: str) -> None:
    model, example = build(name), example_of(name)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            untouched = run(model, example)
        with swap(model, spec, example=example):
            with torch.autocast("cpu", torch.bfloat16):
                output = run(model, example)
            exact = run(model, example)
    assert output.dtype == untouched.dtype
    assert output.isfinite().all()
    if spec == "standard":
        assert torch.equal(output, untouched)
    # routing is a choice, so bfloat16 may move single tokens to another expert
    assert (output.float() - exact).abs().mean() < 0.15 * exact.abs().max()


@pytest.mark.parametrize("name", EACH_ROUTE)
def test_train_and_eval_mode_are_kept(name: str) -> None:
    model, example = build(name), example_of(name)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    modes = {path: module.training for path, module in model.named_modules()}
    with swap(model, "gated", example=example):
        swapped = {path: m.training for path, m in model.named_modules() if path in modes}
        assert swapped == modes
        for path, part in swapped_sites(model).items():
            assert part.training == modes[path]
        assert all(part.eval() is part for part in swapped_sites(model.eval()).values())
        assert not any(part.training for part in swapped_sites(model).values())


# -------------------------------------------------------------------------------------- compiling


@pytest.fixture
def compiler() -> Iterator[Callable[..., Any]]:
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["timm", "hf"])
def test_compiles_whole_at_several_image_sizes(
    name: str, spec: str, compiler: Callable[..., Any]
) -> None:
    model = any_size(depth=1) if name == "timm" else awake(hf("Dinov2", num_hidden_layers=1)).eval()
    swap(model, spec)
    compiled = compiler(model)
    for size in ((64, 64), (32, 96), (96, 80)):
        with torch.no_grad():
            expected = run(model, images(*size))
            torch.testing.assert_close(run(compiled, images(*size)), expected)


@pytest.mark.usefixtures("compiler")
def test_compiles_ahead_of_time_with_gradients() -> None:
    model = any_size(depth=1)
    swap(model, "mita(m=4,k=4)")
    expected = gradients(model, images())
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(compiled, images()).pow(2).sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name])


@pytest.mark.parametrize("name", ["timm", "hf"])
def test_a_compiled_model_notices_swap_and_revert(name: str, compiler: Callable[..., Any]) -> None:
    model = any_size(depth=1) if name == "timm" else awake(hf("ViT", num_hidden_layers=1)).eval()
    example = images()
    compiled = compiler(model)
    with torch.no_grad():
        untouched = run(compiled, example)
        torch.testing.assert_close(untouched, run(model, example))
        for spec in ("linear", "agent(n=4)"):
            with swap(model, spec):
                swapped = run(compiled, example)
                torch.testing.assert_close(swapped, run(model, example))
                assert (swapped - untouched).abs().max() > 1e-2
        assert torch.equal(run(compiled, example), untouched)


# ------------------------------------------------------------------------------------ image sizes


def layouts(model: nn.Module, example: Any) -> list[TokenLayout]:
    seen: list[TokenLayout] = []
    observe = Handle(model, []).observe
    with torch.no_grad(), observe(lambda path, part, q, k, layout, scale: seen.append(layout)):
        run(model, example)
    return seen


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (112, 48)], ids=str)
@pytest.mark.parametrize("name", ["timm", "hf-dinov2", "hf-vit", "hf-clip-vision"])
def test_image_sizes_change_from_call_to_call(name: str, size: tuple[int, int]) -> None:
    model = any_size() if name == "timm" else build(name)
    example: Any = images(*size)
    if name in ("hf-vit", "hf-clip-vision"):
        example = {"pixel_values": example, "interpolate_pos_encoding": True}
    with torch.no_grad():
        untouched = run(model, example)
    swap(model, "standard")
    assert layouts(model, example) == [TokenLayout(1, (size[0] // 16, size[1] // 16))] * 2
    with torch.no_grad():
        assert torch.equal(run(model, example), untouched)
        mitaswap.revert(model)
        swap(model, "mita(m=4,k=4)")
        assert run(model, example).shape == untouched.shape
        assert run(model, images()).isfinite().all()


def test_a_size_too_small_for_the_options_is_refused_at_run_time() -> None:
    model = any_size()
    swap(model, "mita(m=9,k=4)")
    with pytest.raises(MitaswapError, match=r"m=9 must be between 1 and the 4 patches"):
        run(model, images(32, 32))


# --------------------------------------------------------------------------------- choice of layers


def four_layers() -> Model:
    return timm_vit(depth=4)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("0", [0]),
        ("1-2", [1, 2]),
        ("0,2-3", [0, 2, 3]),
        ("blocks.3.*", [3]),
        ("blocks.1", [1]),
        ("blocks.[02].attn", [0, 2]),
        ("*", [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_layers_are_chosen_one_by_one(layers: str, expected: list[int]) -> None:
    model = four_layers()
    handle = swap(model, "linear", layers)
    assert list(swapped_sites(model)) == [f"blocks.{i}.attn" for i in expected]
    assert [site.path for site in handle.sites] == [f"blocks.{i}.attn" for i in expected]


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_each_layer_alone_gives_another_output(name: str) -> None:
    model, example = build(name), example_of(name)
    outputs = []
    with torch.no_grad():
        for layers in ("0", "1", "*"):
            with swap(model, "linear", layers):
                outputs.append(run(model, example))
        outputs.append(run(model, example))
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_a_mapping_or_recipe_gives_each_layer_its_mechanism() -> None:
    model = four_layers()
    mapping = {"3": "agent(n=4)", "0-1": "linear", "*": "mita(m=4,k=4)"}
    for recipe in (mapping, Recipe.of(mapping)):
        with swap(model, recipe):
            specs = [str(part.spec) for part in swapped_sites(model).values()]
            assert specs == ["linear", "linear", "mita(m=4,k=4)", "agent(n=4)"]
            again = recipe_of(model)
        assert again is not None
        with swap(model, again):
            assert [str(part.spec) for part in swapped_sites(model).values()] == specs
    assert recipe_of(model) is None


def test_sites_of_an_earlier_walk_save_the_dry_forward() -> None:
    model = four_layers()
    sites = walk(model)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    with swap(model, "linear", sites=sites):
        assert len(swapped_sites(model)) == 4
    assert len(runs) == 1  # the one that verifies


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("to", "layers", "message"),
    [
        ("linear", "blocks.0.atn", r"unknown layer pattern .*Did you mean 'blocks.0.attn'\?"),
        ("linear", "7", r"'7' is outside the model's 2 sites \(0-1\)"),
        ("linear", "0-5", r"'0-5' is outside the model's 2 sites"),
        ("linaer", "*", r"unknown mechanism 'linaer'. Did you mean 'linear'\?"),
        ("mita(m=4,q=2)", "*", "unknown option of mita 'q'"),
        (
            "mita(m=17,k=4)",
            "1",
            r"blocks.1.attn: mita\(m=17,k=4\): m=17 must be between 1 and .*16",
        ),
        ("mita(m=4,k=18)", "*", r"blocks.0.attn: .*k=18 must be between 1 and the 17 tokens"),
        ("agent(n=13)", "*", r"blocks.0.attn: agent\(n=13\): 13 landmarks do not fit a 4x4 grid"),
        ("linear+window", "1", r"blocks.1.attn: linear has no softmax that a window could join"),
        ("linear(impl=fused)+gate", "*", r"blocks.0.attn: .* has no kernel for tensors on cpu"),
        ("topk(impl=fused)", "*", r"blocks.0.attn: topk has no fused kernel; use impl=reference"),
        ("usable", "*", "'usable' is a group of mechanisms, for `mitaswap eval --run usable`"),
    ],
    ids=[
        *("path", "number", "range", "mechanism", "option", "m", "k", "partition"),
        *("wrapper", "device", "kernel", "group"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, to: str, layers: str, message: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = build("timm-vit")
    before = snapshot(model)
    with pytest.raises(MitaswapError, match=message):
        swap(model, to, layers)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", EACH_ROUTE)
def test_swapping_twice_is_an_error_and_keeps_the_first(name: str) -> None:
    model, example = build(name), example_of(name)
    swap(model, "linear", "1", example=example)
    first = next(iter(swapped_sites(model)))
    for layers in ("*", "0"):
        with pytest.raises(
            SwapError, match=rf"{first} is swapped already \(1 sites are\); call mitaswap.revert"
        ):
            swap(model, "mita(m=4,k=4)", layers, example=example)
        assert [str(part.spec) for part in swapped_sites(model).values()] == ["linear"]


def test_a_model_without_attention_is_an_error() -> None:
    model = PlainNetwork(nn.Linear(32, 32))
    with pytest.raises(
        SwapError, match=r"no site that can be swapped \(it makes no attention call"
    ):
        swap(model, "standard", example=images())


def test_a_site_asked_for_by_name_must_be_swappable() -> None:
    """ "*" means all that can be swapped; any other pattern means what it says."""
    model = build("timm-siglip")
    with swap(model, "linear"):
        assert list(swapped_sites(model)) == ["blocks.0.attn", "blocks.1.attn"]
    asked: list[Any] = [{"attn_pool": "linear"}, {"2": "linear", "*": "linear"}, {"0-2": "linear"}]
    for mapping in asked:
        with pytest.raises(SwapError, match=r"attn_pool cannot be swapped: 1 queries but 16 keys"):
            swap(model, mapping)
    assert not swapped_sites(model)


def test_an_attention_module_without_parameters_can_be_swapped() -> None:
    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    model = PlainNetwork(PlainAttention(Core())).double()
    example = images().double()
    with torch.no_grad():
        untouched = run(model, example)
        with swap(model, "standard", example=example):
            assert list(swapped_sites(model)) == ["layers.0.attend"]
            assert torch.equal(run(model, example), untouched)
        with swap(model, "gated", example=example):
            assert swapped_sites(model)["layers.0.attend"].gate.dtype == torch.float64


# -------------------------------------------------------------------------------- ways of running


def test_timm_features() -> None:
    model = build("timm-vit")
    with torch.no_grad():
        tokens = model.forward_features(images())
        maps = model.forward_intermediates(images(), intermediates_only=True)
        with swap(model, "standard"):
            assert torch.equal(model.forward_features(images()), tokens)
            again = model.forward_intermediates(images(), intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(again, maps, strict=True))
        with swap(model, "mita(m=4,k=4)", "1"):
            again = model.forward_intermediates(images(), intermediates_only=True)
            assert [torch.equal(a, b) for a, b in zip(again, maps, strict=True)] == [True, False]
            assert not torch.equal(model.forward_features(images()), tokens)


def test_hugging_face_hidden_states() -> None:
    model = build("hf-vit")
    with torch.no_grad():
        states = model(images(), output_hidden_states=True).hidden_states
        with swap(model, "linear", "1"):
            again = model(images(), output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(again, states, strict=True)] == [True, True, False]


def test_an_observer_sees_every_attention_call_and_only_one_may_look() -> None:
    model = build("hf-yolos")
    handle = swap(model, "linear")
    seen = []
    with torch.no_grad(), handle.observe(lambda *facts: seen.append(facts)):
        with pytest.raises(SwapError, match="being observed already"), handle.observe(print):
            pass
        run(model, images())
    run(model, images())
    assert [facts[0] for facts in seen] == list(swapped_sites(model))
    path, part, q, k, layout, scale = seen[0]
    assert part is swapped_sites(model)[path]
    assert q.shape == k.shape == (2, 4, 24, 8)
    assert (layout, scale) == (TokenLayout(1, (4, 4), 7), pytest.approx(8**-0.5))


def test_one_class_serves_all_modules_of_a_class() -> None:
    model = build("timm-vit")
    original: Any = type(model.get_submodule("blocks.0.attn"))
    swap(model, "linear")
    one, other = (type(model.get_submodule(f"blocks.{i}.attn")) for i in range(2))
    assert one is other
    assert type(copy.deepcopy(model).get_submodule("blocks.0.attn")) is one
    assert issubclass(one, original) and one.__name__ == "SwappedAttention"
    assert one.forward.__doc__ == original.forward.__doc__
    source = one.forward.__code__
    assert source.co_filename == original.forward.__code__.co_filename
    assert source.co_firstlineno == original.forward.__code__.co_firstlineno
