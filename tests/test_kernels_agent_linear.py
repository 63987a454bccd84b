"""The kernels of agent and linear attention against the references in float64: under Triton's
interpreter on any machine, and (marked gpu) on a CUDA device at lengths that fill it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import mechanism
from mitaswap.tokens import TokenLayout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="test_under_the_interpreter runs these in a process of their own"
)

#: unit roundoff; interpreted bfloat16 is truncated, not rounded
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Case(NamedTuple):
    spec: str
    layout: TokenLayout
    dim: int = 16
    dtype: torch.dtype = torch.float32
    projected: bool = False
    batch: int = 1
    heads: int = 2
    scale: float | None = None


HALF, BRAIN = torch.float16, torch.bfloat16
ELU, RELU, SOFTMAX = (f"linear(feature={feature})" for feature in ("elu", "relu", "softmax"))

SMALL = [
    Case("agent(n=9)", TokenLayout(0, (7, 9)), 24, heads=1),
    Case("agent(n=9)", TokenLayout(1, (6, 7)), 64, HALF, projected=True, scale=0.3),
    Case("agent(n=6)", TokenLayout(5, (5, 9), 2), 72, BRAIN),
    Case("agent(n=8,pool=2x4)", TokenLayout(0, (5, 9), 1), 16, projected=True),
    # more agents than a block, more windows in a row than one, and a grid of one row
    Case("agent(n=72)", TokenLayout(1, (9, 9)), 16, heads=1),
    Case("agent(n=70,pool=1x70)", TokenLayout(0, (2, 71)), 16, heads=1),
    Case("agent(n=1)", TokenLayout(2, (1, 5)), 16),
    Case("agent(n=4)", TokenLayout(1, (24, 25)), 16, HALF, heads=1),
    Case("agent(n=4)", TokenLayout(0, (3, 5)), 136, HALF),
    Case(ELU, TokenLayout(0, (7, 9)), 24, heads=1),
    Case(ELU, TokenLayout(1, (6, 7)), 64, HALF, projected=True, scale=0.3),
    Case(ELU, TokenLayout(5, (5, 9), 2), 72, BRAIN),
    Case(ELU, TokenLayout(1, (5, 6)), 136, HALF, heads=1),
    Case(RELU, TokenLayout(1, (24, 25)), 16, HALF, heads=1),
    Case(RELU, TokenLayout(1, (6, 7)), 40, projected=True),
    Case("linear(eps=0.5)", TokenLayout(1, (6, 7)), 16),
    Case(SOFTMAX, TokenLayout(0, (7, 9)), 24, heads=1),
    Case(SOFTMAX, TokenLayout(1, (24, 25)), 64, HALF, projected=True, heads=1, scale=0.3),
    Case(SOFTMAX, TokenLayout(5, (5, 9), 2), 72, BRAIN),
    Case(SOFTMAX, TokenLayout(1, (5, 6)), 136, HALF, heads=1),
]

LONG = [
    Case("agent", TokenLayout(1, (32, 33), 2), 64, BRAIN, True, 2, 3),
    Case("agent", TokenLayout(0, (32, 32)), 64, HALF, False, 64, 6),
    Case("agent(n=25)", TokenLayout(0, (200, 200)), 64, HALF, True, 1, 2),
    Case("agent(n=9)", TokenLayout(1, (64, 64)), 32, HALF, True, 2, 3),
    Case("agent(n=144)", TokenLayout(5, (40, 30), 1), 80, HALF, False, 1, 2),
    Case("agent", TokenLayout(0, (32, 32)), 128, HALF, False, 2, 3),
    Case("agent", TokenLayout(0, (40, 30)), 128, torch.float32, False, 1, 2),
    Case("agent", TokenLayout(0, (40, 30)), 256, BRAIN, True, 2, 3),
    Case(ELU, TokenLayout(0, (32, 32)), 64, HALF, False, 64, 6),
    Case(ELU, TokenLayout(1, (64, 64)), 128, HALF, True, 2, 3),
    Case(ELU, TokenLayout(1, (64, 64)), 16, BRAIN, True, 2, 3),
    Case(RELU, TokenLayout(1, (61, 53), 2), 80, BRAIN, False, 2, 3),
    Case(RELU, TokenLayout(0, (40, 30)), 128, torch.float32, False, 1, 2),
    Case(SOFTMAX, TokenLayout(0, (200, 200)), 64, HALF, True, 1, 2),
    Case(SOFTMAX, TokenLayout(0, (40, 30)), 256, BRAIN, True, 2, 3),
]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors hold NaN: what nobody writes shows."""

    def poison(fresh: Any) -> Any:
        return lambda *a, **options: fresh(*a, **options).fill_(float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    yield


def tensors(case: Case) -> list[Tensor]:
    """q, k, v and an output gradient; q, k, v as views of one projection where asked for."""
    generator = torch.Generator().manual_seed(1)
    batch, heads, tokens, dim = case.batch, case.heads, case.layout.tokens, case.dim
    if case.projected:
        joint = torch.randn(batch, tokens, 3, heads, dim, generator=generator)
        q, k, v = joint.to(DEVICE, case.dtype).permute(2, 0, 3, 1, 4)
    else:
        shape = (3, batch, heads, tokens, dim)
        q, k, v = torch.randn(shape, generator=generator).to(DEVICE, case.dtype)
    grad = torch.randn(q.shape, generator=generator).to(DEVICE, case.dtype)
    return [q, k, v, grad]


def results(case: Case, impl: str, dtype: torch.dtype, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    run = mechanism(mechanism(case.spec).spec.with_options(impl=impl))
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in inputs[:3])
    out = run(q, k, v, layout=case.layout, scale=case.scale)
    return [out, *torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype))]


