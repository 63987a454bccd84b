"""Swapping nothing changes nothing, swapping something changes it, undoing it leaves no trace; and
what `walk` reports of each family.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import (
    REFUSED,
    SERVED,
    Gated,
    PlainAttention,
    PlainNetwork,
    Sharper,
    build,
    example_of,
    hf,
    images,
    one_thread,
    registered,
    run,
    snapshot,
    timm_vit,
)
from torch import Tensor, nn

import mitaswap
from mitaswap import MitaswapError, TokenLayout
from mitaswap.errors import SwapError
from mitaswap.mechanisms import SiteShape
from mitaswap.surgery import fit, seam, swapped_sites, walk
from mitaswap.surgery.interface import is_shadow


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("name", SERVED)
def test_standard_is_exact_another_mechanism_is_not_and_undo_leaves_nothing(name: str) -> None:
    model, example = build(name), example_of(name)
    with torch.no_grad():
        untouched = run(model, example)
        before = snapshot(model)
        with mitaswap.swap(model, "standard", example=example):
            assert swapped_sites(model), "nothing was swapped: the identity would prove nothing"
            assert torch.equal(run(model, example), untouched)
        assert snapshot(model) == before
        with (
            registered(sharper=Sharper),
            mitaswap.swap(model, SERVED[name].moves, example=example),
        ):
            moved = run(model, example)
        assert (moved - untouched).abs().max() > 0.05 * untouched.abs().max()
        assert snapshot(model) == before
        assert torch.equal(run(model, example), untouched)


@pytest.mark.parametrize("name", SERVED)
def test_route(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the three diversions a family takes: the mode is slow and only the last resort."""
    entered = []
    enter = seam._Divert.__enter__

    def noted(mode: Any) -> Any:
        entered.append(mode.module)
        return enter(mode)

    monkeypatch.setattr(seam._Divert, "__enter__", noted)
    model, example = build(name), example_of(name)
    mitaswap.swap(model, "standard", example=example)
    modules = [m for m in model.modules() if isinstance(m, seam.Swapped)]
    for module in modules:
        by_interface = is_shadow(getattr(module, "config", None))
        by_mode = any(module is one for one in entered)
        assert not (by_interface and by_mode)
        route = "interface" if by_interface else "mode" if by_mode else "source"
        assert route == SERVED[name].route


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov2", "hand-made"])
def test_every_mechanism_gives_another_output(name: str) -> None:
    model, example = build(name), example_of(name)
    outputs = []
    with torch.no_grad():
        for spec in ("standard", "linear", "agent(n=4)", "mita(m=4,k=4)", "mita(m=4,k=2,s=2)"):
            with mitaswap.swap(model, spec, example=example):
                outputs.append(run(model, example))
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-2 * one.abs().max()


def test_mita_with_every_key_and_no_shared_expert_is_softmax() -> None:
    """A limit that only holds if q, k, v, scale and layout all arrive as the network made them."""
    for name in ("timm-eva02", "hf-dinov3"):
        model, example = build(name), example_of(name)
        tokens = walk(model)[0].tokens
        with torch.no_grad():
            untouched = run(model, example)
            spec = f"mita(m=4,k={tokens},variant=route-only)"
            with mitaswap.swap(model, spec):
                assert torch.allclose(run(model, example), untouched, rtol=1e-3, atol=1e-4)


def test_convert_returns_the_model_and_revert_undoes_it() -> None:
    model = build("hf-vit")
    run(model, images())
    before = snapshot(model)
    assert mitaswap.convert(model, "linear") is model
    assert [str(m.spec) for m in swapped_sites(model).values()] == ["linear", "linear"]
    assert mitaswap.revert(model) is model
    assert snapshot(model) == before


# ------------------------------------------------------------------------------------------- walk


@pytest.mark.parametrize(
    ("name", "paths", "heads", "head_dim", "layout", "bias"),
    [
        ("timm-vit", "blocks.{}.attn", 4, 8, "1 + 4x4", "none"),
        ("timm-deit-distilled", "blocks.{}.attn", 4, 8, "2 + 4x4", "none"),
        ("timm-dinov2-registers", "blocks.{}.attn", 4, 8, "5 + 4x4", "none"),
        ("timm-eva02", "blocks.{}.attn", 4, 8, "1 + 4x4", "none"),
        ("timm-beit", "blocks.{}.attn", 4, 8, "1 + 4x4", "bias"),
        ("timm-parallel", "blocks.{}", 4, 8, "1 + 4x4", "none"),
        ("hf-deit", "deit.layers.{}.attention", 4, 8, "2 + 4x4", "none"),
        ("hf-dinov3", "model.layer.{}.attention", 4, 8, "5 + 4x4", "none"),
        ("hf-beit-relative", "beit.layers.{}.attention", 4, 8, "1 + 4x4", "bias"),
        ("hf-yolos", "encoder.layer.{}.attention.attention", 4, 8, "1 + 4x4 + 7", "none"),
    ],
    ids=[
        *("vit", "deit-distilled", "dinov2-registers", "eva02", "beit", "parallel"),
        *("hf-deit", "hf-dinov3", "hf-beit-relative", "hf-yolos"),
    ],
)
def test_walk_reports(
    name: str, paths: str, heads: int, head_dim: int, layout: str, bias: str
) -> None:
    sites = walk(build(name))
    assert [site.path for site in sites] == [paths.format(i) for i in range(2)]
    for site in sites:
        assert (site.heads, site.head_dim, site.bias) == (heads, head_dim, bias)
        assert site.layout is not None
        assert str(site.layout) == layout
        assert site.tokens == site.layout.tokens
        assert site.swappable and site.reason is None and site.mechanism is None


