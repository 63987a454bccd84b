"""The gradients of MiTA's kernel for short sequences, in CUDA C++: its source on the CPU, warps
emulated, against autograd through the reference in float64; through the compiler for devices, where
it is installed; and (marked gpu) on one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from emulation import (
    BF16,
    CASES,
    F16,
    KERNELS,
    UNIT,
    Case,
    Emulator,
    emulate_backward,
    emulate_forward,
    inputs_of,
    log_sum_exp,
    needs_compiler,
    shared_folder,
)
from torch import Tensor

from mitaswap.kernels import mita_head_backward, nvrtc
from mitaswap.kernels.mita_call import Sizes
from mitaswap.kernels.mita_head_backward import Shape
from mitaswap.kernels.mita_plan import empty_saved
from mitaswap.mechanisms import mechanism
from mitaswap.tokens import TokenLayout

RELEASED = Case("mita(m=9,k=7,shared_scale=released)", TokenLayout(1, (6, 7)))
HERE = [*CASES, RELEASED]
#: what is worth the time of the emulation
SOME = [CASES[i] for i in (0, 1, 3, 4, 7, 9, 10, 12)] + [RELEASED]
RACED = [
    Case("mita(m=9,k=7)", TokenLayout(1, (6, 7)), BF16),
    Case("mita(m=20,k=11,pool=4x5)", TokenLayout(0, (8, 9))),
    Case("mita(m=12,k=30,variant=route-only)", TokenLayout(0, (7, 9))),
]


def name(case: Case) -> str:
    return f"{case.spec} {case.layout} {case.dtype}"


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(shared_folder(tmp_path_factory))


def wanted_gradients(case: Case, grad: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    part = mechanism(mechanism(case.spec).spec.with_options(impl="reference"))
    exact = [x.double().detach().requires_grad_() for x in given]
    return torch.autograd.grad(part(*exact, layout=case.layout), exact, grad.double())


def gradient_of_output(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)


def gradients(
    forward: Emulator,
    case: Case,
    grad: Tensor | None = None,
    shape: Shape | None = None,
    backward: Emulator | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Those of the kernel, and the reference's."""
    given = inputs_of(case)
    out, saved = emulate_forward(forward, case, *given)
    grad = gradient_of_output(out) if grad is None else grad
    found = emulate_backward(backward or forward, case, grad, *given, out, saved, shape)
    return found, wanted_gradients(case, grad, *given)


def assert_close(case: Case, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.double() - theirs).norm() <= 4 * UNIT[case.dtype] * theirs.norm()


@needs_compiler
@pytest.mark.parametrize("case", SOME, ids=name)
def test_agrees_with_the_reference(case: Case, emulator: Emulator) -> None:
    assert_close(case, *gradients(emulator, case))


@needs_compiler
@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (HERE[3], Shape(1, 2)),
        (HERE[3], Shape(2, 3)),
        (HERE[4], Shape(1, 3)),
        (HERE[8], Shape(2, 4)),
    ],
    ids=str,
)
def test_agrees_however_it_is_cut(case: Case, shape: Shape, emulator: Emulator) -> None:
    assert_close(case, *gradients(emulator, case, shape=shape))


@needs_compiler
@pytest.mark.parametrize(
    "case",
    [
        Case("mita(m=9,k=33)", TokenLayout(0, (3, 11))),
        Case("mita(m=25,k=60,shared_scale=released)", TokenLayout(0, (8, 9)), BF16),
    ],
    ids=name,
)
def test_experts_may_be_wider_than_in_the_forward(case: Case, emulator: Emulator) -> None:
    given = inputs_of(case)
    part = mechanism(mechanism(case.spec).spec.with_options(impl="reference"))
    exact = [x.double() for x in given]
    narrow = case._replace(spec=str(part.spec.with_options(k=1)))
    _, saved = emulate_forward(emulator, narrow, *given)
    members = part.route(*exact[:2], layout=case.layout, scale=64**-0.5).members
    lse = log_sum_exp(case, *exact[:2], saved.exact.double()).float()
    saved = saved._replace(members=members.flatten(0, 1).int(), lse=lse)
    out = part(*exact, layout=case.layout).to(case.dtype)
    grad = gradient_of_output(out)
    found = emulate_backward(emulator, case, grad, *given, out, saved)
    assert_close(case, found, wanted_gradients(case, grad, *given))


@needs_compiler
def test_takes_a_gradient_that_is_one_row_everywhere(emulator: Emulator) -> None:
    case = HERE[2]
    row = gradient_of_output(torch.empty(1, 1, 1, 64, dtype=case.dtype))
    grad = row.expand(2, 1, case.layout.tokens, 64)
    assert mita_head_backward.plain(grad)
    assert_close(case, *gradients(emulator, case, grad))