def agree(case: Case, inputs: list[Tensor]) -> None:
    ours = results(case, "fused", case.dtype, inputs)
    exact = results(case, "reference", torch.float64, inputs)
    # halves: one rounding each of weights or features, of what they read, and of the result (or of
    # their gradients); float32: sums of up to some hundred terms, whose errors grow like the root
    # of their number. Numbers of size 1 / N come in float16's subnormals, 2^-24 apart.
    bound = UNIT[case.dtype] * (16 if case.dtype == torch.float32 else 4)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, exact, strict=True):
        assert a.dtype == case.dtype and a.shape == b.shape
        if case.dtype == torch.float16:
            b = b.to(torch.float16).double()
        error = (a.double() - b).norm().item()
        allowed = bound * b.norm().item()
        if case.dtype == torch.float16:
            allowed += 2.0**-24 * b.numel() ** 0.5
        assert error <= allowed, f"{name}: {error:.2e} of {allowed:.2e}"


@pytest.mark.skipif(INTERPRETED, reason="is the interpreted run itself")
def test_under_the_interpreter() -> None:
    # Triton looks at the variable when it is imported, which other tests may have done already
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@on_interpreter
@pytest.mark.parametrize("case", SMALL, ids=lambda c: f"{c.spec} {c.layout} {c.dim} {c.dtype}")
def test_small(case: Case, poisoned: None) -> None:
    agree(case, tensors(case))


@on_interpreter
@pytest.mark.parametrize("spec", ["agent(n=4)", ELU, SOFTMAX])
def test_numbers_far_from_one(spec: str, poisoned: None) -> None:
    case = Case(spec, TokenLayout(1, (6, 7)), 16)
    q, k, v, grad = tensors(case)
    for far in ([q * 30, k * 30, v, grad], [q - 100, k - 90, v * 1e3, grad * 1e-3]):
        ours = results(case, "fused", torch.float32, far)
        exact = results(case, "reference", torch.float64, far)
        assert all(x.isfinite().all() for x in ours)
        assert (ours[0].double() - exact[0]).norm() <= 1e-3 * exact[0].norm()


