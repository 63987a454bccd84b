"""Training and finetuning on one device, on timm's parts.

A swapped network trains like any other: nothing here knows of mechanisms.
"""

from mitaswap.train.config import TrainConfig
from mitaswap.train.loop import train
from mitaswap.train.validation import validate

__all__ = ["TrainConfig", "train", "validate"]
