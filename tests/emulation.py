"""Kernels in CUDA C++ on the CPU: their sources compiled with the headers in `emulated`, called as
a device would call them. And the calls of MiTA's kernels for short sequences to try them with.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mitaswap.kernels import mita_head, mita_head_backward, mita_stream
from mitaswap.kernels.mita_call import Saved, Sizes
from mitaswap.kernels.mita_head_backward import Shape
from mitaswap.kernels.mita_plan import empty_saved
from mitaswap.kernels.nvrtc import Argument
from mitaswap.mechanisms import mechanism
from mitaswap.operators.pool import pool_shape
from mitaswap.tokens import TokenLayout

EMULATED = Path(__file__).parent / "emulated"
KERNELS = Path(mita_head.__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

F16, BF16 = torch.float16, torch.bfloat16
#: bytes of shared memory of a multiprocessor (H100)
ROOM = 228 * 1024
#: unit roundoff
UNIT = {F16: 2.0**-11, BF16: 2.0**-8}


class Case(NamedTuple):
    spec: str
    layout: TokenLayout
    dtype: torch.dtype = F16


CASES = [
    Case("mita", TokenLayout(0, (14, 14))),
    Case("mita", TokenLayout(1, (14, 14)), BF16),
    Case("mita(m=9,k=7)", TokenLayout(1, (6, 7))),
    Case("mita(m=20,k=18,pool=4x5)", TokenLayout(5, (9, 11), 2), BF16),
    Case("mita(m=12,k=30,variant=route-only)", TokenLayout(0, (7, 9))),
    # the most experts and the fewest keys, the fewest experts and the most keys, hardly any tokens
    Case("mita(m=32,k=1,pool=4x8)", TokenLayout(0, (8, 8))),
    Case("mita(m=1,k=32)", TokenLayout(1, (5, 9)), BF16),
    Case("mita(m=1,k=3)", TokenLayout(0, (1, 3))),
    Case("mita(m=12,k=9,pool=4x3)", TokenLayout(0, (5, 3))),
    Case("mita(m=4,k=6,landmark_tokens=released)", TokenLayout(1, (6, 6))),
    Case("mita(m=30,k=32,pool=5x6)", TokenLayout(1, (15, 16), 15), BF16),
    # rows, tiles and warps that are just full, and just not
    Case("mita(m=16,k=16)", TokenLayout(0, (4, 4))),
    Case("mita(m=16,k=24)", TokenLayout(1, (4, 8))),
    Case("mita(m=20,k=19,pool=4x5,variant=route-only)", TokenLayout(1, (8, 16)), BF16),
    Case("mita(m=28,k=8,pool=4x7)", TokenLayout(0, (16, 16))),
]


def sizes_of(case: Case) -> Sizes:
    o = mechanism(case.spec).options
    windows = pool_shape(o.m, case.layout.grid, o.pool)
    first = 0 if o.landmark_tokens == "released" else case.layout.prefix
    return Sizes(first, *case.layout.grid, *windows, o.k, o.s, int(o.variant == "full"))


def scales_of(case: Case, dim: int = 64) -> tuple[float, float]:
    """Factors of routed and of shared logits."""
    scale = dim**-0.5
    released = mechanism(case.spec).options.shared_scale == "released"
    return scale, scale * scale if released else scale


def inputs_of(case: Case, batch: int = 2, heads: int = 1) -> tuple[Tensor, ...]:
    """q, k, v as views of one projection."""
    generator = torch.Generator().manual_seed(3)
    joint = torch.randn(batch, case.layout.tokens, 3, heads, 64, generator=generator)
    return joint.to(case.dtype).permute(2, 0, 3, 1, 4).unbind(0)


def log_sum_exp(case: Case, q: Tensor, k: Tensor, marks: Tensor) -> Tensor:
    """Of each query's logits, base 2, [B * H, N], from float64 and landmarks [B * H, m, D]."""
    scale, again = scales_of(case)
    part = mechanism(mechanism(case.spec).spec.with_options(impl="reference"))
    routing = part.route(q, k, layout=case.layout, scale=scale)
    members, choice = routing.members.flatten(0, 1), routing.choice.flatten(0, 1)
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    held = torch.zeros(len(k), marks.shape[1], k.shape[1]).scatter_(-1, members, 1.0).bool()
    mine = held.gather(1, choice[..., :1].expand(-1, -1, k.shape[1]))
    kept = (q @ k.transpose(-1, -2) * scale).masked_fill(~mine, float("-inf"))
    if sizes_of(case).shared:
        kept = torch.cat([kept, q @ marks.transpose(-1, -2) * again], -1)
    return kept.logsumexp(-1) / math.log(2)


