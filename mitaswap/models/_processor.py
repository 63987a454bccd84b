"""Images for networks of transformers: their own image processor, which stops at bytes here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.models import _weights
from mitaswap.models._base import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_NUMBERS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


class HfPreprocess(Preprocess):
    """A transformers image processor that stops at bytes.

    Args:
        processor: any processor that turns one image into `pixel_values` of a fixed size.

    Raises:
        MitaswapError: the processor gives something else, for instance packed patches.
    """

    def __init__(self, processor: Any) -> None:
        from PIL import Image

        self.processor = processor
        # Pixels come as bytes; a factor of the processor other than 1/255 moves into mean and std.
        factor = 255 * (processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0)
        normal = getattr(processor, "do_normalize", True)
        self.mean = tuple(
            float(v) / factor for v in (processor.image_mean if normal else (0.0,) * 3)
        )
        self.std = tuple(float(v) / factor for v in (processor.image_std if normal else (1.0,) * 3))
        probe = self._pixels(Image.new("RGB", (64, 64)))
        if probe.ndim != 3 or probe.shape[0] != 3:
            raise MitaswapError(
                f"{type(processor).__name__} gives inputs of shape {tuple(probe.shape)} instead of "
                "3 x h x w; networks that take packed patches or several tiles are not supported"
            )
        self.size = (int(probe.shape[1]), int(probe.shape[2]))
        self.crop_pct = _crop_pct(processor, self.size)
        resample = getattr(processor, "resample", None)
        self.interpolation = "none" if resample is None else _filter_name(resample)

    @property
    def key(self) -> str:
        fields = {k: v for k, v in self.processor.to_dict().items() if k not in _NUMBERS}
        return "hf:" + json.dumps(fields, sort_keys=True, default=str)

    def to_uint8(self, image: Image) -> Tensor:
        pixels = self._pixels(image.convert("RGB"))
        if tuple(pixels.shape[1:]) != self.size:
            raise MitaswapError(
                f"{type(self.processor).__name__} makes {tuple(pixels.shape[1:])} pixels of an "
                f"image of {image.height} x {image.width}, but {self.size} of a square one: images "
                "of several sizes do not make a batch. Set do_center_crop and crop_size in its "
                "preprocessor_config.json."
            )
        if pixels.dtype != torch.uint8:
            pixels = pixels.round().clamp(0, 255).to(torch.uint8)
        return pixels

    def _pixels(self, image: Image) -> Tensor:
        batch = self.processor(
            images=image, do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        return batch["pixel_values"][0]


def load_processor(
    name: str, directory: Path | None, config: Any, image_size: Any, trust_remote_code: bool
) -> HfPreprocess:
    """The preprocessing that comes with a network, or the usual one if none does.

    Args:
        name: name on the hub or path of the directory.
        directory: the same as a path, when it is local.
        config: the network's transformers configuration.
        image_size: size to prepare images for, an int or (h, w); None keeps the processor's own.
        trust_remote_code: whether a processor may come as code.
    """
    from transformers import AutoImageProcessor

    processor = None
    files = ("preprocessor_config.json", "processor_config.json")
    # a network that was made in the program has neither a directory nor a name on the hub
    published = bool(name) and directory is None
    if published or (directory and any((directory / file).is_file() for file in files)):
        try:
            processor = AutoImageProcessor.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            if _weights.is_unreachable(error):
                raise _weights.unreachable(name, "the image processor", error) from error
            if directory is not None:
                raise MitaswapError(
                    f"cannot read the image processor of {str(directory)!r}: "
                    f"{_weights.brief(error)}"
                ) from error
            logger.info("the hub has no image processor for %s: %s", name, error)
    if processor is None:
        processor = _usual_processor(name, config)
    if image_size is not None:
        _resize(processor, *_pair(image_size))
    return HfPreprocess(processor)


def native_size(config: Any) -> tuple[int, int] | None:
    """Height and width that a configuration (or its vision part) was made for."""
    for part in (config, getattr(config, "vision_config", None)):
        size = getattr(part, "image_size", None)
        if size:
            return _pair(size)
    return None


def _usual_processor(name: str, config: Any) -> Any:
    from transformers import ViTImageProcessor

    height, width = native_size(config) or (224, 224)
    logger.warning(
        "%s comes without an image processor: images are squashed to %d x %d, mean and std are 0.5",
        name or f"a network of {type(config).__name__}",
        height,
        width,
    )
    return ViTImageProcessor(
        size={"height": height, "width": width}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def _resize(processor: Any, height: int, width: int) -> None:
    """Make a processor give another size, with the same share of the image cropped away."""
    if processor.size is None or processor.size["height"] is not None:
        processor.size = type(processor.size or {})(height=height, width=width)
    elif processor.size["shortest_edge"] is not None:
        crop = getattr(processor, "crop_size", None)
        old = min(crop["height"], crop["width"]) if crop else processor.size["shortest_edge"]
        edge = round(processor.size["shortest_edge"] * min(height, width) / old)
        processor.size = type(processor.size)(shortest_edge=edge)
    if getattr(processor, "crop_size", None):
        processor.crop_size = type(processor.crop_size)(height=height, width=width)


def _crop_pct(processor: Any, size: tuple[int, int]) -> float | None:
    edge = processor.size["shortest_edge"] if getattr(processor, "size", None) else None
    if not getattr(processor, "do_center_crop", False) or not edge:
        return None
    return min(size) / edge


def _filter_name(resample: Any) -> str:
    from PIL import Image

    return Image.Resampling(int(resample)).name.lower()


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, (tuple, list)):
        return int(size[0]), int(size[-1])
    return int(size), int(size)
