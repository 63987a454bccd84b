"""Compiled forwards call one mechanism for all layers that have equal ones: which mechanisms, and
that nothing of a layer's own is lost by it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Gated, Sharper, awaken, hf, images, one_thread, registered, run, timm_vit
from torch import Tensor

import mitaswap
from mitaswap.errors import SwapError
from mitaswap.mechanisms import Mechanism, mechanism
from mitaswap.surgery import swapped_sites
from mitaswap.surgery.attend import is_stateless
from mitaswap.surgery.interface import name_in
from mitaswap.surgery.seam import Swapped

#: mechanisms of which each layer has one of its own
OWN = ("moody", "counted", "gated", "performer", "linear+dwc", "agent(n=4,bias=true)")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with one_thread(), registered(moody=Moody, counted=Counted, gated=Gated), torch.no_grad():
        torch.compiler.reset()
        yield
        torch.compiler.reset()


class Moody(Mechanism):
    """Softmax attention times 2 while it trains."""

    card = Sharper.card

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, scale=extra["scale"])
        return out * 2 if self.training else out


class Counted(Mechanism):
    """Softmax attention times an attribute of its own."""

    card = Sharper.card

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.factor = 3.0

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=extra["scale"]) * self.factor


def test_only_a_mechanism_that_is_nothing_but_class_options_and_site_is_shared() -> None:
    for spec in OWN:
        (part,) = swapped(spec)
        assert not is_stateless(part), spec
    for spec in ("standard", "linear", "agent(n=4)", "mita(m=4,k=4)"):
        (part,) = swapped(spec)
        assert is_stateless(part), spec


def swapped(spec: str) -> list[Mechanism]:
    model = timm_vit(depth=1)
    mitaswap.swap(model, spec)
    return list(swapped_sites(model).values())


def test_what_a_mechanism_has_of_its_own_is_seen_by_compiled_forwards() -> None:
    for spec in ("moody", "counted"):
        model = awaken(timm_vit()).eval()
        mitaswap.swap(model, spec)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        outputs = [run(compiled, images())]
        for part in swapped_sites(model).values():
            part.train()
            part.factor = 0.5  # type: ignore[assignment]
        outputs.append(run(compiled, images()))
        torch.testing.assert_close(outputs[1], run(model, images()))
        assert not torch.allclose(*outputs, atol=1e-3)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_options_of_one_class_are_told_apart(library: str) -> None:
    """Between layers, and in one layer from one swap to the next."""
    model = awaken(timm_vit() if library == "timm" else hf("ViT")).eval()
    compiled, seen = torch.compile(model, fullgraph=True, backend="eager"), []
    one, other = "linear", "linear(feature=relu)"
    for to in ({"*": one}, {"*": other}, {"0": one, "1": other}, {"0": other, "1": one}):
        with mitaswap.swap(model, to):
            seen.append(run(compiled, images()))
            torch.testing.assert_close(seen[-1], run(model, images()))
    for i, output in enumerate(seen):
        assert all(not torch.allclose(output, each, atol=1e-4) for each in seen[:i])


def test_a_function_of_ours_has_another_name_in_another_process() -> None:
    model = awaken(hf("ViT")).eval()
    mitaswap.swap(model, {"0": "linear", "1": "linear(feature=relu)"})
    expected = run(model, images())
    configs = [module.config for module in model.modules() if isinstance(module, Swapped)]
    names = [config._attn_implementation for config in configs]
    assert len(set(names)) == 2
    for config, name in zip(configs, reversed(names), strict=True):
        name_in(config, name)
    wrong = torch.compile(model, fullgraph=True, backend="eager")
    assert not torch.allclose(run(wrong, images()), expected, atol=1e-4), "the name decides"
    again = pickle.loads(pickle.dumps(model))
    compiled = torch.compile(again, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, images()), expected)


def test_a_copy_needs_no_compilation_of_its_own() -> None:
    compiled = 0

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    model = timm_vit().eval()
    mitaswap.swap(model, "linear")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.compile(each, fullgraph=True, backend=backend)(images())
    assert compiled == 1


def test_a_mechanism_that_the_class_knows_cannot_be_replaced_behind_its_back() -> None:
    model = timm_vit().eval()
    attention = model.blocks[0].attn
    with mitaswap.swap(model, "linear"):
        with pytest.raises(SwapError, match=r"blocks.0.attn is swapped to linear, .* swap again"):
            attention.mitaswap = mechanism("standard")
        assert str(attention.mitaswap.spec) == "linear"
    with mitaswap.swap(model, "gated"):
        attention.mitaswap = copy.deepcopy(attention.mitaswap)  # as libraries for adapters do
