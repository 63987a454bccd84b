"""What the device can do at best, measured: copy bandwidth and the rate of matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mitaswap.benchmark.timing import Effort, Failure, in_turn
from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import Cost, SiteShape


@dataclass(frozen=True)
class Rates:
    """Measured rates of one device and dtype.

    Args:
        copy: bytes read and written per second by a large copy.
        matmul: floating-point operations per second of a large square product.
        on_chip: bytes that a multiprocessor of a GPU has beside its registers.
    """

    copy: float
    matmul: float
    on_chip: int = 0


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure them now, in about a second.

    Raises:
        MitaswapError: the device has no memory left for it.
    """
    cuda, half = device.type == "cuda", dtype.itemsize == 2
    size = 2**29 if cuda else 2**26
    side = (8192 if half else 4096) if cuda else 512
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    runs = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    with torch.inference_mode():
        found = in_turn(runs, device, Effort(seconds=0.3, warm_up=5))
    seconds = {}
    for name, times in found.items():
        if isinstance(times, Failure):
            raise MitaswapError(f"cannot measure the rates of {device}: {times.error}")
        seconds[name] = float(np.median(times.ms)) / 1e3
    near = torch.cuda.get_device_properties(device) if cuda else None
    on_chip = getattr(near, "shared_memory_per_multiprocessor", 0)
    return Rates(2 * size / seconds["copy"], 2 * side**3 / seconds["matmul"], on_chip)


def floor(
    cost: Cost, site: SiteShape, batch: int, dtype: torch.dtype, rates: Rates, backward: bool
) -> tuple[float, float]:
    """Least milliseconds for (memory traffic, operations) of a batch, at the measured rates. Where
    q, k and v of a head fit on the chip, intermediates are no traffic.

    With the backward both count three times: q, k, v, output and its gradient are read once more
    and three gradients written (12 tensors instead of 4), and each product has two in the backward.
    """
    times = 3 * batch if backward else batch
    each = site.layout.tokens * (2 * site.head_dim + site.value_dim) * dtype.itemsize
    numbers = cost.moved - (cost.between if each <= rates.on_chip else 0)
    moved = times * numbers * dtype.itemsize / rates.copy
    return moved * 1e3, times * cost.flops / rates.matmul * 1e3
