"""Forward passes become numbers: accuracy and loss of a network on decoded images, and statistics
of its routing.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.checkpoint import open_network
from mitaswap.data import Decoded, decode, open_set, same_classes
from mitaswap.errors import MitaswapError, unknown
from mitaswap.mechanisms import Mechanism
from mitaswap.models import Network, wrap
from mitaswap.placement import pick_device
from mitaswap.results import wilson
from mitaswap.stats import STATISTICS, Statistic
from mitaswap.surgery import Handle, swapped_sites
from mitaswap.tokens import TokenLayout

DTYPES = ("float32", "bfloat16", "float16", "float64")

#: called with the number of images that have just been evaluated
OnImages = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """How forward passes are made.

    Args:
        data: name of the data set.
        split: its split; None for the set's own test or validation split.
        limit: use so many images, evenly spaced over the set; None for all.
        batch_size: images per forward.
        device: torch device; "auto" takes CUDA when there is one.
        dtype: dtype of weights and activations: "float32", "bfloat16", "float16" or "float64".
        workers: processes that decode images.
        seed: of generated data sets, and of the weights of networks opened without pretrained ones.

    Raises:
        MitaswapError: a value outside its range, an unknown dtype, a device that is not there.
    """

    data: str
    split: str | None = None
    limit: int | None = None
    batch_size: int = 64
    device: str = "auto"
    dtype: str = "float32"
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise MitaswapError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        pick_device(self.device)  # one that is not there is said before any work

    @property
    def torch_device(self) -> torch.device:
        """The device that "auto" stands for here."""
        return pick_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype called `dtype`."""
        return getattr(torch, self.dtype)


class Images:
    """The images of one evaluation: opened once, decoded once per preprocessing, whoever asks."""

    def __init__(
        self, settings: Settings, on_decode: Callable[[int, int], None] | None = None
    ) -> None:
        self.settings = settings
        self.on_decode = on_decode
        self.set = open_set(settings.data, settings.split, settings.limit, settings.seed)
        self._decoded: dict[str, Decoded] = {}

    def check(self, network: Network) -> None:
        """Raise `MitaswapError` unless the network's classes are those of the data, in order."""
        if network.num_classes != self.set.num_classes:
            raise MitaswapError(
                f"{network.name} has {network.num_classes} classes, but {self.set.name} has "
                f"{self.set.num_classes}: labels would not mean the same. Use a data set of the "
                "model's classes, or finetune the model on this one (`mitaswap finetune`)."
            )
        same_classes(network.class_names, self.set.class_names)

    def decoded(self, network: Network) -> Decoded:
        """The images as uint8, resized and cropped as the network's own config says."""
        key = network.preprocess.key
        if key not in self._decoded:
            to_uint8, workers = network.preprocess.to_uint8, self.settings.workers
            with torch.random.fork_rng(devices=[]):  # torch's loader draws a number for itself
                self._decoded[key] = decode(self.set, to_uint8, workers, self.on_decode)
        return self._decoded[key]


