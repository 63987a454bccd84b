"""Accuracy and loss of a network on decoded images, for the epochs of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from timm.utils import accuracy
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from mitaswap.data import Decoded
    from mitaswap.models import Network


def validate(
    network: Network,
    images: Decoded,
    device: torch.device,
    batch_size: int = 256,
    bf16: bool = False,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and the mean cross-entropy, over all images.

    The module is put into evaluation mode and stays there.

    Args:
        network: on `device` already.
        images: decoded with the network's own preprocessing.
        batch_size: images per forward pass; changes no result but for rounding.
        bf16: autocast to bfloat16, as in training.

    Returns:
        "top1", "top5" (over all classes where there are fewer than five) and "val_loss".
    """
    network.module.eval()
    sums: list[Tensor] = []
    # no_grad rather than inference_mode: tables that a module caches here (RoPE, positions) are
    # used in training too, where autograd refuses tensors made in inference mode.
    with torch.no_grad():
        for chunk, chunk_labels in zip(
            images.images.split(batch_size), images.labels.split(batch_size), strict=True
        ):
            labels = chunk_labels.to(device, non_blocking=True)
            batch = network.preprocess.normalise(chunk.to(device, non_blocking=True))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = network.logits(batch)
            logits = logits.float()
            top1, top5 = accuracy(logits, labels, topk=(1, 5))
            sums.append(torch.stack([top1, top5, cross_entropy(logits, labels)]) * len(labels))
    # Summed at the end, so that no batch waits for the one before to come back from the device.
    means = torch.stack(sums).cpu().double().sum(0) / len(images.labels)
    return dict(zip(("top1", "top5", "val_loss"), means.tolist(), strict=True))
