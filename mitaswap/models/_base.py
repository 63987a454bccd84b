"""What every network is to the rest of the program, whichever library it came from.

A library is one public file of this folder: it registers a function `Request -> Network` with
`@source(...)` and brings its own `Network` and `Preprocess`. How names are read, and which library
they go to, is in `_open.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.registry import Registry
from mitaswap.spec import Spec

if TYPE_CHECKING:
    from PIL.Image import Image


class Preprocess(ABC):
    """How a network wants its images: first pixels (`to_uint8`), then numbers (`normalise`).

    The two halves are apart so that a run decodes and resizes each image once, and keeps bytes
    instead of floats.

    Attributes:
        size: height and width of the input, in pixels.
        mean: subtracted per channel, for values in 0..1.
        std: divided by per channel, for values in 0..1.
        crop_pct: share of the resized image that the central crop keeps; None without such a crop.
        interpolation: name of the resampling filter ("bicubic", ...).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float | None
    interpolation: str

    @property
    @abstractmethod
    def key(self) -> str:
        """Equal keys mean equal pixels from `to_uint8`, whatever mean and std are."""

    @abstractmethod
    def to_uint8(self, image: Image) -> Tensor:
        """The image resized and cropped as upstream's configuration says: uint8 `[C, h, w]`."""

    def normalise(self, batch: Tensor) -> Tensor:
        """The network's input from bytes: uint8 `[B, C, h, w]` to float32 on its device."""
        if batch.dtype != torch.uint8:
            raise TypeError(f"normalise takes the uint8 pixels of to_uint8, got {batch.dtype}")
        mean = torch.tensor(self.mean, device=batch.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=batch.device).view(-1, 1, 1)
        return batch.to(torch.float32).div_(255).sub_(mean).div_(std)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.key}, mean={self.mean}, std={self.std})"


