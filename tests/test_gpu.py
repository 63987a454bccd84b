"""What only a CUDA device can show: `make gpu-test` runs these, the plain suite leaves them out."""

from __future__ import annotations

import pytest
import torch
from attention_laws import SPECS, accepts, attend

import mitaswap
from mitaswap.tokens import TokenLayout

pytestmark = pytest.mark.gpu

LAYOUT = TokenLayout(1, (7, 9))


@pytest.mark.parametrize("spec", [spec for spec in SPECS if accepts(spec, LAYOUT)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_agrees_with_float64_on_the_cpu(spec: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, LAYOUT.tokens, 24)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    part = mitaswap.mechanism(spec)
    exact = attend(part, q.double(), k.double(), v.double(), LAYOUT)
    ours = attend(part.cuda(), q.cuda(), k.cuda(), v.cuda(), LAYOUT)
    assert ours.dtype == dtype and ours.is_cuda
    error = (ours.cpu().double() - exact).norm() / exact.norm()
    # one rounding of the result, and float32 inside, whose error grows where sums cancel; standard
    # rounds its weights to `dtype` too
    inner = 1e-5 if "convex" in part.traits else 1e-4
    assert error < inner + {torch.float32: 0, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_identity_swap_is_exact_and_others_move(dtype: torch.dtype) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3).eval().cuda().to(dtype)
    x = torch.randn(4, 3, 224, 224, device="cuda", dtype=dtype)
    with torch.no_grad():
        before = model(x)
        with mitaswap.swap(model, "standard"):
            assert torch.equal(model(x), before)
        with mitaswap.swap(model, "mita(m=16,k=16)"):
            assert not torch.allclose(model(x), before, atol=1e-3)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "spec",
    [
        "standard",
        "linear",
        "agent(n=9)",
        "mita(m=9,k=9)",
        "linear+dwc+gate",
        "nsa(block=2,k=3,span=2,stride=2,window=3)",
    ],
)
def test_compiles_whole_with_inductor(spec: str) -> None:
    import timm

    torch.manual_seed(0)
    torch.compiler.reset()
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval().cuda()
    mitaswap.convert(model, spec)
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.no_grad():
        eager = model(x)
        compiled = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-3)