@on_interpreter
def test_parts_and_whole_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program per head, which many heads bring about, and many are the same sum."""
    from mitaswap.kernels import tiles

    for spec in ("agent(n=4)", ELU, SOFTMAX):
        case = Case(spec, TokenLayout(1, (9, 10)), 16)
        with monkeypatch.context() as patched:
            name = "agent" if spec.startswith("agent") else "linear"
            module = __import__(f"mitaswap.kernels.{name}", fromlist=["split"])
            patched.setattr(
                module, "split", lambda n, others, block, _: tiles.split(n, 1, block, 1)
            )
            agree(case, tensors(case))


@on_interpreter
def test_operators_keep_the_rules() -> None:
    from mitaswap.kernels import agent, linear

    q, k, v, _ = tensors(Case("", TokenLayout(1, (5, 6)), projected=True))
    wanted = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(agent.agent, (*wanted, [1, 5, 6, 2, 2], 0.25))
    torch.library.opcheck(linear.linear, (*wanted, "elu", 1.0, 1e-6))


@on_interpreter
@pytest.mark.parametrize("spec", ["agent(n=4,impl=fused)", "linear(impl=fused)"])
def test_traced_whole(spec: str) -> None:
    part, layout = mechanism(spec), TokenLayout(1, (5, 6))
    q, k, v, grad = tensors(Case(spec, layout, projected=True))
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    eager = part(*inputs, layout=layout)
    traced = torch.compile(lambda *x: part(*x, layout=layout), fullgraph=True, backend="aot_eager")(
        *inputs
    )
    assert torch.equal(traced, eager)
    pairs = zip(*(torch.autograd.grad(x, inputs, grad) for x in (traced, eager)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@on_interpreter
def test_empty_batches() -> None:
    for spec in ("agent(n=4,impl=fused)", "linear(impl=fused)"):
        q = torch.randn(0, 2, 30, 16, requires_grad=True)
        out = mechanism(spec)(q, q, q, layout=TokenLayout(0, (5, 6)))
        out.sum().backward()
        assert out.shape == q.shape and q.grad is not None


@pytest.mark.skipif(INTERPRETED, reason="the interpreter stands for the device there")
@pytest.mark.parametrize("spec", ["agent(n=4)", "linear"])
def test_without_a_device_the_kernels_are_refused(spec: str) -> None:
    q = torch.randn(1, 2, 42, 16)
    layout = TokenLayout(0, (6, 7))
    auto, fused, reference = (
        mechanism(mechanism(spec).spec.with_options(impl=impl))
        for impl in ("auto", "fused", "reference")
    )
    with pytest.raises(MitaswapError, match="no kernel for tensors on cpu, only for CUDA; use"):
        fused(q, q, q, layout=layout)
    assert torch.equal(auto(q, q, q, layout=layout), reference(q, q, q, layout=layout))


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("agent(n=4,bias=true,impl=fused)", "bias=true"),
        ("linear(feature=relu,norm=rms,impl=fused)", "norm=rms"),
    ],
)
def test_options_without_a_kernel_are_refused(spec: str, what: str) -> None:
    q = torch.randn(1, 2, 42, 16)
    with pytest.raises(MitaswapError, match=f"no kernel for {what}; use impl=auto or"):
        mechanism(spec)(q, q, q, layout=TokenLayout(0, (6, 7)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL + LONG, ids=str)
def test_on_the_device(case: Case) -> None:
    inputs = tensors(case)
    agree(case, inputs)
    # no atomics, so the same every time: a compiler's race showed here
    first, second = (results(case, "fused", case.dtype, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("spec", ["agent(n=4)", "linear"])
def test_auto_takes_the_kernel_where_it_can(spec: str, dtype: torch.dtype) -> None:
    from torch.profiler import ProfilerActivity, profile

    q = torch.randn(1, 2, 42, 16, device="cuda", dtype=dtype)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        mechanism(spec)(q, q, q, layout=TokenLayout(0, (6, 7)))
    names = {event.key for event in seen.key_averages()}
    assert ("read_kernel" in names) == (dtype == torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["agent(n=16)", "linear", SOFTMAX])
def test_compiles_whole_and_is_captured(spec: str) -> None:
    case = Case(spec, TokenLayout(1, (20, 20)), 64, torch.float16, True, 2, 3)
    q, k, v, grad = tensors(case)
    part = mechanism(case.spec)

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = part(q, k, v, layout=case.layout)
        return (out, *torch.autograd.grad(out, (q, k, v), grad))

    eager = step(q, k, v)
    whole = torch.compile(lambda *x: part(*x, layout=case.layout), fullgraph=True)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = whole(*inputs)
    for a, b in zip((out, *torch.autograd.grad(out, inputs, grad)), eager, strict=True):
        assert torch.equal(a, b)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(q, k, v)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
