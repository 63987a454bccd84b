"""Mechanisms that need the attention module's input x get it, of this very forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from networks import FromInput, build, example_of, one_thread, registered, run, timm_vit
from torch import nn

import mitaswap
from mitaswap.surgery import swapped_sites
from mitaswap.surgery.tap import InputTap

EACH_ROUTE = ["timm-vit", "hf-vit", "hand-made"]


@pytest.fixture(autouse=True, scope="module")
def mechanisms_of_the_tests() -> Iterator[None]:
    with one_thread(), registered(from_input=FromInput):
        yield


@pytest.mark.parametrize("name", EACH_ROUTE)
def test_x_is_what_the_module_was_given(name: str) -> None:
    model, example = build(name), example_of(name)
    seen: dict[str, torch.Tensor] = {}
    with mitaswap.swap(model, "from_input", example=example):
        for path, part in swapped_sites(model).items():
            host = model.get_submodule(path)

            def note(module: nn.Module, args: tuple, kwargs: dict, path: str = path) -> None:
                seen[path] = [*args, *kwargs.values()][0]

            def compare(
                q: torch.Tensor, *args: object, path: str = path, **extra: torch.Tensor
            ) -> torch.Tensor:
                assert torch.equal(extra["x"], seen[path])
                return torch.zeros_like(q)

            host.register_forward_pre_hook(note, with_kwargs=True)
            part.reference = compare
        run(model, example)
    assert seen


@pytest.mark.parametrize("name", EACH_ROUTE)
def test_x_reaches_copies_and_pickles_and_is_not_kept(name: str) -> None:
    model, example = build(name), example_of(name)
    untouched = run(model, example)
    with mitaswap.swap(model, "from_input", example=example):
        want = run(model, example)
        assert not torch.equal(want, untouched)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(twin, example), want)
            mitaswap.revert(twin)
            assert torch.equal(run(twin, example), untouched)
        for path in swapped_sites(model):
            assert model.get_submodule(path)._mitaswap.tap.x is None
    assert torch.equal(run(model, example), untouched)
    assert not any(module._forward_pre_hooks_with_kwargs for module in model.modules())


def test_x_under_compile_and_checkpointing() -> None:
    model = timm_vit().eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with mitaswap.swap(model, "from_input"):
        with torch.no_grad():
            want = model(x)
            torch.compiler.reset()
            got = torch.compile(model, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(got, want)
        model.set_grad_checkpointing()
        torch.testing.assert_close(model.train()(x), want, rtol=1e-4, atol=1e-5)
        model(x).sum().backward()
        assert all(part.weight.grad is not None for part in swapped_sites(model).values())


def test_feature_maps_are_flattened() -> None:
    tap = InputTap("here", channels_last=False)
    maps = torch.randn(2, 8, 3, 5)
    tap.before(nn.Identity(), (maps,), {})
    assert torch.equal(tap.take(torch.zeros(2, 1, 15, 4)), maps.flatten(2).mT)
    tap = InputTap("here", channels_last=True)
    tap.before(nn.Identity(), (), {"x": maps.permute(0, 2, 3, 1)})
    assert torch.equal(tap.take(torch.zeros(2, 1, 15, 4)), maps.flatten(2).mT)


@pytest.mark.parametrize("given", [None, torch.zeros(2, 9, 8), torch.zeros(18, 8)])
def test_an_input_that_is_not_the_tokens_is_refused(given: torch.Tensor | None) -> None:
    tap = InputTap("blocks.0.attn", channels_last=False)
    tap.before(nn.Identity(), () if given is None else (given,), {})
    with pytest.raises(mitaswap.MitaswapError) as error:
        tap.take(torch.zeros(2, 1, 10, 4))
    got = "none" if given is None else str(list(given.shape))
    assert str(error.value).startswith(
        "blocks.0.attn: its mechanism needs the module's input, one row for each of the 10 tokens, "
        f"got {got}; choose"
    )