class Emulator:
    """Compiles kernels for the CPU, once for each set of fixed numbers, and calls them.

    Args:
        folder: where libraries go, and are found.
        races: whether accesses to shared memory without order are looked for (slower).
        kernels: where the sources are.
    """

    def __init__(self, folder: Path, races: bool = False, kernels: Path = KERNELS) -> None:
        self.folder, self.races, self.kernels = folder, races, kernels
        self.built: dict[object, ctypes.CDLL] = {}

    def library(self, kernel: str, fixed: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
        if (kernel, fixed) not in self.built:
            words = "-".join((kernel, *(f"{key}{value}" for key, value in fixed)))
            to = self.folder / f"{words}.so"
            if not to.exists():  # another process may have built it
                self._build(to, kernel, fixed)
            self.built[kernel, fixed] = ctypes.CDLL(str(to))
        return self.built[kernel, fixed]

    def _build(self, to: Path, kernel: str, fixed: tuple[tuple[str, int], ...]) -> None:
        command = ["g++", "-std=c++17", "-w", "-fPIC", f"-DKERNEL={kernel}"]
        command += [f"-I{EMULATED}", f"-I{self.kernels}"]
        command += [f"-D{key}={value}" for key, value in fixed]
        if self.races:  # the compiler's calls, but not its library
            command += ["-DRACES", "-g", "-O1", "-fsanitize=thread"]
        made = to.with_suffix(f".{os.getpid()}.o")
        subprocess.run([*command, "-c", str(EMULATED / "launch.cpp"), "-o", str(made)], check=True)
        linked = made.with_suffix(".so")
        subprocess.run(["g++", "-shared", str(made), "-ldl", "-o", str(linked)], check=True)
        linked.replace(to)

    def launch(
        self,
        kernel: str,
        fixed: tuple[tuple[str, int], ...],
        blocks: int,
        threads: int,
        shared: int,
        arguments: list[Argument],
    ) -> None:
        code = self.library(kernel, fixed)
        assert (code.threads(), code.bytes()) == (threads, shared)
        given = [kind(x) for x, kind in arguments]
        places = [ctypes.cast(ctypes.pointer(x), ctypes.c_void_p) for x in given]
        code.launch(blocks, (ctypes.c_void_p * len(places))(*places))

    def assert_in_order(self) -> None:
        for code in self.built.values():
            code.races.restype = ctypes.c_char_p
            places = code.races().decode().split()
            if places:
                command = ["addr2line", "-i", "-e", code._name, *places]
                found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
                raise AssertionError(f"races in {sorted(set(found.split()))}")


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all processes of a test run."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"
    folder.mkdir(exist_ok=True)
    return folder


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a kernel is to write, which nobody wrote to before."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 1234, dtype=dtype)


def emulate_forward(
    emulator: Emulator, case: Case, q: Tensor, k: Tensor, v: Tensor, save: bool = True,
    stream: int = 0,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """The output and what is saved.

    Args:
        stream: bytes of a multiprocessor's shared memory for `mita_stream`; 0: by `mita_head`.
    """
    sizes, (batch, heads, tokens, dim) = sizes_of(case), q.shape
    saved = Saved(*(unwritten(*x.shape, dtype=x.dtype) for x in empty_saved(q, sizes)))
    out = unwritten(batch, tokens, heads, dim, dtype=q.dtype).transpose(1, 2)
    name, fixed, threads = "mita_head", mita_head.fixed(q, sizes, save), mita_head.THREADS
    bytes = mita_head.shared_bytes(tokens, sizes.m, q.dtype)
    if stream:
        bytes, stages = mita_stream.shape_of(tokens, sizes, q.dtype, stream)
        name, threads = "mita_stream", mita_stream.THREADS
        fixed = mita_stream.fixed(q, sizes, save, stages)
    emulator.launch(
        name, fixed, batch * heads, threads, bytes,
        mita_head.arguments(q, k, v, out, saved if save else None, *scales_of(case)),
    )  # fmt: skip
    return out, saved


def assert_agrees(case: Case, given: tuple[Tensor, ...], out: Tensor, saved: Saved) -> None:
    """The output and what is saved are those of the reference in float64."""
    part = mechanism(mechanism(case.spec).spec.with_options(impl="reference"))
    exact = [x.double() for x in given]
    wanted = part(*exact, layout=case.layout)
    unit = UNIT[case.dtype]
    # one rounding each of weights, V~, what experts give, and the result
    assert (out.double() - wanted).norm() <= 4 * unit * wanted.norm()
    routing = part.route(*exact[:2], layout=case.layout, scale=64**-0.5)
    assert routing is not None
    members, choice = routing.members.flatten(0, 1), routing.choice.flatten(0, 1)
    assert torch.equal(saved.members.long().sort(-1)[0], members.sort(-1)[0])
    assert torch.equal(saved.route[:, 0].long(), choice[..., 0])
    assert torch.equal(saved.order.long(), choice[..., 0].argsort(dim=1, stable=True))
    ends = torch.nn.functional.one_hot(choice[..., 0], saved.starts.shape[1] - 1).sum(1).cumsum(1)
    assert torch.equal(saved.starts.long(), torch.nn.functional.pad(ends, (1, 0)))
    marks = saved.exact.double()
    scores = marks @ exact[1].flatten(0, 1).transpose(-1, -2) / 8
    assert torch.equal(saved.marks, saved.exact.to(case.dtype))
    if sizes_of(case).shared:
        torch.testing.assert_close(
            saved.probe_lse.double(), scores.logsumexp(-1), atol=1e-4, rtol=0
        )
        read = scores.softmax(-1) @ exact[2].flatten(0, 1)
        assert (saved.values.double() - read).norm() <= 2 * unit * read.norm()
    lse = log_sum_exp(case, *exact[:2], marks)
    torch.testing.assert_close(saved.lse.double(), lse, atol=8 * unit, rtol=0)


def assert_agrees_on_a_device(
    case: Case, fits: Callable[..., bool], forward: Callable[..., None], patch: pytest.MonkeyPatch
) -> None:
    """A call by one of `mita_plan`'s forwards of whole heads, and its gradients, are those of the
    reference in float64, the same in each call, also where nothing is saved.
    """
    from mitaswap.kernels import mita_plan

    taken: list[int] = []
    counted = lambda *a: taken.append(1) or forward(*a)  # noqa: E731
    patch.setattr(mita_plan, "WHOLE_HEADS", ((fits, counted),))
    q, k, v = (x.cuda().requires_grad_() for x in inputs_of(case, 3, 2))
    part = mechanism(mechanism(case.spec).spec.with_options(impl="fused"))
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    wanted = mechanism(case.spec)(*exact, layout=case.layout)
    grad = torch.randn_like(wanted)
    found = [part(q, k, v, layout=case.layout) for _ in range(2)]
    with torch.no_grad():
        found.append(part(q, k, v, layout=case.layout))
    assert len(taken) == 3
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    ours = [found[0], *torch.autograd.grad(found[0], (q, k, v), grad.to(case.dtype))]
    theirs = [wanted, *torch.autograd.grad(wanted, exact, grad)]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).norm() <= 4 * UNIT[case.dtype] * b.norm()


def assert_is_captured(case: Case, batch: int, heads: int) -> None:
    """A replayed graph gives what a call gives, of other inputs than it was captured with."""
    part = mechanism(mechanism(case.spec).spec.with_options(impl="fused"))
    q, k, v = (x.cuda() for x in inputs_of(case, batch, heads))
    with torch.no_grad():
        part(q, k, v, layout=case.layout)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = part(q, k, v, layout=case.layout)
        q.copy_(q.flip(0))
        graph.replay()
        assert torch.equal(out, part(q, k, v, layout=case.layout))


def one_landmark(case: Case, scores: Tensor) -> tuple[Tensor, ...]:
    """q, k, v with these scores [N] of the only landmark, to the bit."""
    q, k, v = (x[:1].clone() for x in inputs_of(case))
    q.zero_()
    q[..., 0] = 1.0
    k.zero_()
    k[..., 0] = scores
    return q, k, v


#: scores that are hard to choose the largest of
SCORES = {
    "equal": torch.zeros(99),
    "three values": torch.arange(99.0) // 40,
    "outliers": torch.where(torch.arange(99) % 7 == 0, 50000.0, -1.0),
    "octaves": torch.exp2(-(torch.arange(99.0) % 24)),
    "heavy tails": torch.linspace(-1, 1, 99).sign() * torch.linspace(-1, 1, 99).abs() ** 9,
    "falling": -torch.arange(99.0),
}


def emulate_backward(
    emulator: Emulator, case: Case, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    saved: Saved, shape: Shape | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v.

    Args:
        shape: how a head is cut; as on an H100 by default.
    """
    sizes = sizes_of(case)
    batch, heads, tokens, dim = q.shape
    shape = shape or mita_head_backward.shape_of(q, sizes, 227 * 1024)
    assert shape is not None
    like = (batch, tokens, heads, dim)
    made = tuple(unwritten(*like, dtype=q.dtype).transpose(1, 2) for _ in range(3))
    emulator.launch(
        "mita_head_backward", mita_head_backward.fixed(q, sizes, shape), batch * heads,
        shape.threads(tokens), shape.shared_bytes(q, sizes),
        mita_head_backward.arguments((grad, q, k, v, out, *made), saved, 1, *scales_of(case)),
    )  # fmt: skip
    return made
