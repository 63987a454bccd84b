"""Random numbers that depend on where a run stands, never on how it got there.

Each epoch and each image has a seed of its own, so a continued run draws what the uninterrupted one
would have drawn, whatever the number of loader processes, and no generator's state has to be
stored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """A well mixed 32-bit seed for a tuple of numbers >= 0, such as (run seed, epoch, image)."""
    # The length tells (1,) from (1, 0), which a SeedSequence pads to the same words.
    return int(np.random.SeedSequence((len(key), *key)).generate_state(1)[0])


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch's CPU for a while, then put them back.

    Args:
        seed: 0 to 2**32 - 1.
        device: a CUDA device whose generator is seeded and put back as well.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before_cuda = torch.cuda.get_rng_state(cuda) if cuda is not None else None
    try:
        random.seed(seed)
        np.random.seed(seed)
        # Not torch.manual_seed: that also reseeds every GPU, and one image must not move the
        # model's dropout.
        torch.default_generator.manual_seed(seed)
        if cuda is not None:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        if cuda is not None and before_cuda is not None:
            torch.cuda.set_rng_state(before_cuda, cuda)
