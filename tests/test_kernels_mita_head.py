"""MiTA's kernel for short sequences, in CUDA C++: its source on the CPU, warps emulated, against
the reference in float64; through the compiler for devices, where it is installed; and (marked gpu)
on one.
"""

from __future__ import annotations

import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from emulation import (
    BF16,
    CASES,
    F16,
    KERNELS,
    SCORES,
    Case,
    Emulator,
    assert_agrees,
    assert_agrees_on_a_device,
    assert_is_captured,
    emulate_forward,
    inputs_of,
    needs_compiler,
    one_landmark,
    shared_folder,
)
from torch import Tensor

from mitaswap.kernels import mita_head, nvrtc
from mitaswap.kernels.mita_call import Sizes
from mitaswap.mechanisms import mechanism
from mitaswap.tokens import TokenLayout


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(shared_folder(tmp_path_factory))


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.spec} {c.layout} {c.dtype}")
def test_agrees_with_the_reference(case: Case, emulator: Emulator) -> None:
    given = inputs_of(case)
    assert_agrees(case, given, *emulate_forward(emulator, case, *given))


@needs_compiler
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[9]], ids=str)
def test_gives_the_same_where_nothing_is_saved(case: Case, emulator: Emulator) -> None:
    given = inputs_of(case)
    out, _ = emulate_forward(emulator, case, *given)
    assert torch.equal(emulate_forward(emulator, case, *given, save=False)[0], out)


@needs_compiler
@pytest.mark.parametrize("top", [5, 32])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_the_largest_are_chosen_and_of_equals_the_first(
    scores: Tensor,
    top: int,
    emulator: Emulator,
) -> None:
    case = Case(f"mita(m=1,k={top})", TokenLayout(0, (9, 11)))
    scores = scores.to(F16)
    _, saved = emulate_forward(emulator, case, *one_landmark(case, scores))
    wanted = scores.double().sort(descending=True, stable=True)[1][:top]
    assert sorted(saved.members[0, 0].tolist()) == sorted(wanted.tolist())


@needs_compiler
@pytest.mark.parametrize("top", [5, 17, 31])
def test_experts_of_one_warp_are_chosen_each_by_its_own_scores(
    top: int, emulator: Emulator
) -> None:
    case = Case(f"mita(m=8,k={top},pool=2x4)", TokenLayout(0, (8, 12)))
    q, k, v = (x[:1].clone() for x in inputs_of(case))
    q.zero_()
    k.zero_()
    n = torch.arange(96)
    windows = n // 12 // 4 * 4 + n % 12 // 3
    q[0, 0, n, windows] = 1.0  # landmark e is the e-th unit vector
    random = torch.Generator().manual_seed(2)
    rows = [torch.zeros(96), torch.randn(96, generator=random), n // 40, torch.exp2(-(n % 24.0)),
            -n, torch.where(n % 7 == 0, 5e4, -1.0), torch.randint(20, (96,), generator=random),
            n % 9]  # fmt: skip
    scores = torch.stack([row.to(F16) for row in rows])
    k[0, 0, :, :8] = scores.T
    _, saved = emulate_forward(emulator, case, q, k, v)
    wanted = scores.double().sort(descending=True, stable=True, dim=1)[1][:, :top]
    assert torch.equal(saved.members[0].long().sort(1)[0], wanted.sort(1)[0])


RACED = [
    Case("mita(m=9,k=7)", TokenLayout(1, (6, 7)), BF16),
    Case("mita(m=29,k=20,pool=29x1)", TokenLayout(0, (29, 2))),
    Case("mita(m=12,k=30,variant=route-only)", TokenLayout(0, (7, 9))),
]


@needs_compiler
@pytest.mark.parametrize("case", RACED, ids=lambda c: f"{c.spec} {c.layout} {c.dtype}")
def test_all_accesses_to_shared_memory_are_in_order(case: Case, tmp_path: Path) -> None:
    emulator = Emulator(tmp_path, races=True)
    emulate_forward(emulator, case, *inputs_of(case))
    emulator.assert_in_order()


