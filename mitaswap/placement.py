"""Where a run computes, and in which precision."""

from __future__ import annotations

import torch

from mitaswap.errors import MitaswapError


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the current GPU if there is one, else the CPU.

    Raises:
        MitaswapError: no such kind of device, or none on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MitaswapError(
            f"unknown device {name!r}. Allowed: auto, cpu, cuda, cuda:1, mps."
        ) from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = (
            device.index
            if device.index is not None
            else (torch.cuda.current_device() if count else 0)
        )
        if index >= count:
            raise MitaswapError(
                f"device {name!r} is not there: torch sees {count} GPUs. Use 'auto' or 'cpu'."
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MitaswapError(f"device {name!r} is not there. Use 'auto' or 'cpu'.")
    if device.type not in ("cpu", "mps"):
        raise MitaswapError(
            f"cannot compute on device {name!r}. Allowed: auto, cpu, cuda, cuda:1, mps."
        )
    return device


def wants_bf16(amp: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16: "bf16", "none", or "auto" (on a GPU that has it).

    Raises:
        MitaswapError: bf16 asked for on a GPU without it.
    """
    has_it = device.type != "cuda" or torch.cuda.is_bf16_supported()
    if amp == "bf16" and not has_it:
        raise MitaswapError(
            f"the GPU {torch.cuda.get_device_name(device)} has no bfloat16. Use amp='none'."
        )
    return amp == "bf16" or (amp == "auto" and device.type == "cuda" and has_it)
