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
from torch import Tensor, nn

import mitaswap
from mitaswap.errors import MitaswapError, SwapError
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
        with pytest.raises(SwapError, match=r"blocks.0.attn is swapped to linear; .* swap again"):
            attention.mitaswap = mechanism("standard")
        assert str(attention.mitaswap.spec) == "linear"
    with mitaswap.swap(model, "gated"):
        attention.mitaswap = copy.deepcopy(attention.mitaswap)  # as libraries for adapters do


def _scaled(asked: Mechanism, out: Tensor) -> Tensor:
    return out * 2 if asked.training else out


class Helped(Mechanism):
    """Its mode is read outside its class."""

    card = Sharper.card

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        return _scaled(self, F.scaled_dot_product_attention(q, k, v, scale=extra["scale"]))


class Turned(Helped):
    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        return -super().reference(q, k, v, **extra)


def test_compiled_forwards_follow_the_mode_wherever_it_is_read() -> None:
    with registered(helped=Helped):
        model = timm_vit().eval()
        mitaswap.swap(model, "helped")
        compiled, x = torch.compile(model, backend="eager"), images()
        torch.testing.assert_close(compiled(x), model(x))
        model.train()
        torch.testing.assert_close(compiled(x), model(x))


def test_no_way_around_the_rules_of_replacing() -> None:
    with registered(helped=Helped, turned=Turned):
        model = timm_vit().eval()
        attention = model.blocks[0].attn
        with mitaswap.swap(model, "helped"), pytest.raises(SwapError, match="swap again"):
            attention.mitaswap = Turned()
        with mitaswap.swap(model, "linear"):
            with pytest.raises(SwapError, match="swap again"):
                attention.add_module("mitaswap", mechanism("standard"))
            with pytest.raises(SwapError, match="swap again"):
                del attention.mitaswap
            with pytest.raises(MitaswapError, match="options of linear are fixed"):
                attention.mitaswap.options = mechanism("linear(feature=relu)").options


class Around(nn.Module):
    """As an adapter's module that hands everything on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)


def test_copies_of_a_model_with_an_adapter_around_the_mechanism() -> None:
    model = timm_vit().eval()
    mitaswap.swap(model, "performer")
    for block in model.blocks:
        block.attn.mitaswap = Around(block.attn.mitaswap)
    x = images()
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))


def test_a_layer_built_from_a_shadow_config_says_so() -> None:
    model = hf("ViT").eval()
    mitaswap.swap(model, "linear")
    swapped = next(m for m in model.modules() if type(m).__name__.startswith("Swapped"))
    original = type(swapped)._mitaswap_original
    with pytest.raises(SwapError, match="build it from the model's own config"):
        original(swapped.config).eval()(torch.randn(2, 17, 32))


def test_a_forward_that_was_patched_between_two_swaps_is_used() -> None:
    model, x = timm_vit().eval(), images()
    cls = type(model.blocks[0].attn)
    with mitaswap.swap(model, "standard"):
        pass
    plain = cls.forward
    try:
        cls.forward = lambda self, x, *rest, **more: 3 * plain(self, x, *rest, **more)
        patched = model(x)
        with mitaswap.swap(model, "standard"):
            torch.testing.assert_close(model(x), patched)
    finally:
        cls.forward = plain