@needs_compiler
@pytest.mark.parametrize(
    ("case", "shape"),
    [(RACED[0], Shape(2, 1)), (RACED[1], Shape(2, 2)), (RACED[2], Shape(1, 2))],
    ids=str,
)
def test_all_accesses_to_shared_memory_are_in_order(
    case: Case, shape: Shape, emulator: Emulator, tmp_path: Path
) -> None:
    watching = Emulator(tmp_path, races=True)
    assert_close(case, *gradients(emulator, case, shape=shape, backward=watching))
    watching.assert_in_order()


BARRIERS = [(0, 2), (1, 2), (2, 2), (3, 2), (4, 1), (5, 2), (6, 2)]  # and in how many parts
ORDERS = [
    *(("mita_head_backward.cu", "__syncthreads();", *x) for x in BARRIERS),
    ("mita_head_backward.cu", "wait<1>();", 0, 1),
    ("mita_head_backward.cu", "wait<0>();", 0, 1),
    ("mita_back_parts.cuh", "__syncwarp();", 0, 1),
    ("mita_back_parts.cuh", "__syncwarp();", 1, 1),
]


@needs_compiler
@pytest.mark.parametrize(("file", "order", "which", "parts"), ORDERS)
def test_what_puts_accesses_in_order_is_missed(
    file: str, order: str, which: int, parts: int, emulator: Emulator, tmp_path: Path
) -> None:
    shutil.copytree(KERNELS, tmp_path / "kernels")
    path = tmp_path / "kernels" / file
    text = path.read_text().split(order)
    assert len(text) - 1 == sum(x[:2] == (file, order) for x in ORDERS)
    path.write_text(order.join(text[: which + 1]) + order.join(text[which + 1 :]))
    watching = Emulator(tmp_path, races=True, kernels=path.parent)
    with pytest.raises(AssertionError):
        shape = Shape(2, parts)
        found = gradients(emulator, RACED[0], shape=shape, backward=watching)
        assert_close(RACED[0], *found)
        watching.assert_in_order()


USUAL = Sizes(1, 14, 14, 5, 5, 25, 1, 1)


@pytest.mark.parametrize(
    ("tokens", "dtype", "sizes", "room", "shape"),
    [
        (196, F16, USUAL, 227, Shape(2, 1)),
        (197, BF16, USUAL, 227, Shape(2, 1)),
        (256, BF16, USUAL, 227, Shape(2, 2)),
        (256, F16, USUAL._replace(shared=0), 227, Shape(2, 2)),
        (128, F16, USUAL, 227, Shape(1, 1)),
        (100, F16, USUAL, 227, Shape(2, 1)),
        (197, BF16, USUAL, 163, None),  # of an A100
        (176, BF16, USUAL, 163, Shape(1, 2)),
        (65, F16, USUAL, 99, Shape(1, 1)),
    ],
)
def test_is_cut_for_the_room_that_there_is(
    tokens: int, dtype: torch.dtype, sizes: Sizes, room: int, shape: Shape | None
) -> None:
    q = torch.empty(1, 1, tokens, 64, dtype=dtype)
    assert mita_head_backward.shape_of(q, sizes, room * 1024) == shape


def test_is_for_cuda_devices() -> None:
    q = torch.empty(1, 1, 197, 64, dtype=F16)
    saved = empty_saved(q, USUAL)
    assert not mita_head_backward.fits((q,) * 8, saved, USUAL, 0.1, 0.1)


@pytest.mark.skipif(not nvrtc.available(), reason="no compiler for CUDA")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_compiles_for_devices(dtype: torch.dtype, arch: str) -> None:
    numbers = mita_head_backward.fixed(torch.empty(1, 1, 197, 64, dtype=dtype), USUAL, Shape(2, 1))
    assert b"mita_head_backward" in nvrtc.compiled("mita_head_backward.cu", arch, numbers)


@pytest.mark.gpu
@pytest.mark.parametrize("case", HERE, ids=name)
def test_on_a_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from mitaswap.kernels import mita_plan

    taken = []
    whole = mita_plan.head_backward
    monkeypatch.setattr(mita_plan, "head_backward", lambda *a: taken.append(1) or whole(*a))
    given = tuple(x.cuda().requires_grad_() for x in inputs_of(case, 3, 2))
    out = mechanism(mechanism(case.spec).spec.with_options(impl="fused"))(
        *given, layout=case.layout
    )
    grad = torch.randn_like(out)
    found, again = (torch.autograd.grad(out, given, grad, retain_graph=True) for _ in range(2))
    assert len(taken) == 2
    assert all(map(torch.equal, found, again))
    assert_close(case, found, wanted_gradients(case, grad, *given))
