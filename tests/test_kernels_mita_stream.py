"""MiTA's kernel for sequences of some hundred tokens, in CUDA C++: its source on the CPU, warps
emulated, against the reference in float64; through the compiler for devices, where it is installed;
and (marked gpu) on one.
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
    ROOM,
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

from mitaswap.kernels import mita_stream, nvrtc
from mitaswap.kernels.mita_call import Sizes
from mitaswap.tokens import TokenLayout


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(shared_folder(tmp_path_factory))


LONG = [
    Case("mita", TokenLayout(1, (32, 32)), BF16),
    # several tiles, parts and items each, none of them whole; most of the queries of one expert
    Case("mita(m=30,k=29,pool=5x6)", TokenLayout(0, (23, 25))),
    Case("mita(m=2,k=25,variant=route-only)", TokenLayout(5, (17, 19), 2), BF16),
]
#: among them: room for the keys of one expert a warp (32 keys), and of two
SHORT = [CASES[i] for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 13)]


@needs_compiler
@pytest.mark.parametrize("case", SHORT + LONG, ids=lambda c: f"{c.spec} {c.layout} {c.dtype}")
def test_agrees_with_the_reference(case: Case, emulator: Emulator) -> None:
    given = inputs_of(case, 1)
    assert_agrees(case, given, *emulate_forward(emulator, case, *given, stream=ROOM))


@needs_compiler
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_gives_the_same_where_nothing_is_saved(case: Case, emulator: Emulator) -> None:
    given = inputs_of(case)
    out, _ = emulate_forward(emulator, case, *given, stream=ROOM)
    less, _ = emulate_forward(emulator, case, *given, save=False, stream=ROOM)
    assert torch.equal(less, out)


@needs_compiler
@pytest.mark.parametrize("top", [5, 32])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_the_largest_are_chosen_and_of_equals_the_first(
    scores: Tensor, top: int, emulator: Emulator
) -> None:
    case = Case(f"mita(m=1,k={top})", TokenLayout(0, (9, 33)))
    scores = scores.repeat(3).to(F16)
    _, saved = emulate_forward(emulator, case, *one_landmark(case, scores), stream=ROOM)
    wanted = scores.double().sort(descending=True, stable=True)[1][:top]
    assert sorted(saved.members[0, 0].tolist()) == sorted(wanted.tolist())


RACED = [
    Case("mita(m=9,k=7)", TokenLayout(1, (9, 15)), BF16),
    Case("mita(m=17,k=32,pool=17x1)", TokenLayout(0, (17, 4))),
]


@needs_compiler
@pytest.mark.parametrize("case", RACED, ids=lambda c: f"{c.spec} {c.layout} {c.dtype}")
def test_all_accesses_to_shared_memory_are_in_order(case: Case, tmp_path: Path) -> None:
    emulator = Emulator(tmp_path, races=True)
    emulate_forward(emulator, case, *inputs_of(case, 1), stream=ROOM)
    emulator.assert_in_order()


@needs_compiler
@pytest.mark.parametrize(
    ("file", "which"),
    # without the others, places in memory are not what they should be
    [("choose", 1), ("choose", 2), ("choose", 4), ("attend", 0), ("attend", 1)],
)
def test_a_missing_syncwarp_shows(file: str, which: int, tmp_path: Path) -> None:
    shutil.copytree(KERNELS, tmp_path / "kernels")
    path = tmp_path / "kernels" / f"mita_stream_{file}.cuh"
    parts = path.read_text().split("__syncwarp();")
    path.write_text(
        "__syncwarp();".join(parts[: which + 1]) + "__syncwarp();".join(parts[which + 1 :])
    )
    emulator = Emulator(tmp_path, races=True, kernels=path.parent)
    case = RACED[file == "attend"]  # warps take several items there
    emulate_forward(emulator, case, *inputs_of(case, 1), stream=ROOM)
    with pytest.raises(AssertionError, match=r"races in .*mita_stream"):
        emulator.assert_in_order()


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_stay_in_bounds(bad: float, emulator: Emulator) -> None:
    case = Case("mita(m=9,k=7)", TokenLayout(1, (6, 7)))
    q, k, v = inputs_of(case)
    for x in (k, v):
        x[0, 0, 3] = bad
    q[1, 0, 5] = bad
    out, saved = emulate_forward(emulator, case, q, k, v, stream=ROOM)
    assert out.shape == q.shape
    kept = saved.members.sort(-1)[0]
    assert ((kept >= 0) & (kept < 43)).all()
    assert (kept[..., 1:] > kept[..., :-1]).all(), "a key is in an expert twice"
    assert torch.equal(saved.order.sort(-1)[0], torch.arange(43, dtype=torch.int32).expand(2, -1))


USUAL = Sizes(1, 32, 32, 5, 5, 25, 1, 1)


@pytest.mark.skipif(not nvrtc.available(), reason="no compiler for CUDA")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_compiles_for_devices(dtype: torch.dtype, arch: str) -> None:
    q = torch.empty(1, 1, 1025, 64, dtype=dtype)
    _, stages = mita_stream.shape_of(1025, USUAL, dtype, ROOM)
    numbers = mita_stream.fixed(q, USUAL, True, stages)
    assert b"mita_stream" in nvrtc.compiled("mita_stream.cu", arch, numbers)


@pytest.mark.parametrize(
    "tokens, sizes, dtype, room, found",
    [
        (1025, USUAL, BF16, ROOM, (115_584, 2)),
        (1025, USUAL, F16, ROOM, (114_464, 2)),
        (257, USUAL._replace(a=4, b=8, top=32), F16, ROOM, (77_004, 1)),
        (1200, USUAL, F16, ROOM, (0, 1)),
        (1025, USUAL, BF16, 164 * 1024, (0, 1)),
        (577, USUAL, BF16, 164 * 1024, (70_308, 1)),
        (1025, USUAL, BF16, 0, (0, 1)),
    ],
)
def test_two_blocks_fit_on_a_multiprocessor(
    tokens: int, sizes: Sizes, dtype: torch.dtype, room: int, found: tuple[int, int]
) -> None:
    assert mita_stream.shape_of(tokens, sizes, dtype, room) == found


@pytest.mark.parametrize(
    "change, fits",
    [
        ({}, True),
        ({"q": torch.empty(2, 3, 1025, 64, dtype=torch.float32)}, False),
        ({"q": torch.empty(2, 3, 2049, 64, dtype=F16)}, False),
        ({"q": torch.empty(2, 3, 1025, 72, dtype=F16)}, False),
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
    call = {"q": torch.empty(2, 3, 1025, 64, dtype=F16), "sizes": USUAL, "scale": 0.1, "again": 0.1}
    assert mita_stream.suits(**{**call, **change}) == fits  # type: ignore[arg-type]
    q = torch.empty(2, 3, 1025, 64, dtype=F16)
    assert not mita_stream.fits(q, q, q, USUAL, 0.1, 0.1)  # not on a CUDA device


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + LONG, ids=lambda c: f"{c.spec} {c.layout} {c.dtype}")
def test_on_a_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_agrees_on_a_device(case, mita_stream.fits, mita_stream.stream_forward, monkeypatch)


@pytest.mark.gpu
def test_captured_on_a_device() -> None:
    assert_is_captured(Case("mita", TokenLayout(1, (32, 32)), BF16), 32, 12)
