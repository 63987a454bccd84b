"""The clock: calls are timed in turn, round by round, so that whatever drifts hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, Union

import numpy as np
import torch

from mitaswap.errors import MitaswapError

T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    """How much is spent on a comparison.

    Args:
        seconds: time for the rounds, per call that is compared.
        warm_up: rounds before those that count, fewer where they would take more than a quarter of
            the time, at least one.
        least, most: rounds that count, whatever the time.
    """

    seconds: float = 2.0
    warm_up: int = 10
    least: int = 5
    most: int = 1000


@dataclass(frozen=True)
class Times:
    """What the rounds gave.

    Args:
        ms: milliseconds in each round, rounds in order.
        peak: bytes allocated at most during one call, above what was there before it; None on the
            CPU.
    """

    ms: np.ndarray
    peak: int | None

    def quantiles(self) -> dict[str, float]:
        """20%, 50% and 80% quantiles in milliseconds, as columns of a row."""
        low, mid, high = np.quantile(self.ms, [0.2, 0.5, 0.8])
        return {"ms_q20": float(low), "ms_q50": float(mid), "ms_q80": float(high)}


@dataclass(frozen=True)
class Failure:
    """Why something was not timed; it keeps nothing alive."""

    status: Literal["failed", "out of memory"]
    error: str


class BrokenDevice(MitaswapError):
    """The GPU is unusable for the rest of this process: no failure of one mechanism alone."""


def in_turn(
    runs: Mapping[str, Callable[[], object]], device: torch.device, effort: Effort
) -> dict[str, Union[Times, Failure]]:
    """Time calls against each other; one that raises leaves the rounds, the others go on.

    On CUDA a call is timed by events around it, behind a write that empties the device's L2 cache;
    nothing waits for the device before the end of a round. On the CPU it is wall time.
    """
    found: dict[str, Union[Times, Failure]] = {}
    left = dict(runs)
    clock = _Clock(device)

    def round_(turn: int) -> dict[str, Callable[[], float]]:
        """One call of each; whoever comes later may find a warmer device, so the order rotates."""
        names = list(left)
        first = turn % max(1, len(names))
        reads = {}
        for name in (names[first:] + names[:first])[:: 1 if turn // 2 % 2 else -1]:
            read = attempt(partial(clock.time, left[name]), device)
            if isinstance(read, Failure):
                found[name] = read
                del left[name]
            else:
                reads[name] = read
        attempt(clock.wait, device)  # where a kernel's illegal access shows
        return reads

    budget = effort.seconds * len(runs)
    round_(0)  # compiles, tunes and allocates
    start = time.perf_counter()
    for turn in range(1, effort.warm_up):
        if time.perf_counter() - start > budget / 4:
            break
        round_(turn)
    peaks: dict[str, Union[int, None]] = {}
    for name, run in list(left.items()):
        peak = attempt(partial(clock.peak, run), device)
        if isinstance(peak, Failure):
            found[name] = peak
            del left[name]
        else:
            peaks[name] = peak
    samples: dict[str, list[float]] = {name: [] for name in left}
    start = time.perf_counter()
    for turn in range(effort.most):
        if not left or (turn >= effort.least and time.perf_counter() - start > budget):
            break
        for name, read in round_(turn).items():
            samples[name].append(read())
    found |= {name: Times(np.array(samples[name]), peaks[name]) for name in left}
    return {name: found[name] for name in runs}


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            properties = torch.cuda.get_device_properties(device)
            cache = getattr(properties, "L2_cache_size", 64 * 2**20)
            self.flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def time(self, run: Callable[[], object]) -> Callable[[], float]:
        """Call it; the milliseconds can be read once `wait` was called."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            ms = (time.perf_counter() - start) * 1e3
            return lambda: ms
        with torch.cuda.device(self.device):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            before.record()
            run()
            after.record()
        return lambda: before.elapsed_time(after)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def peak(self, run: Callable[[], object]) -> int | None:
        if not self.cuda:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        getattr(run, "plain", run)()  # a graph allocates nothing when it is replayed
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before


def attempt(call: Callable[[], T], device: torch.device) -> Union[T, Failure]:
    """What a call returns, or why it failed, with its memory given back.

    Raises:
        BrokenDevice: the device is unusable after the failure.
    """
    try:
        return call()
    except BrokenDevice:
        raise
    except Exception as error:
        failure = _failure(error)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return failure


def _failure(error: Exception) -> Failure:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
    if isinstance(error, MitaswapError):
        return Failure("failed", str(error))
    if _out_of_memory(error):
        return Failure("out of memory", text)
    if "CUDA error" in str(error):  # an illegal access: every later call would fail, too
        raise BrokenDevice(
            f"the GPU cannot be used any more by this process ({text}). The comparison it happened "
            "in has no rows; give the same command with fewer mechanisms to find out which."
        ) from error
    return Failure("failed", text)


def _out_of_memory(error: Any) -> bool:
    kinds = (torch.OutOfMemoryError, MemoryError)
    # the CPU's allocator raises a plain RuntimeError; a compiled graph wraps what it meets
    words = ("can't allocate memory", "not enough memory", "CUDA out of memory")
    return isinstance(error, kinds) or any(word in str(error) for word in words)