@dataclass(eq=False)
class Network(ABC):
    """A pretrained network and what its library knows about it.

    Args:
        module: the library's own model, in eval mode; may be moved, swapped or replaced later.
        name: the name it was opened by, as the user gave it.
        arch: the library's name of the architecture ("vit_tiny_patch16_224", "dinov2").
        preprocess: how images become its input.
        num_classes: length of the logits; 0 when there is no (trained) classification head.
        class_names: name of each class, or None when upstream's configuration does not name them.
        config: content of upstream's config.json, with whatever keys others added to it.
        directory: the local directory it was opened from, if it was.
    """

    module: nn.Module
    name: str
    arch: str
    preprocess: Preprocess
    num_classes: int
    class_names: tuple[str, ...] | None
    config: dict[str, Any]
    directory: Path | None = None

    source: ClassVar[str]

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor | dict[str, Any]:
        """What the module's forward takes for a float batch `[B, C, h, w]`: the batch itself, or
        keyword arguments.
        """

    def forward(self, x: Tensor) -> Any:
        """Run the whole network on a float batch `[B, C, h, w]`, whatever it returns."""
        given = self.inputs(x)
        return self.module(given) if isinstance(given, Tensor) else self.module(**given)

    @abstractmethod
    def _head(self, output: Any) -> Any:
        """The logits inside what `forward` returned."""

    @abstractmethod
    def _replace_head(self, classes: int) -> None:
        """Give the module a new head; `config` may be left as it is."""

    @abstractmethod
    def _write(self, folder: Path, state: dict[str, Tensor]) -> None:
        """Write `model.safetensors`, `config.json` and the like into an empty folder."""

    def logits(self, x: Tensor) -> Tensor:
        """Class scores `[B, num_classes]` of a float batch `[B, C, h, w]`.

        Raises:
            MitaswapError: the network has no classification head.
        """
        if not self.num_classes:
            option = "num_classes" if self.source == "timm" else "num_labels"
            raise MitaswapError(
                f"{self.name!r} ({self.arch}) has no classification head, so it has no logits. "
                f"Where the architecture can have one, the option {option}=N adds it, untrained."
            )
        scores = self._head(self.forward(x))
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise MitaswapError(
                f"{self.name!r} does not give one row of class scores per image, but {got}"
            )
        return scores

    def reset_head(self, classes: int) -> None:
        """Replace the classification head by a new one of `classes` classes, drawn from torch's
        global generator; all other weights stay.

        Raises:
            MitaswapError: `classes` is not positive, or the module has no head to replace.
        """
        if classes < 1:
            raise MitaswapError(f"a head needs at least 1 class, got {classes}")
        training = self.module.training
        self._replace_head(classes)
        self.module.train(training)
        self.num_classes, self.class_names = classes, None

    def example(self, batch: int = 1, size: tuple[int, int] | None = None) -> Tensor:
        """A batch of normal noise, `[batch, C, h, w]`, on the network's device and in its dtype.

        The same numbers each time, and the global random state is left alone. `size` is (h, w) and
        replaces the network's own.
        """
        like = next((p for p in self.module.parameters() if p.is_floating_point()), torch.empty(0))
        shape = (batch, len(self.preprocess.mean), *(size or self.preprocess.size))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(device=like.device, dtype=like.dtype)

    def save(
        self,
        directory: str | Path,
        extra_config: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write a directory that upstream's own library loads.

        A new directory appears whole or not at all. In one that exists, each file is replaced
        whole, config.json last, and files of other names stay.

        Args:
            directory: where to.
            extra_config: keys to add to upstream's config.json.
            state_dict: weights to write instead of the module's own, by upstream's parameter names.
            files: further files to write along, name to content.

        Returns:
            The directory.

        Raises:
            MitaswapError: the directory cannot be written; what was there before is untouched.
        """
        target = Path(directory).absolute()
        if target.exists() and not target.is_dir():
            raise MitaswapError(
                f"cannot save to {str(directory)!r}: it is a file, give a directory"
            )
        # A sibling, not the system's temporary folder: a rename must not cross file systems.
        scratch = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            scratch.mkdir(parents=True)
            self._write(
                scratch, dict(self.module.state_dict() if state_dict is None else state_dict)
            )
            _extend_config(scratch / "config.json", extra_config or {})
            for file_name, content in (files or {}).items():
                (scratch / file_name).write_bytes(content)
            _publish(scratch, target)
        except Exception as error:
            # safetensors reports a full disk with an exception of its own, which is no OSError
            if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
                raise MitaswapError(f"cannot save to {str(directory)!r}: {error}") from error
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return Path(directory)


def _extend_config(path: Path, extra: Mapping[str, Any]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    clash = sorted(config.keys() & extra.keys())
    if clash:
        raise ValueError(f"extra_config would overwrite upstream's {', '.join(clash)}")
    path.write_text(json.dumps({**config, **extra}, indent=2) + "\n", encoding="utf-8")


def _publish(scratch: Path, target: Path) -> None:
    usual = (scratch / "config.json").stat().st_mode
    for file in scratch.iterdir():
        file.chmod(usual)  # safetensors makes its files readable for their owner only
    if not target.exists():
        scratch.rename(target)
        return
    for file in sorted(scratch.iterdir(), key=lambda f: f.name == "config.json"):
        os.replace(file, target / file.name)


@dataclass(frozen=True)
class Request:
    """One call of `open_model`, taken apart for the library that serves it.

    Args:
        given: the name as the user gave it.
        spec: the library's own name of the network, with its options.
        pretrained: whether to load upstream's weights; False leaves them random.
        trust_remote_code: whether code that comes with the weights may run.
        directory: the local directory that holds the network, if it is one.
        state: weights read from a bare file, to be loaded instead of upstream's.
        img_size: height and width in pixels to build the network for, where it can be; None for its
            own.
    """

    given: str
    spec: Spec
    pretrained: bool = True
    trust_remote_code: bool = False
    directory: Path | None = None
    state: Mapping[str, Tensor] | None = None
    img_size: tuple[int, int] | None = None


SourceFunction = Callable[[Request], Network]
SOURCES: Registry[SourceFunction] = Registry("model source", "mitaswap.models")
CONFIG_KEYS: dict[str, str] = {}
"""The key of config.json by which a library's directories are known, to the name of its source."""

WRAPPERS: list[Callable[[nn.Module], Network | None]] = []
"""Per library, a function that takes a bare module of that library as a `Network`, and no other."""


def source(name: str, config_key: str | None = None) -> Callable[[SourceFunction], SourceFunction]:
    """Decorator that enters a function as the source of the names `NAME:...`.

    Args:
        name: the prefix.
        config_key: key that this library's config.json has and that of no other library.
    """

    def enter(function: SourceFunction) -> SourceFunction:
        if config_key:
            CONFIG_KEYS[config_key] = name
        return SOURCES.register(name)(function)

    return enter
