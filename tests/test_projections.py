"""Mechanisms that need the module's own key and value projections get them, where they are known;
elsewhere the swap is refused with what to do. `pvt` reduces the module's input by them.
"""

from __future__ import annotations

import copy
import functools
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import (
    SERVED,
    Model,
    PlainAttention,
    PlainNetwork,
    Sharper,
    awaken,
    build,
    example_of,
    gradients,
    images,
    one_thread,
    registered,
    run,
    same,
    snapshot,
    timm_vit,
)
from torch import Tensor, nn

import mitaswap
from mitaswap.errors import SwapError
from mitaswap.mechanisms import Mechanism
from mitaswap.surgery import Site, swapped_sites, walk
from mitaswap.surgery.projections import Projection, Projections, find, project

EACH_ROUTE = ["timm-vit", "hf-vit", "hand-made"]


class Projecting(Mechanism):
    """Softmax attention with keys and values that it projects itself: an identity."""

    card = Sharper.card
    needs = frozenset({"x", "project"})
    supports = frozenset({"bias", "dropout"})

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        extra.pop("layout")
        keys, values = extra.pop("project")(extra.pop("x"))
        assert keys.shape == k.shape and values.shape == v.shape
        return F.scaled_dot_product_attention(q, keys, values, **extra)


@pytest.fixture(autouse=True, scope="module")
def mechanisms_of_the_tests() -> Iterator[None]:
    with one_thread(), registered(projecting=Projecting):
        yield


# ------------------------------------------------------------------------------- which are known

#: networks in which keys and values are no plain projections of the input: rotary positions and
#: norms of keys, biases added by hand, a projection behind a norm, maps with channels first
UNKNOWN = {
    "timm-eva02", "timm-dinov3", "timm-beit", "timm-parallel", "timm-coatnet", "hf-dinov3",
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_what_is_found_gives_back_keys_and_values(name: str) -> None:
    model, example = build(name), example_of(name)
    sites = [site for site in walk(model, example) if site.swappable]
    assert all((site.projections is None) == (name in UNKNOWN) for site in sites)
    if name in UNKNOWN:
        return
    with torch.no_grad():
        untouched = run(model, example)
        with mitaswap.swap(model, "projecting", example=example):
            torch.testing.assert_close(run(model, example), untouched)


def test_where_they_are_found() -> None:
    def found(name: str) -> set[Projections | None]:
        return {site.projections for site in walk(build(name), example_of(name))}

    fused = Projections(4, Projection("qkv", 32, 32), Projection("qkv", 64, 32))
    apart = Projections(4, Projection("k_proj", 0, 32), Projection("v_proj", 0, 32))
    assert found("timm-vit") == found("hand-made") == {fused}, "equal for equal layers"
    assert found("hf-vit") == {apart}


def test_sites_are_values_as_before() -> None:
    one, other = walk(build("timm-vit"))
    assert hash(one) == hash(pickle.loads(pickle.dumps(one)))
    assert one == pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) != other
    old = copy.copy(one)
    del vars(old)["projections"]  # of a pickle that was written before there was the field
    assert isinstance(old, Site) and old.projections is None


class ByHand(PlainAttention):
    """A bias beside the projection's own, by F.linear."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        made = F.linear(x, self.qkv.weight, self.qkv.bias)
        q, k, v = made.reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, 32))


class InPlace(PlainAttention):
    """A bias that is added to what the projection gave, in the same memory."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        made = self.qkv(x)
        made += 0.5
        q, k, v = made.reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, 32))


class NormFirst(PlainAttention):
    """Its projection maps a norm of the module's input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Interleaved(PlainAttention):
    """Columns dealt to the heads in turn."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 8, 4).permute(2, 0, 4, 1, 3)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, 32))


class Beside(PlainAttention):
    """An adapter beside its projection that does nothing before it is trained, or something else
    that is neutral until then.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.down, self.up = nn.Linear(32, 3), nn.Linear(3, 96)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)
        self.bias = nn.Parameter(torch.zeros(96))
        self.gain = nn.Parameter(torch.ones(96))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        made = self.qkv(self.drop(x) if self.kind == "dropout before" else x)
        if self.kind == "adapter":
            made = made + self.up(self.down(x))
        elif self.kind == "bias in place":
            made.add_(self.bias)
        elif self.kind == "gain":
            made = made * self.gain
        elif self.kind == "dropout behind":
            made = self.drop(made)
        q, k, v = made.reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, 32))


class Child(nn.Module):
    """A projection that does more than mapping each row of its one argument."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.map = nn.Linear(32, 96)
        self.table = nn.Parameter(torch.randn(1, 16, 96))

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        made = self.map(x) * gain
        if self.kind == "mean":
            made = made - made.mean(1, keepdim=True)
        if self.kind == "table":
            made = made + self.table
        return made