def batches(
    network: Network, decoded: Decoded, settings: Settings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images [B, 3, H, W] and labels [B] on the evaluation's device."""
    device, dtype = settings.torch_device, settings.torch_dtype
    for start in range(0, len(decoded.labels), settings.batch_size):
        chunk = slice(start, start + settings.batch_size)
        images = decoded.images[chunk].to(device, non_blocking=True)
        labels = decoded.labels[chunk].to(device, non_blocking=True)
        yield network.preprocess.normalise(images).to(dtype), labels


def measure(
    network: Network, decoded: Decoded, settings: Settings, on_images: OnImages | None = None
) -> dict[str, Any]:
    """Accuracy and loss of the network as it is (swapped or not).

    Returns:
        timm's columns (top1, top1_err, top5, top5_err in percent, infer_samples_per_sec), the
        counts behind them, a 95% Wilson interval (top1_low, top1_high), cross-entropy in nats, and
        seconds of wall time.

    Raises:
        MitaswapError: the network's outputs are not numbers.
    """
    network.module.eval()
    device = settings.torch_device
    wide = network.num_classes > 5
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    start = time.perf_counter()
    with torch.inference_mode():
        for images, labels in batches(network, decoded, settings):
            logits = network.logits(images).float()
            best = logits.topk(5 if wide else 1, dim=-1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            # stays on the device: reading a number here would stall it once per batch
            totals += torch.stack([best[:, 0].sum(), best.sum(), loss]).double()
            if on_images:
                on_images(len(labels))
    correct, correct5, loss_sum = totals.tolist()
    seconds = time.perf_counter() - start
    if loss_sum != loss_sum:
        raise _not_numbers(network, settings)
    return _scores(len(decoded.labels), correct, correct5 if wide else None, loss_sum, seconds)


def _scores(
    images: int, correct: float, correct5: float | None, loss: float, seconds: float
) -> dict[str, Any]:
    low, high = wilson(int(correct), images)
    top1 = 100.0 * correct / images
    top5 = None if correct5 is None else 100.0 * correct5 / images
    return {
        "images": images,
        "correct": int(correct),
        "top1": top1,
        "top1_err": 100.0 - top1,
        "top1_low": low,
        "top1_high": high,
        "top5": top5,
        "top5_err": None if top5 is None else 100.0 - top5,
        "loss": loss / images,
        "seconds": seconds,
        "infer_samples_per_sec": images / seconds,
    }


def _not_numbers(network: Network, settings: Settings) -> MitaswapError:
    how = f"run with {_mechanisms(network)} in {settings.dtype}"
    weights = network.module.named_parameters()
    broken = [name for name, weight in weights if not bool(weight.isfinite().all())]
    if broken:
        cause = f"Its parameter {broken[0]} is not finite: check the weights."
    else:
        cause = "Its weights are finite, so a layer overflows: try the dtype float32 or float64."
    return MitaswapError(f"{network.name!r} {how} gives outputs that are no numbers (NaN). {cause}")


def _mechanisms(network: Network) -> str:
    specs = dict.fromkeys(str(part.spec) for part in swapped_sites(network.module).values())
    return ", ".join(specs) or "its own attention"


def observe_routing(
    network: Network,
    handle: Handle,
    names: list[str],
    decoded: Decoded,
    settings: Settings,
    on_images: OnImages | None = None,
    layers: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Statistics of every routed layer of a swapped network.

    Args:
        handle: the network's swap.
        names: statistics, by their registered names.
        layers: paths of all attention sites, which number the layers; by default the swapped ones.

    Returns:
        Rows with `statistic`, `layer` (position in `layers`, from 0), `path` and the statistic's
        columns.

    Raises:
        MitaswapError: none of the swapped layers routes.
    """
    layers = [site.path for site in handle.sites] if layers is None else list(layers)
    parts = swapped_sites(network.module)
    paths = [site.path for site in handle.sites if parts[site.path].routes]
    if not paths:
        raise MitaswapError(
            f"{network.name!r} run with {_mechanisms(network)} has no layer that routes, so "
            f"there is no {', '.join(names)}"
        )
    found: dict[tuple[str, str], Statistic] = {
        (path, name): STATISTICS.get(name)() for path in paths for name in names
    }

    def observer(
        path: str, part: Mechanism, q: Tensor, k: Tensor, layout: TokenLayout, scale: float
    ) -> None:
        routing = part.route(q, k, layout=layout, scale=scale)
        if routing is None:  # a layer of another mechanism
            return
        for name in names:
            found[path, name].update(routing, layout)

    network.module.eval()
    with torch.inference_mode(), handle.observe(observer):
        for images, labels in batches(network, decoded, settings):
            network.logits(images)
            if on_images:
                on_images(len(labels))
    return [
        {"statistic": name, "layer": layers.index(path), "path": path, **row}
        for (path, name), statistic in found.items()
        for row in statistic.rows()
    ]


def evaluate(
    model: str | Path | nn.Module | Network,
    data: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
    dtype: str = "float32",
    workers: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of a model on a data set, as `mitaswap eval` measures a cell.

    Args:
        model: a model name, a converted directory, or a module of timm or transformers (or a
            `Network`), swapped as you like it. A module is left as it was, also when it is measured
            on another device or in another dtype.
        data, split, limit, batch_size, device, dtype, workers, seed: as `Settings`.

    Returns:
        The columns of `measure`.

    Raises:
        MitaswapError: as opening the model and the data; or their classes differ.
    """
    settings = Settings(data, split, limit, batch_size, device, dtype, workers, seed)
    images = Images(settings)
    if isinstance(model, (str, Path)):
        network = open_seeded(str(model), settings)
    else:
        given = model if isinstance(model, Network) else wrap(model)
        network = replace(given, module=copy.deepcopy(given.module))
    images.check(network)
    place(network.module, settings)
    return measure(network, images.decoded(network), settings)


def open_seeded(name: str, settings: Settings, **options: Any) -> Network:
    """As `open_network`; weights that are not pretrained come from the settings' seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return open_network(name, **options)


def place(module: nn.Module, settings: Settings) -> None:
    """Move a network to the evaluation's device and dtype."""
    module.to(device=settings.torch_device, dtype=settings.torch_dtype)