def test_walk_reports_the_grid_of_each_stage() -> None:
    sites = walk(build("timm-pit"))
    assert [str(site.layout) for site in sites] == ["1 + 7x7", "1 + 4x4", "1 + 2x2"]
    assert [site.heads for site in sites] == [2, 4, 8]
    assert sites[1].grid_from == "transformers.1.pool.conv"


def test_walk_reads_the_grid_of_feature_maps_from_the_attention_input() -> None:
    volo = [site for site in walk(build("timm-volo"), images()) if site.swappable]
    assert [(str(s.layout), s.channels_last, s.grid_from) for s in volo] == [
        ("0 + 4x4", True, volo[0].path)
    ]
    coatnet = walk(build("timm-coatnet"), images())
    assert [(s.channels_last, s.bias, s.grid_from) for s in coatnet] == [
        (False, "bias", coatnet[0].path)
    ]


def test_walk_takes_an_image_size_or_an_example() -> None:
    model = timm_vit(dynamic_img_size=True)
    assert [str(s.layout) for s in walk(model, img_size=(32, 96))] == ["1 + 2x6"] * 2
    assert [str(s.layout) for s in walk(model, images(80, 48))] == ["1 + 5x3"] * 2
    example = {"pixel_values": images(96, 64), "interpolate_pos_encoding": True}
    assert [str(s.layout) for s in walk(hf("ViT"), example)] == ["1 + 6x4"] * 2


def test_walk_says_what_is_wrong_with_the_size() -> None:
    with pytest.raises(
        MitaswapError, match=r"VisionTransformer does not run on .*80, 80.*img_size"
    ):
        walk(timm_vit(), img_size=(80, 80))
    with pytest.raises(
        MitaswapError, match="PlainNetwork does not say its input size; give exampl"
    ):
        walk(PlainNetwork(PlainAttention()))
    with pytest.raises(MitaswapError, match=r"CLIPModel does not run .*example=\{name: tensor"):
        walk(build("hf-clip"))
    with pytest.raises(MitaswapError, match=r"the example .* holds no tensor"):
        walk(build("hf-clip"), {"input_ids": [[1, 2]]})


class Nested(Gated):
    """A mechanism with attention modules of its own."""

    def build(self, site: SiteShape) -> None:
        self.inner = PlainAttention()
        self.other = nn.MultiheadAttention(32, 4, batch_first=True)

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        x = v.transpose(1, 2).flatten(2)
        x = self.inner(x) + self.other(x, x, x)[0]
        return x.unflatten(2, (4, 8)).transpose(1, 2)


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "hand-made"])
def test_walk_of_a_swapped_model_names_the_mechanisms_and_nothing_inside_them(name: str) -> None:
    model, example = build(name), example_of(name)
    plain = walk(model, example)
    with registered(nested=Nested):
        for spec in ("mita(m=16,k=4)", "standard", "nested"):
            with mitaswap.swap(model, spec, "0", example=example):
                sites = walk(model, example)
            assert [site.path for site in sites] == [site.path for site in plain]
            assert [site.mechanism for site in sites] == [spec, None]


@pytest.mark.parametrize("name", [*SERVED, "timm-swin", "timm-xcit"])
def test_walk_leaves_no_trace(name: str) -> None:
    model, example = build(name), example_of(name)
    run(model, example)  # Hugging Face notes things about a model at its first forward
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0  # whatever the user froze stays frozen
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    walk(model, example)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


class Noisy(PlainNetwork):
    """Draws random numbers in eval mode too, and fails on request."""

    fail = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fail:
            raise RuntimeError("broken on purpose")
        return super().forward(x + torch.rand_like(x))


def test_walk_and_swap_leave_the_random_state_alone() -> None:
    model = Noisy(PlainAttention())
    random = torch.get_rng_state()
    walk(model, images())
    mitaswap.swap(model, "linear", example=images()).undo()
    assert torch.equal(torch.get_rng_state(), random)


def test_walk_leaves_no_trace_when_the_model_fails() -> None:
    model = Noisy(PlainAttention())
    model.fail = True
    before = snapshot(model)
    with pytest.raises(SwapError, match="broken on purpose"):
        walk(model, images())
    assert snapshot(model) == before