class WithChild(PlainAttention):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.qkv = Child(kind)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        made = self.qkv(x, gain=2.0) if self.qkv.kind == "gain" else self.qkv(x)
        q, k, v = made.reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, 32))


NEUTRAL = ["adapter", "bias in place", "gain", "dropout before", "dropout behind"]
NOT_PLAIN = {
    **{kind.__name__: kind for kind in (ByHand, InPlace, NormFirst, Interleaved)},
    **{kind: functools.partial(Beside, kind) for kind in NEUTRAL},
    **{f"child: {kind}": functools.partial(WithChild, kind) for kind in ("mean", "table", "gain")},
}


@pytest.mark.parametrize("kind", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_no_plain_projection_of_the_input_is_not_taken_for_one(
    kind: Callable[[], PlainAttention],
) -> None:
    torch.manual_seed(0)
    model = PlainNetwork(kind()).eval()
    before = snapshot(model)
    with pytest.raises(SwapError, match=r"^layers.0: pvt needs the module's own key and value pro"):
        mitaswap.swap(model, "pvt", example=images())
    assert snapshot(model) == before
    with mitaswap.swap(model, "pvt(place=after)", example=images()):
        assert run(model, images()).isfinite().all()


@pytest.mark.parametrize("kind", ["plain", "child: nothing more", "zeros", "meta"])
def test_plain_projections_are_found_whatever_their_numbers(kind: str) -> None:
    model = PlainNetwork(WithChild("") if kind.startswith("child") else PlainAttention()).eval()
    example = images()
    if kind == "zeros":
        for parameter in model.layers[0].qkv.parameters():
            nn.init.zeros_(parameter)
    if kind == "meta":
        model, example = model.to("meta"), example.to("meta")
    (site,) = walk(model, example)
    assert site.projections == Projections(4, Projection("qkv", 32, 32), Projection("qkv", 64, 32))
    mitaswap.swap(model, "pvt", example=example)


def test_without_numbers_they_are_found_as_well() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model, example = PlainNetwork(PlainAttention()).eval(), torch.empty(2, 3, 64, 64)
        mitaswap.swap(model, "pvt(reduction=pool,size=2)", example=example)
        assert run(model, example).shape[0] == 2


def test_finding_by_memory() -> None:
    x = torch.randn(2, 9, 16)
    heads = x.unflatten(2, (4, 4)).transpose(1, 2)  # heads 0, 1 as keys, 2, 3 as values
    k, v = heads[:, :2], heads[:, 2:]
    both = Projections(2, Projection("kv", 0, 8), Projection("kv", 8, 8))
    assert find([("kv", x)], k, v) == both
    assert find([("kv", x.unflatten(1, (3, 3)))], k, v) == both, "a map, channels last"
    assert find([("kv", x), ("kv", x)], k, v) == both, "called twice"
    assert find([("kv", x), ("other", x)], k, v) is None, "either could be"
    assert find([("k", x[..., :8])], k, v) is None, "no values"
    assert find([("kv", x.clone())], k, v) is None, "the same numbers elsewhere"
    assert find([("kv", x.double())], k, v) is None
    assert find([], k, v) is None
    assert find([("kv", x)], k.expand(2, 2, 9, 4), v.transpose(2, 3)) is None
    meta = x.to("meta")
    keys, values = meta.unflatten(2, (4, 4)).transpose(1, 2).split(2, 1)
    assert find([("kv", meta)], keys, values) == both
    assert find([("kv", x)], k[0], v[0]) is None
    wide = x[..., 8:].unflatten(2, (1, 8)).transpose(1, 2)  # values of another width
    thin = x[..., 4:8].unflatten(2, (1, 4)).transpose(1, 2)
    assert find([("kv", x)], thin, wide) == Projections(
        1, Projection("kv", 4, 4), Projection("kv", 8, 8)
    )


# --------------------------------------------------------------------------------- what is refused

REFUSED = {
    "timm-eva02": lambda: build("timm-eva02"),
    "timm-dinov3": lambda: build("timm-dinov3"),
    "timm-qk-norm": lambda: awaken(timm_vit(qk_norm=True)).eval(),
    "hf-dinov3": lambda: build("hf-dinov3"),
}


@pytest.mark.parametrize("behind", ["", "+gate"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_site_without_known_projections_is_refused_and_the_advice_works(
    name: str, behind: str
) -> None:
    torch.manual_seed(0)
    model = REFUSED[name]()
    size = images(56, 56) if name == "timm-eva02" else images()
    (site, *_), before = walk(model), snapshot(model)
    with pytest.raises(SwapError) as error:
        mitaswap.swap(model, f"pvt(r=3){behind}")
    assert snapshot(model) == before
    assert str(error.value) == (
        f"{site.path}: pvt(r=3){behind} needs the module's own key and value projections, to map "
        f"what it makes of the module's input, but no submodule of this {site.module} alone makes, "
        "row by row, the keys and the values that its attention call is handed (there may be "
        "norms, rotary positions, biases or dropout around the projections, or the forward calls "
        f"F.linear by hand); use pvt(r=3,place=after){behind}, which runs everywhere, or leave "
        "this layer out with layers=..."
    )
    advised = re.search(r"use (\S+), which", str(error.value))
    assert advised
    with mitaswap.swap(model, advised[1]):
        assert run(model, size).isfinite().all()


def test_a_mechanism_without_such_options_says_so() -> None:
    with pytest.raises(
        SwapError, match=r"by hand\); choose another mechanism, or leave this layer"
    ):
        mitaswap.swap(build("timm-eva02"), "projecting")


# ------------------------------------------------------------------------------------ pvt's numbers


def weights_of(module: Any) -> list[Tensor]:
    """Key weight and bias, value weight and bias of timm's or transformers' module."""
    if hasattr(module, "qkv"):
        (_, key, value), (_, key_bias, value_bias) = (
            module.qkv.weight.chunk(3),
            module.qkv.bias.chunk(3),
        )
        return [key, key_bias, value, value_bias]
    return [module.k_proj.weight, module.k_proj.bias, module.v_proj.weight, module.v_proj.bias]


def query_of(module: Any, x: Tensor) -> Tensor:
    made = module.qkv(x)[..., :32] if hasattr(module, "qkv") else module.q_proj(x)
    return made.view(*x.shape[:2], 4, 8).transpose(1, 2)


def by_convolution(module: Any, x: Tensor, part: Any, norm: bool = True) -> Tensor:
    """PVT's module on 1 + 4x4 tokens with windows of 3x3, as its code is written."""
    key, key_bias, value, value_bias = weights_of(module)
    maps = x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    kernel = part.reduction[0].view(3, 3, 32, 32).permute(3, 2, 0, 1)
    rows = F.conv2d(F.pad(maps, (0, 2, 0, 2)), kernel, stride=3).flatten(2).transpose(1, 2)
    rows = rows / torch.tensor([9, 3, 3, 1]).view(4, 1)
    if norm:
        rows = F.layer_norm(rows, (32,), part.norm_weight[0], part.norm_bias[0])
    rows = torch.cat([x[:, :1], rows], dim=1)  # the class token, as it is
    k = F.linear(rows, key, key_bias).view(len(x), -1, 4, 8).transpose(1, 2)
    v = F.linear(rows, value, value_bias).view(len(x), -1, 4, 8).transpose(1, 2)
    out = F.scaled_dot_product_attention(query_of(module, x), k, v)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_pvt_in_networks_is_the_papers_module(name: str) -> None:
    model, example = build(name), example_of(name)
    seen: list[tuple[Tensor, Tensor]] = []
    mitaswap.swap(model, "pvt(r=3)")
    torch.manual_seed(0)
    parts = swapped_sites(model)
    with torch.no_grad():
        for part in parts.values():
            for parameter in part.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        for path in parts:
            module = model.get_submodule(path)
            given: list[Tensor] = []

            def keep(_: nn.Module, args: Any, kwargs: Any, into: list[Tensor] = given) -> None:
                into.append([*args, *kwargs.values()][0])

            def pair(_: nn.Module, args: Any, into: list[Tensor] = given) -> None:
                seen.append((into[-1], args[0]))

            module.register_forward_pre_hook(keep, with_kwargs=True)
            last = module.proj if hasattr(module, "proj") else module.o_proj
            last.register_forward_pre_hook(pair)
        run(model, example)
        assert len(seen) == len(parts) == 2
        for (x, got), (path, part) in zip(seen, parts.items(), strict=True):
            module = model.get_submodule(path)
            torch.testing.assert_close(got, by_convolution(module, x, part), rtol=1e-4, atol=1e-5)
            # negative controls: the comparison tells a norm, and another layer's weights, apart
            assert (got - by_convolution(module, x, part, norm=False)).abs().max() > 1e-2
            other = next(p for p in parts if p != path)
            wrong = by_convolution(model.get_submodule(other), x, part)
            assert (got - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", EACH_ROUTE)
def test_windows_of_one_patch_without_norm_are_softmax_attention(name: str, place: str) -> None:
    model, example = build(name), example_of(name)
    with torch.no_grad():
        untouched = run(model, example)
        with mitaswap.swap(model, f"pvt(r=1,norm=false,place={place})", example=example):
            torch.testing.assert_close(run(model, example), untouched, rtol=1e-3, atol=1e-4)
        with mitaswap.swap(model, f"pvt(place={place})", example=example):
            assert (run(model, example) - untouched).abs().max() > 1e-2


def test_fresh_and_without_norm_both_places_are_the_same() -> None:
    """Averages of projections are projections of averages; with Norm they are not."""
    outputs = {}
    for norm in ("true", "false"):
        for place in ("before", "after"):
            model = build("timm-vit")
            with torch.no_grad(), mitaswap.swap(model, f"pvt(r=3,norm={norm},place={place})"):
                outputs[norm, place] = run(model, images())
    torch.testing.assert_close(
        outputs["false", "before"], outputs["false", "after"], rtol=1e-3, atol=1e-4
    )
    assert (outputs["true", "before"] - outputs["true", "after"]).abs().max() > 1e-2


# ---------------------------------------------------------------------------------- ways of running


@pytest.mark.parametrize("name", EACH_ROUTE)
def test_each_projection_is_called_once_more(name: str) -> None:
    model, example = build(name), example_of(name)
    mitaswap.swap(model, "pvt", example=example)
    (path, _), *_ = swapped_sites(model).items()
    shapes: dict[str, list[int]] = {}
    for child, module in model.get_submodule(path).named_children():

        def note(_: nn.Module, args: tuple[Tensor], child: str = child) -> None:
            shapes.setdefault(child, []).append(args[0].shape[1])

        module.register_forward_pre_hook(note)
    run(model, example)
    tokens, reduced = (17, 4) if name != "hand-made" else (16, 4)
    counts = {
        child: found
        for child, found in shapes.items()
        if child in ("qkv", "k_proj", "v_proj", "q_proj")
    }
    if name == "hf-vit":
        both = [tokens, reduced]
        assert counts == {"q_proj": [tokens], "k_proj": both, "v_proj": both}
    else:
        assert counts == {"qkv": [tokens, reduced]}


@pytest.mark.parametrize("spec", ["pvt", "pvt(reduction=pool,size=2)+gate"])
@pytest.mark.parametrize("name", EACH_ROUTE)
def test_copies_and_pickles(name: str, spec: str) -> None:
    model, example = build(name), example_of(name)
    with torch.no_grad():
        untouched = run(model, example)
        mitaswap.swap(model, spec, example=example)
        want = run(model, example)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(twin, example), want)
            for weight in model.parameters():  # the twin calls its own projections
                weight.mul_(1.5)
            assert torch.equal(run(twin, example), want)
            for weight in model.parameters():
                weight.div_(1.5)
            mitaswap.revert(twin)
            assert torch.equal(run(twin, example), untouched)


@pytest.mark.parametrize("spec", ["pvt", "pvt(reduction=pool,size=2)"])
@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_compiles_and_exports_whole(name: str, spec: str) -> None:
    model, example = build(name), example_of(name)
    torch.compiler.reset()
    with mitaswap.swap(model, spec), torch.no_grad():
        want = run(model, example)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled, example), want)
        if name == "timm-vit":  # transformers' own code brings a mask to every export of its ViT
            exported = torch.export.export(model, (example,)).module()
            torch.testing.assert_close(run(exported, example), want)
    torch.compiler.reset()


@pytest.mark.parametrize("name", EACH_ROUTE)
def test_half_precision(name: str) -> None:
    """Autocast, and a network in bfloat16, whose projections take bfloat16."""
    model, example = build(name), example_of(name)
    mitaswap.swap(model, "pvt", example=example)
    with torch.no_grad():
        exact = run(model, example)
        with torch.autocast("cpu", torch.bfloat16):
            half = run(model, example)
        low = run(model.bfloat16(), example.bfloat16())
    for got in (half, low):
        assert got.isfinite().all()
        assert (got.float() - exact).abs().mean() < 0.05 * exact.abs().max()


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build("timm-vit").train()
    mitaswap.swap(model, "pvt")
    plain = gradients(model, images())
    model.set_grad_checkpointing()
    assert same(gradients(model, images()), plain)


@pytest.mark.parametrize("name", EACH_ROUTE)
def test_finetuning_trains_the_networks_own_projections(name: str) -> None:
    """The gradient of their weights is the one that differences show, through the reduced rows."""
    model, example = build(name).double(), example_of(name).double()
    mitaswap.swap(model, "pvt", example=example)
    grads = gradients(model, example)
    module = model.get_submodule(next(iter(swapped_sites(model))))
    weight = module.qkv.weight if hasattr(module, "qkv") else module.k_proj.weight
    name_of = {id(p): n for n, p in model.named_parameters()}[id(weight)]
    mine = slice(32, 96) if hasattr(module, "qkv") else slice(None)  # of keys and values
    torch.manual_seed(0)
    step = torch.zeros_like(weight)
    step[mine] = torch.randn_like(weight[mine])

    def loss(size: float) -> float:
        with torch.no_grad():
            weight.add_(size * step)
            found = float(run(model, example).pow(2).sum())
            weight.sub_(size * step)
        return found

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert slope == pytest.approx(float((grads[name_of] * step).sum()), rel=1e-5)
    assert abs(slope) > 1e-3


def test_without_special_tokens_keys_are_trained_through_reduced_rows_alone() -> None:
    model = build("hand-made")
    mitaswap.swap(model, "pvt", example=images())
    module: Any = model.get_submodule("layers.0")
    run(model, images()).pow(2).sum().backward()
    assert (module.qkv.weight.grad.abs().amax(dim=1) > 0)[:64].all()
    part = module.mitaswap
    real = type(part).branch
    module.zero_grad()

    def cut(q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Any:
        projected = extra.pop("project")
        return real(part, q, k, v, project=lambda x: [t.detach() for t in projected(x)], **extra)

    part.branch = cut  # the control: without that way they get none
    run(model, images()).pow(2).sum().backward()
    assert (module.qkv.weight.grad[32:] == 0).all() and (module.qkv.weight.grad[:32] != 0).any()


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(3, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def adapted(model: Model) -> Model:
    torch.manual_seed(0)
    for block in model.blocks:
        block.attn.qkv = Adapted(block.attn.qkv)
    return model


def test_adapters_are_part_of_the_projections() -> None:
    model = build("timm-vit")
    plain = run(model, images())
    untouched = run(adapted(model), images())
    assert (untouched - plain).abs().max() > 1e-2
    with mitaswap.swap(model, "pvt(r=1,norm=false)"):
        torch.testing.assert_close(run(model, images()), untouched, rtol=1e-3, atol=1e-3)
    with mitaswap.swap(model, "pvt"):
        assert gradients(model, images())["blocks.0.attn.qkv.up"].abs().sum() > 0
    # put on after the swap they are what is called too
    model = build("timm-vit")
    with mitaswap.swap(model, "pvt(r=1,norm=false)"):
        torch.testing.assert_close(run(adapted(model), images()), untouched, rtol=1e-3, atol=1e-3)


def test_layers_without_parameters_are_called_as_they_are() -> None:
    """As quantised ones are, whose weights are packed."""

    class Packed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, 2 * x], dim=2)

    module = nn.Module()
    module.inner = nn.Sequential(Packed())
    of = Projections(2, Projection("inner.0", 0, 6), Projection("inner.0", 6, 6))
    x = torch.randn(2, 5, 6)
    keys, values = project(module, of, x.dtype, x)
    assert torch.equal(keys, x.unflatten(2, (2, 3)).transpose(1, 2))
    assert torch.equal(values, 2 * keys)


def test_layers_are_called_in_the_dtype_of_the_queries_where_they_know_it() -> None:
    class Packed(nn.Module):
        """Weights of another dtype than its first parameter's, or that are no parameters."""

        def __init__(self, *first: nn.Parameter) -> None:
            super().__init__()
            self.first = nn.ParameterList(first)
            self.register_buffer("weight", torch.randn(12, 6).bfloat16())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    of = Projections(2, Projection("child", 0, 6), Projection("child", 6, 6))
    half = torch.bfloat16
    for first in ([], [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, dtype=half))]):
        module = nn.Module()
        module.child = Packed(*first)
        keys, values = project(module, of, half, torch.randn(2, 5, 6))
        assert keys.dtype == values.dtype == torch.float32


def test_a_trained_network_is_saved_and_loaded(tmp_path: Path) -> None:
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **shape)
    x = torch.randn(4, 3, 32, 32)
    mitaswap.convert(model, "pvt")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"blocks.0.attn.qkv.weight", "blocks.0.attn.mitaswap.reduction"} <= moved
    model.eval()
    twin = mitaswap.load(mitaswap.save(model, tmp_path / "saved"))
    assert [str(part.spec) for part in swapped_sites(twin).values()] == ["pvt", "pvt"]
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
