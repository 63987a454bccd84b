"""Whole networks: the untouched one and copies with other attention, timed on the same images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mitaswap.benchmark.core import CoreShape, Setting, compile_alone
from mitaswap.benchmark.timing import Failure, attempt
from mitaswap.checkpoint import open_network
from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import SiteShape
from mitaswap.models import Network
from mitaswap.spec import Recipe, Spec
from mitaswap.surgery import Site, ask, swap, walk

_MOST = 4096  # images that a search for the best batch tries
_GAIN = 1.01  # of images/s that counts as better
#: calls for one batch size of the search, at least, and seconds that they take: clocks are higher
#: after a pause, so the median of the later half counts
_CALLS, _SECONDS = 6, 0.3


@dataclass(frozen=True)
class Swaps:
    """One network at one image size, and what may be put into it.

    Args:
        network: as its library made it.
        size: height and width of the images.
        sites: its attention sites at that size.
    """

    network: Network
    size: tuple[int, int]
    sites: list[Site]

    @classmethod
    def open(
        cls,
        name: str,
        size: tuple[int, int] | None,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Swaps:
        """The network for images of that size; None is its own.

        The forwards that find its sites and check a swap run on the device: at 2,048 pixels they
        take minutes on a CPU.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = open_network(name, swapped=False, img_size=size, **options)
        network.module.to(device, dtype)
        size = size or network.preprocess.size
        sites = walk(network.module, network.inputs(network.example(2, size)))
        return cls(network, size, sites)

    def copy(self, spec: Spec | None) -> Network:
        """A copy of the network, with the mechanism in all sites that can be swapped.

        Raises:
            MitaswapError: it does not fit, or no site can be swapped.
        """
        network = replace(self.network, module=copy.deepcopy(self.network.module))
        if spec is not None:
            example = network.inputs(network.example(2, self.size))
            swap(network.module, spec, example=example, sites=self.sites)
        return network

    def shapes(self, batch: int, like: Setting) -> list[CoreShape]:
        """The distinct attention cores inside, at a batch size."""
        found = {
            SiteShape(site.heads, site.head_dim, site.layout, site.value_dim, site.width): None
            for site in self.sites
            if site.swappable and site.layout is not None
        }
        return [CoreShape(batch=batch, site=site, **vars(like)) for site in found]

    def check(self, spec: Spec) -> None:
        """Raise `MitaswapError` if it does not fit a site: before any work is done."""
        ask(self.network.module, Recipe.of(spec), self.sites)


def model_runs(
    networks: Mapping[str, Network],
    batches: Mapping[str, int],
    size: tuple[int, int],
    like: Setting,
    compiled: bool,
) -> dict[str, Callable[[], object]]:
    """What is timed: one pass of each network over a batch of its own size.

    Args:
        like: device, dtype, direction and seed.
    """
    images: dict[int, Tensor] = {}
    runs = {}
    for name, network in networks.items():
        batch = batches[name]
        if batch not in images:
            images[batch] = _images(network, batch, size, like)
        runs[name] = model_run(network, images[batch], like.backward, compiled, name)
    return runs


def model_run(
    network: Network, x: Tensor, backward: bool, compiled: bool = False, name: str = "network"
) -> Callable[[], object]:
    """One pass over the images: logits, or features of a network without a head."""
    network.module.train(backward)
    weights = [p for p in network.module.parameters() if p.requires_grad]

    def forward(images: Tensor) -> Any:
        return network.logits(images) if network.num_classes else network.forward(images)

    call = compile_alone(forward, name) if compiled else forward

    def run() -> object:
        if not backward:
            with torch.inference_mode():
                return call(x)
        logits = call(x)
        return torch.autograd.grad(logits, weights, torch.ones_like(logits), allow_unused=True)

    return run


def place(network: Network, like: Setting) -> Network:
    """The network on the device, in the dtype.

    Raises:
        MitaswapError: gradients are asked for, and it has no logits to start from.
    """
    if like.backward and not network.num_classes:
        raise MitaswapError(
            f"{network.name!r} has no classification head, so there is no backward to time; "
            "give --bench inference"
        )
    network.module.to(like.device, like.dtype).to(memory_format=like.memory_format)
    return network


def finite(network: Network, size: tuple[int, int], like: Setting) -> bool:
    """Whether the logits of two images are numbers."""
    if not network.num_classes:
        return True
    network.module.eval()
    with torch.inference_mode():
        return bool(network.logits(_images(network, 2, size, like)).isfinite().all())


def best_batch(
    network: Network, size: tuple[int, int], like: Setting, compiled: bool = False
) -> int | Failure:
    """The power of two with the most images/s: until memory ends, or two doublings gain nothing.

    A compiled network, which is compiled anew for each batch, is searched near what is best
    uncompiled.
    """
    best, rate, worse, batch = 0, 0.0, 0, 1
    while batch <= _MOST and worse < 2:
        found = attempt(partial(_rate, network, batch, size, like), like.device)
        if isinstance(found, Failure):
            if not best or found.status != "out of memory":
                return found
            break
        better = found > _GAIN * rate
        worse = 0 if better else worse + 1
        best, rate = (batch, found) if better else (best, rate)
        batch *= 2
    return _best_near(best, network, size, like) if compiled else best


def _best_near(start: int, network: Network, size: tuple[int, int], like: Setting) -> int:
    """The best batch of the compiled network, doubled or halved from a first one while it gains."""

    def rate(batch: int) -> float:
        """Images/s; 0 where it does not run, of which its time will tell."""
        found = attempt(partial(_rate, network, batch, size, like, True), like.device)
        return 0.0 if isinstance(found, Failure) else found

    best, most = start, rate(start)
    for step in (2.0, 0.5):
        while 1 <= (batch := int(best * step)) <= _MOST and (found := rate(batch)) > _GAIN * most:
            best, most = batch, found
        if best != start:
            break
    return best


def _rate(
    network: Network, batch: int, size: tuple[int, int], like: Setting, compiled: bool = False
) -> float:
    """Images/s, once clocks have settled."""
    images = _images(network, batch, size, like)
    run = model_run(network, images, like.backward, compiled, f"batch_{batch}")
    run()  # compiles
    _wait(like.device)
    seconds: list[float] = []
    while len(seconds) < _CALLS or sum(seconds) < _SECONDS:
        start = time.perf_counter()
        run()
        _wait(like.device)
        seconds.append(time.perf_counter() - start)
    return batch / median(seconds[len(seconds) // 2 :])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _images(network: Network, batch: int, size: tuple[int, int], like: Setting) -> Tensor:
    made = torch.Generator(like.device).manual_seed(like.seed)
    shape = (batch, len(network.preprocess.mean), *size)
    images = torch.randn(shape, generator=made, device=like.device)
    return images.to(like.dtype).to(memory_format=like.memory_format)