def test_walk_tells_branches_apart_by_what_flows_into_them() -> None:
    """With several inputs, a feature map explains the tokens that were computed from it only."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coarse, self.fine = PlainNetwork(PlainAttention()), PlainNetwork(PlainAttention())

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            big = self.fine.patches(second)  # the last feature map is not the first branch's
            tokens = big.flatten(2).transpose(1, 2)
            return self.coarse(first) + self.fine.layers[0](tokens).mean()

    class Reordered(Branches):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            tokens = self.coarse.patches(first).flatten(2).transpose(1, 2)
            big = self.fine.patches(second)
            out = self.coarse.layers[0](tokens).mean()
            return out + self.fine.layers[0](big.flatten(2).transpose(1, 2)).mean()

    example = {"first": images(96, 96), "second": images(48, 176)}  # 36 and 33 tokens
    for network in (Branches(), Reordered()):
        layouts = {site.path: site.layout for site in walk(network, example)}
        assert layouts == {
            "coarse.layers.0": TokenLayout(0, (6, 6)),
            "fine.layers.0": TokenLayout(0, (3, 11)),
        }


class Sequence(nn.Module):
    """Attention over tokens that no feature map explains."""

    def __init__(self) -> None:
        super().__init__()
        self.att, self.last = PlainAttention(), PlainAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.att(x))


@pytest.mark.parametrize("spec", ["linear", "topk(k=5)", "performer", "ttt", "linear+gate"])
def test_where_no_grid_is_known_mechanisms_run_by_name_that_need_none(spec: str) -> None:
    model, example = Sequence(), torch.randn(2, 17, 32)
    untouched = model(example)
    # "*" leaves it out, as it leaves text towers out, and says how it can be had
    with pytest.raises(SwapError, match=r"att: no feature map .* needs no grid: .*layers='att'"):
        mitaswap.swap(model, spec, example=example)
    with mitaswap.swap(model, spec, "att", example=example):
        assert list(swapped_sites(model)) == ["att"]
        assert not torch.allclose(model(example), untouched)
        model(torch.randn(3, 11, 32))  # as many tokens as come
    assert torch.equal(model(example), untouched)
    with mitaswap.swap(model, {"0-1": "standard"}, example=example):
        assert torch.equal(model(example), untouched)
        longer = torch.randn(2, 23, 32)
        assert torch.equal(model(longer), copy.deepcopy(model)(longer))


@pytest.mark.parametrize("spec", ["mita", "linear+dwc", "topk(k=5)+prefix"])
@pytest.mark.parametrize("layers", ["*", "att"])
def test_a_missing_grid_is_an_error_that_says_who_needs_it_and_who_does_not(
    spec: str, layers: str
) -> None:
    model = Sequence()
    with pytest.raises(SwapError) as error:
        mitaswap.swap(model, spec, layers, example=torch.randn(2, 17, 32))
    message = str(error.value)
    assert "att: no feature map" in message or "att cannot be swapped: no feature map" in message
    assert f"{mitaswap.mechanism(spec).spec} needs the patch grid" in message
    assert "cannot be given" in message and "linear, " in message and "layers='att'" in message
    assert "mita," not in message and not swapped_sites(model)


def test_learned_parts_of_another_grid_need_not_fit_as_if_they_were_new() -> None:
    """Windows of the grid that they were built for, which this one would be too small for."""
    model, built = PlainNetwork(PlainAttention()), {"layers.0": TokenLayout(0, (14, 14))}
    with pytest.raises(SwapError, match=r"layers.0: linformer.n=49.: n=49 must be"):
        mitaswap.swap(model, "linformer(n=49)", example=images(64, 96))
    with mitaswap.swap(model, "linformer(n=49)", example=images(64, 96), built=built):
        model(images(64, 96))


def test_defaults_that_save_nothing_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """256 landmarks for 256 patches are softmax attention: a network of two layers, one word."""
    for spec, said in {"linformer": 1, "linformer(n=64)": 0, "linformer+gate": 1}.items():
        caplog.clear()
        fit._nothing_saved.cache_clear()
        model = PlainNetwork(PlainAttention(), PlainAttention()).eval()
        with caplog.at_level(logging.WARNING, logger="mitaswap"):
            mitaswap.swap(model, spec, example=images(256, 256))
        told = [r.getMessage() for r in caplog.records if "saves little or nothing" in r.message]
        assert len(told) == said, spec
        for line in told:
            wrapped = spec.removeprefix("linformer")
            assert line.endswith(f"; linformer(n=49){wrapped} is of a size for it")


def test_a_site_without_grid_stays_swapped_in_copies_and_compiled() -> None:
    model, example = Sequence().eval(), torch.randn(2, 17, 32)
    mitaswap.swap(model, "topk(k=5)", "att,last", example=example)
    expected = model(example)
    assert torch.equal(copy.deepcopy(model)(example), expected)
    for tokens in (17, 11):
        x = torch.randn(2, tokens, 32)
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_every_refused_network_says_why_and_stays_untouched() -> None:
    asked: dict[str, Any] = {name: build(name) for name in REFUSED if name.startswith("timm")}
    for name, model in asked.items():
        before = snapshot(model)
        example = example_of(name)
        with pytest.raises(SwapError, match=r"has no site that can be swapped \(.+: .+\)"):
            mitaswap.swap(model, "standard", example=example)
        assert snapshot(model) == before