@needs_compiler
@pytest.mark.parametrize(
    ("file", "which"),
    [("choose", 0), ("choose", 3), ("choose", 8), ("attend", 0)],
)
def test_a_missing_syncwarp_shows(file: str, which: int, tmp_path: Path) -> None:
    shutil.copytree(KERNELS, tmp_path / "kernels")
    path = tmp_path / "kernels" / f"mita_head_{file}.cuh"
    parts = path.read_text().split("__syncwarp();")
    emulator = Emulator(tmp_path, races=True, kernels=path.parent)
    case = RACED[0]
    path.write_text(
        "__syncwarp();".join(parts[: which + 1]) + "__syncwarp();".join(parts[which + 1 :])
    )
    emulate_forward(emulator, case, *inputs_of(case))
    with pytest.raises(AssertionError, match=r"races in .*mita_head"):
        emulator.assert_in_order()


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_stay_in_bounds(bad: float, emulator: Emulator) -> None:
    case = Case("mita(m=9,k=7)", TokenLayout(1, (6, 7)))
    q, k, v = inputs_of(case)
    for x in (k, v):
        x[0, 0, 3] = bad
    q[1, 0, 5] = bad
    out, saved = emulate_forward(emulator, case, q, k, v)
    assert out.shape == q.shape
    assert ((saved.members >= 0) & (saved.members < 43)).all()
    kept = saved.members.sort(-1)[0]
    assert (kept[..., 1:] > kept[..., :-1]).all(), "a key is in an expert twice"
    assert torch.equal(saved.order.sort(-1)[0], torch.arange(43, dtype=torch.int32).expand(2, -1))


def table_alignment(image: bytes) -> int:
    """Alignment of the section of constants in an ELF image of 64 bits."""
    (at,) = struct.unpack_from("<Q", image, 40)
    size, count, names = struct.unpack_from("<HHH", image, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, at + size * i) for i in range(count)]
    texts = sections[names][4]
    found = {image[texts + x[0] :].split(b"\0")[0]: x[8] for x in sections}
    return next(x for name, x in found.items() if name.startswith(b".nv.global.init"))


@pytest.mark.skipif(not nvrtc.available(), reason="no compiler for CUDA")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_compiles_for_devices(dtype: torch.dtype, arch: str) -> None:
    q = torch.empty(1, 1, 197, 64, dtype=dtype)
    numbers = mita_head.fixed(q, Sizes(1, 14, 14, 5, 5, 25, 1, 1), save=True)
    image = nvrtc.compiled("mita_head.cu", arch, numbers)
    assert b"mita_head" in image
    assert table_alignment(image) % 16 == 0  # read 16 bytes at a time
    with pytest.raises(RuntimeError, match=r"mita_head\.cu does not compile: "):
        nvrtc.compiled("mita_head.cu", arch, (*numbers, ("EACH", 0)))


USUAL = Sizes(1, 14, 14, 5, 5, 25, 1, 1)


@pytest.mark.parametrize(
    "change, fits",
    [
        ({}, True),
        ({"q": torch.empty(2, 3, 197, 64, dtype=torch.float32)}, False),
        ({"q": torch.empty(2, 3, 257, 64, dtype=F16)}, False),
        ({"q": torch.empty(2, 3, 197, 72, dtype=F16)}, False),
        ({"sizes": USUAL._replace(top=33)}, False),
        ({"sizes": USUAL._replace(top=0)}, False),
        ({"sizes": USUAL._replace(s=2)}, False),
        ({"sizes": USUAL._replace(a=3, b=11)}, False),
        ({"scale": -0.125}, False),
        ({"again": 0.0}, False),
        ({"again": float("nan")}, False),
    ],
    ids=lambda x: "usual" if x == {} else ", ".join(x) if isinstance(x, dict) else str(x),
)
def test_takes_what_it_can_compute(change: dict[str, object], fits: bool) -> None:
    call = {"q": torch.empty(2, 3, 197, 64, dtype=F16), "sizes": USUAL, "scale": 0.1, "again": 0.1}
    assert mita_head.suits(**{**call, **change}) == fits  # type: ignore[arg-type]


def test_reads_rows_of_16_bytes() -> None:
    joint = torch.empty(2, 197, 3, 3, 64, dtype=F16)
    q, k, v = joint.permute(2, 0, 3, 1, 4)
    assert mita_head.plain(q, k, v)
    assert not mita_head.plain(q, torch.empty(2, 3, 197, 68, dtype=F16)[..., 2:66])
    assert not mita_head.plain(torch.empty(2, 3, 197, 68, dtype=F16)[..., :64])
    assert not mita_head.fits(q, k, v, USUAL, 0.1, 0.1)  # not on a CUDA device


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.spec} {c.layout} {c.dtype}")
def test_on_a_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_agrees_on_a_device(case, mita_head.fits, mita_head.head_forward, monkeypatch)


@pytest.mark.gpu
def test_captured_on_a_device() -> None:
    assert_is_captured(Case("mita", TokenLayout(1, (14, 14)), BF16), 4, 3)


@pytest.mark.gpu
def test_in_a_thread_of_its_own_on_a_device() -> None:
    case = Case("mita(impl=fused)", TokenLayout(0, (14, 14)))
    part = mechanism(case.spec)
    q, k, v = (x.cuda() for x in inputs_of(case))
    with torch.no_grad():
        wanted = part(q, k, v, layout=case.layout)

    def run() -> Tensor:
        with torch.no_grad():
            return part(q, k, v, layout=case.layout)

    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(run).result(), wanted)
