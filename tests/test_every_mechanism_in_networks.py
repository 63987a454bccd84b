"""Every mechanism in networks: a timm ViT, a Hugging Face ViT and a ViT-5.

The ViT-5's own attention (q/k norm, RoPE, registers at the tail) is a site like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import awaken, hf, one_thread, timm_vit
from torch import Tensor, nn
from vit5 import ViT5

import mitaswap
from mitaswap import Spec, TokenLayout
from mitaswap.errors import SwapError
from mitaswap.mechanisms import MECHANISMS
from mitaswap.surgery import swapped_sites, walk


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "ViT-5": ViT5().eval(),
        "timm": awaken(timm_vit(img_size=96, patch_size=8)).eval(),
        "transformers": awaken(hf("ViT")).eval(),
    }


def pictures(model: nn.Module, height: int = 96, width: int = 96) -> Tensor:
    size = getattr(getattr(model, "config", None), "image_size", None)
    height, width = (size, size) if size else (height, width)
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def fitting(name: str, model: nn.Module, x: Tensor) -> str:
    (layout, *_) = [site.layout for site in walk(model, x) if site.layout is not None]
    return str(Spec(name, MECHANISMS.get(name).suggest(layout)))


@pytest.mark.parametrize("network", ["ViT-5", "timm", "transformers"])
@pytest.mark.parametrize("name", MECHANISMS.names())
def test_runs_learns_and_leaves_no_trace(
    name: str, network: str, networks: dict[str, nn.Module]
) -> None:
    model = networks[network]
    x = pictures(model)
    before, keys = logits(model, x), list(model.state_dict())
    spec = fitting(name, model, x)
    if "project" in mitaswap.mechanism(spec).needs and network == "ViT-5":
        with pytest.raises(SwapError, match="needs the module's own key and value projections"):
            mitaswap.swap(model, spec, example=x)
        part = mitaswap.mechanism(spec)
        spec = str(part.spec.with_options(**part.unprojected))  # what the error says
    with mitaswap.swap(model, spec, example=x):
        inside = logits(model, x)
        assert inside.isfinite().all()
        assert torch.equal(logits(copy.deepcopy(model), x), inside)
        if name == "standard":
            assert torch.equal(inside, before)
        else:
            assert not torch.allclose(inside, before, atol=1e-6)
        assert [key for key in model.state_dict() if ".mitaswap." not in key] == keys
        out = model(x)
        (out if isinstance(out, Tensor) else out.logits).square().sum().backward()
        for path, part in swapped_sites(model).items():
            assert all(p.grad is not None for p in part.parameters()), path
    model.zero_grad(set_to_none=True)
    assert torch.equal(logits(model, x), before)
    assert list(model.state_dict()) == keys


def test_vit5_is_a_site(networks: dict[str, nn.Module]) -> None:
    """What arrives at a mechanism is q and k after norm and rotation, registers as a suffix."""
    model = networks["ViT-5"]
    x = pictures(model, 64, 96)
    sites = walk(model, x)
    assert [site.path for site in sites] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(site.swappable and site.layout == TokenLayout(1, (8, 12), 4) for site in sites)
    seen: list[tuple[Tensor, Tensor]] = []
    real, upstream = F.scaled_dot_product_attention, []

    def note(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        upstream.append((q, k))
        return real(q, k, v, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", note)
        logits(model, x)
    handle = mitaswap.swap(model, "standard", example=x)
    with handle, handle.observe(lambda path, part, q, k, layout, scale: seen.append((q, k))):
        logits(model, x)
    assert len(seen) == 2 == len(upstream)
    for got, want in zip(seen, upstream, strict=True):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_vit5_at_other_sizes(networks: dict[str, nn.Module]) -> None:
    """Learned parts of a grid follow it: the registers stay what they are."""
    model = networks["ViT-5"]
    with mitaswap.swap(model, "linformer(n=9)+dwc", example=pictures(model)):
        for height, width in ((96, 96), (64, 96), (96, 64), (128, 128), (40, 48)):
            assert logits(model, pictures(model, height, width)).isfinite().all()


BAD = {
    "mita(m=200)": "m=200 must be between 1 and the 144 patches (tokens 1 + 12x12); use m=144",
    "agent(n=13)": "13 landmarks do not fit a 12x12 grid as a x b windows; the nearest count",
    "topk(k=146)": "k=146 must be between 1 and the 145 tokens (tokens 1 + 12x12); use k=145",
    "moba(n=145)": "145",
    "bra(n=16,k=17)": "k=17 must be between 1 and the 16",
    "nsa(k=3,window=4)": "window=4 must be odd, with the query in its middle; use window=5",
    "dat(stride=13)": "stride=13",
    "dat(groups=5)": "groups=5",
    "spark(k=9,r=200)": "r=200",
    "reformer(buckets=7)": "buckets=7",
    "pvt(r=13)": "r=13",
    "nystrom(m=146)": "m=146",
    "linear+dwc(kernel=4)": "kernel=4 must be odd and at least 1, or the convolution is not",
    "standard+window(size=2)": "size=2 must be odd, with the query in its middle; use size=3",
}


@pytest.mark.parametrize("spec", BAD)
def test_an_impossible_option_names_site_need_and_nearest_value(
    spec: str, networks: dict[str, nn.Module]
) -> None:
    model = networks["timm"]
    with pytest.raises(SwapError) as error, mitaswap.swap(model, spec):
        pass
    text = str(error.value)
    assert text.startswith("blocks.0.attn: ") and BAD[spec] in text
    assert any(word in text for word in ("use ", "nearest", "must be")), text
    assert not swapped_sites(model)
