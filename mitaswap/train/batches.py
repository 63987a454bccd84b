"""Training batches, normalised and on the device: decoded once, or augmented by timm's loader."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from timm.data import create_loader
from torch import Tensor
from torch.utils.data import Dataset

from mitaswap.data import decode
from mitaswap.errors import MitaswapError
from mitaswap.train.config import TrainConfig
from mitaswap.train.seeding import seed_of, seeded

if TYPE_CHECKING:
    from mitaswap.data import ImageSet
    from mitaswap.models import Network

logger = logging.getLogger(__name__)

# The share of a GPU's free memory that decoded images may take; the rest is for activations.
_IMAGES_SHARE = 0.4


class Batches(Protocol):
    """Whatever gives an epoch's batches in a fresh random order."""

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        ...

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch: images float32 [B,3,H,W] and labels int64 [B], both on the device.

        Draws from the global generators, so the caller seeds them for this epoch.
        """
        ...


def open_batches(
    network: Network, images: ImageSet, config: TrainConfig, device: torch.device
) -> Batches:
    """The training batches that the settings ask for.

    Raises:
        MitaswapError: fewer images than one batch takes, or an augmentation string that timm cannot
            read, or augmentation of a stream, whose images cannot be had by number.
    """
    if len(images) < config.batch_size:
        raise MitaswapError(
            f"{images.name} ({images.split}) has {len(images)} images, fewer than one batch of "
            f"{config.batch_size}. Use a batch_size of at most {len(images)}."
        )
    if config.no_aug:
        return DecodedBatches(network, images, config, device)
    return AugmentedBatches(network, images, config, device)


class DecodedBatches:
    """Every image decoded once as for evaluation; batches are indexed from one uint8 tensor."""

    def __init__(
        self, network: Network, images: ImageSet, config: TrainConfig, device: torch.device
    ) -> None:
        decoded = decode(images, network.preprocess.to_uint8, workers=config.workers)
        self._device = device
        self._batch_size = config.batch_size
        self._normalise = network.preprocess.normalise
        self._images = decoded.images
        self._labels = decoded.labels.to(device)
        if (
            device.type != "cuda"
            or decoded.images.nbytes <= _IMAGES_SHARE * torch.cuda.mem_get_info(device)[0]
        ):
            self._images = decoded.images.to(device)
        else:
            logger.info("the decoded training images stay in host memory: too many for the device")

    def __len__(self) -> int:
        return len(self._labels) // self._batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches.epoch`."""
        order = torch.randperm(len(self._labels)).to(self._images.device)
        for chosen in order.split(self._batch_size)[: len(self)]:
            images = self._images[chosen]
            if images.device != self._device:
                images = images.pin_memory().to(self._device, non_blocking=True)
            yield self._normalise(images), self._labels[chosen.to(self._device, non_blocking=True)]


class AugmentedBatches:
    """timm's loader: random crops, flips, colours and erasing, in worker processes."""

    def __init__(
        self, network: Network, images: ImageSet, config: TrainConfig, device: torch.device
    ) -> None:
        preprocess = network.preprocess
        self._images = _SeededImages(images, config.seed)
        images.sample(
            0
        )  # a stream, or a set that cannot be read at all, says so before any worker starts
        try:
            self._loader = create_loader(
                self._images,  # type: ignore[arg-type]
                input_size=(3, *preprocess.size),
                batch_size=config.batch_size,
                is_training=True,
                scale=config.scale,
                ratio=config.ratio,
                hflip=config.hflip,
                color_jitter=config.color_jitter or None,  # type: ignore[arg-type]
                auto_augment=config.aug,
                re_prob=config.reprob,
                re_mode="pixel",
                interpolation=preprocess.interpolation,
                mean=tuple(preprocess.mean),
                std=tuple(preprocess.std),
                num_workers=config.workers,
                pin_memory=device.type == "cuda",
                device=device,
                # The workers of an epoch are copies of the data set as it is then: that tells them
                # the epoch.
                persistent_workers=False,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise MitaswapError(
                f"timm cannot make the augmentation {config.aug!r}: "
                f"{error or type(error).__name__}. It reads strings such as "
                "'rand-m9-mstd0.5-inc1', 'augmix-m3-w3', '3a' or 'original'."
            ) from None

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Batches.epoch`."""
        self._images.epoch = epoch
        yield from self._loader


class _SeededImages(Dataset[tuple[Any, int]]):
    """The image set, with an augmentation that depends on (seed, epoch, image) only.

    timm's loader puts its transform here, so that the caller's set keeps the one it has.
    """

    def __init__(self, images: ImageSet, seed: int) -> None:
        self.images = images
        self.seed = seed
        self.epoch = 0
        self.transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with seeded(seed_of(self.seed, self.epoch, index)):
            image, label = self.images.sample(index)
            return (self.transform(image) if self.transform is not None else image), label
