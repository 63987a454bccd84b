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
    needs_compiler,
    sizes_of,
)
from torch import Tensor

from mitaswap.kernels import mita_head_backward, nvrtc
from mitaswap.kernels.mita_call import Sizes
from mitaswap.mechanisms import mechanism
from mitaswap.tokens import TokenLayout

LEAST_ROOM, ROOM = 99 * 1024, 227 * 1024


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulated"))


def wanted_gradients(case: Case, grad: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    part = mechanism(mechanism(case.spec).spec.with_options(impl="reference"))
    exact = [x.double().detach().requires_grad_() for x in given]
    return torch.autograd.grad(part(*exact, layout=case.layout), exact, grad.double())


def gradient_of_output(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.spec} {c.layout} {c.dtype}")
def test_agrees_with_the_reference(case: Case, emulator: Emulator) -> None:
    given = inputs_of(case)
    out, saved = emulate_forward(emulator, case, *given)
    grad = gradient_of_output(out)
    found = emulate_backward(emulator, case, grad, *given, out, saved)
    for ours, theirs in zip(found, wanted_gradients(case, grad, *given), strict=True):
        print(((ours.double() - theirs).norm() / theirs.norm() / UNIT[case.dtype]).item())
        assert (ours.double() - theirs).norm() <= 4 * UNIT[case.dtype] * theirs.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.spec} {c.layout} {c.dtype}")
def test_on_a_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from mitaswap.kernels import mita_plan

    taken = []
    whole = mita_plan.head_backward
    monkeypatch.setattr(mita_plan, "head_backward", lambda *a: taken.append(1) or whole(*a))
    given = tuple(x.cuda().requires_grad_() for x in inputs_of(case, 3, 2))
    out = mechanism(mechanism(case.spec).spec.with_options(impl="fused"))(*given, layout=case.layout)
    grad = torch.randn_like(out)
    found, again = (torch.autograd.grad(out, given, grad, retain_graph=True) for _ in range(2))
    assert len(taken) == 2
    for ours, same, theirs in zip(found, again, wanted_gradients(case, grad, *given), strict=True):
        assert torch.equal(ours, same)
        assert (ours.double() - theirs).norm() <= 4 * UNIT[case.dtype] * theirs.norm()
