"""Under torch.compile the seam is gone: the graph has the operations of the untouched model, and
before each call nothing is looked at in a layer that is not looked at in the untouched model.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from types import NoneType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    Gated,
    Model,
    Sharper,
    awaken,
    hf,
    images,
    one_thread,
    registered,
    run,
    timm_vit,
)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import mitaswap
from mitaswap import Spec
from mitaswap.mechanisms import MECHANISMS, Mechanism, mechanism
from mitaswap.surgery import swapped_sites
from mitaswap.surgery.attend import goes_straight
from mitaswap.surgery.witness import example_input


class Gridded(Mechanism):
    """Softmax attention times height / width of the grid."""

    card = Sharper.card
    needs = frozenset({"grid"})

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        height, width = extra["layout"].grid
        return F.scaled_dot_product_attention(q, k, v, scale=extra["scale"]) * (height / width)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with one_thread(), registered(gridded=Gridded), torch.no_grad():
        torch.compiler.reset()
        yield
        torch.compiler.reset()


def operations(model: nn.Module, x: torch.Tensor) -> Counter[str]:
    """What code is generated from: ATen's operations, with their arguments that are no tensors."""
    seen: Counter[str] = Counter()

    def compiler(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                plain = [a for a in node.args if not isinstance(a, torch.fx.Node)]
                seen[f"{node.target} {plain} {node.kwargs}"] += 1
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend: Any = aot_autograd(fw_compiler=compiler)
    torch.compile(model, fullgraph=True, backend=backend)(x)
    return seen


def unscaled(seen: Counter[str]) -> Counter[str]:
    return Counter(re.sub(r"'scale': [0-9.]+", "", entry) for entry in seen.elements())


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_graph_of_an_identity_swap_is_that_of_the_untouched_model(library: str) -> None:
    model = timm_vit() if library == "timm" else hf("ViT")
    x = example_input(model)
    untouched = operations(model.eval(), x)
    assert any("scaled_dot_product" in name for name in untouched)
    with mitaswap.swap(model, "standard"):
        if library == "timm":
            assert operations(model, x) == untouched
        else:  # transformers names a scale where it is the default
            assert unscaled(operations(model, x)) == unscaled(untouched)
    with mitaswap.swap(model, "linear"):  # the comparison can tell graphs apart
        assert operations(model, x) != untouched


# ------------------------------------------------------------------------------------------ guards


def guards(library: str, depth: int, spec: str | None) -> list[Any]:
    """What Dynamo checks before each call of a compiled network of `depth` layers."""
    network = timm_vit(depth=depth) if library == "timm" else hf("ViT", num_hidden_layers=depth)
    model = network.eval()
    if spec is not None:
        mitaswap.swap(model, spec)
    found: list[Any] = []

    def note(entries: list[Any]) -> list[bool]:
        found.extend(entries)
        return [True] * len(entries)

    torch.compiler.reset()
    options: Any = {"guard_filter_fn": note}
    torch.compile(model, fullgraph=True, backend="eager", options=options)(example_input(model))
    return found


def of_a_layer(library: str, spec: str | None, layer: int = 1) -> list[Any]:
    """What of that belongs to one layer. An object that several layers have in common belongs to
    the first and is checked once, with a note in each of the others that it is the same.
    """
    return [g for g in guards(library, 2, spec) if f"_modules['{layer}']" in g.name]


def added(library: str, spec: str) -> int:
    """How many guards a layer has more than one of the untouched network."""
    untouched = of_a_layer(library, None)
    assert len(untouched) > 100
    return len(of_a_layer(library, spec)) - len(untouched)


@pytest.mark.parametrize("spec", ["standard", "linear", "topk(k=5)"])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_mechanism_without_a_state_adds_no_guard_to_a_layer(library: str, spec: str) -> None:
    """Before this was counted there were 16 and 19, which took a tiny network a fifth of its
    time.
    """
    assert added(library, spec) == 0


def test_nor_does_the_whole_network_have_more_guards_for_more_swapped_layers() -> None:
    """A second way to count, which does not go by names."""
    few, many, few_untouched, many_untouched = (
        len(guards("timm", depth, how)) for how in ("standard", None) for depth in (2, 4)
    )
    assert many - few == many_untouched - few_untouched > 200


@pytest.mark.parametrize(
    ("spec", "most"), [("gridded", 9), ("agent(n=4)", 1), ("mita(m=4,k=4)", 1), ("gated", 4)]
)
def test_the_grid_adds_one_and_learned_parts_add_themselves(spec: str, most: int) -> None:
    with registered(gated=Gated):
        assert 0 < added("timm", spec) <= most


@pytest.mark.parametrize("spec", ["gridded", "agent(n=4)", "gated", "performer"])
def test_what_a_layer_is_guarded_on_is_plain_or_common_to_all_layers(spec: str) -> None:
    """One object of its own (a `Seam`, a layout, options, a property), and torch 2.9 to 2.11 look
    at the whole layer before every call, which they skip in the untouched network.
    """

    def kinds(spec: str | None) -> set[type]:
        second = of_a_layer("timm", spec)
        return {type(g.value) for g in second if g.guard_type != "DUPLICATE_INPUT"}

    with registered(gated=Gated):
        new = kinds(spec) - kinds(None)
    assert new and all(issubclass(k, (nn.Module, Tensor, dict, bool, NoneType)) for k in new)


# ------------------------------------------------------------------------------------- correctness


def any_size() -> Model:
    """A network for images of every size, whose number of tokens is that of the patches."""
    torch.manual_seed(0)
    options: Any = {"dynamic_img_size": True, "class_token": False, "global_pool": "avg"}
    return awaken(timm_vit(**options)).eval()


@pytest.mark.parametrize("part", ["whole", "blocks", "patches"])
@pytest.mark.parametrize("spec", ["gridded", "standard", "linear"])
def test_grids_take_turns_and_each_is_compiled_once(spec: str, part: str) -> None:
    """Also two of as many tokens, and with forwards in between that are not compiled."""
    model, compiled = any_size(), 0
    mitaswap.swap(model, spec)
    twin = copy.deepcopy(model)

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    sizes = [(128, 288), (192, 192), (288, 128)]  # 144 tokens each
    expected = {size: run(model, images(*size)) for size in sizes}
    parts = {"whole": [twin], "blocks": list(twin.blocks), "patches": [twin.patch_embed]}[part]
    for module in parts:
        module.compile(fullgraph=True, backend=backend)
    for size in (*sizes, *sizes[::-1], *sizes):
        torch.testing.assert_close(run(twin, images(*size)), expected[size])
    for size in (*sizes, *sizes):
        torch.testing.assert_close(run(twin, images(*size)), expected[size])
        twin.forward(images(64, 64))
    assert compiled <= 4 * len(parts)


@pytest.mark.parametrize("spec", ["gridded", "standard", "linear"])
def test_an_observer_sees_compiled_forwards(spec: str) -> None:
    model, seen = any_size(), []
    handle = mitaswap.swap(model, spec)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    run(compiled, images())
    with handle.observe(lambda path, part, q, k, layout, scale: seen.append((path, layout.grid))):
        run(compiled, images())
        run(compiled, images(32, 96))
    run(compiled, images())
    paths = list(swapped_sites(model))
    assert seen == [(path, grid) for grid in ((4, 4), (2, 6)) for path in paths]


def test_mechanisms_that_go_straight_read_no_layout() -> None:
    """A compiled forward gives them none: one that reads it must say that it needs the grid."""
    specs = [Spec(n, o) for n in MECHANISMS.names() for o in MECHANISMS.get(n).samples]
    straight = [spec for spec in specs if goes_straight(mechanism(spec))]
    assert "standard" in {spec.name for spec in straight}
    model = timm_vit(depth=1).eval()
    for spec in straight:
        with mitaswap.swap(model, spec):
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(run(compiled, images()), run(model, images()))
