"""Speed: attention cores against softmax attention, or whole networks against the untouched one.

A plan of its own beside `Plan`: nothing here has data or accuracy. Cells, runs and rows are the
same as everywhere. A cell is one comparison: all mechanisms in turn under one condition.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from mitaswap.benchmark import Effort, Rates, Setting, Swaps, measure_rates
from mitaswap.errors import MitaswapError, unknown
from mitaswap.mechanisms import SiteShape, mechanism
from mitaswap.placement import pick_device
from mitaswap.results import Row
from mitaswap.spec import Spec
from mitaswap.studies._base import Cell
from mitaswap.studies._timed import time_cores, time_networks
from mitaswap.tokens import TokenLayout

DTYPES = ("float32", "bfloat16", "float16", "float64")
DIRECTIONS = {"inference": "forward", "train": "forward+backward"}
MODES = ("eager", "compile", "cuda-graph")

#: what every comparison is against: softmax attention; it is measured first, asked for or not
BASELINE = Spec("standard")


@dataclass(frozen=True)
class BenchPlan:
    """What one `mitaswap bench` was asked to do. The same plan is the same run.

    Args:
        run: mechanisms.
        model: a model name for whole networks; None for attention cores.
        layouts: token layouts of the cores.
        sizes: image sizes of the network, (h, w); None is its own.
        batches: images per call; 0 is the batch with the most images/s (networks).
        total_tokens: instead of `batches`, as many images as have so many tokens together (cores).
        heads, head_dims: of the cores.
        dtypes: of all tensors, weights too.
        directions: "inference" and "train" (forward and backward).
        modes: "eager", "compile" (torch.compile), "cuda-graph" (replays of a graph; cores on CUDA).
        channels_last: whether images and convolutions lie channels last in memory (networks).
        device: torch device; "auto" takes CUDA when there is one.
        effort: time that is spent.
        seed: of inputs and random weights.
        model_options: options of `open_model`.
    """

    run: tuple[Spec, ...]
    model: str | None = None
    layouts: tuple[TokenLayout, ...] = ()
    sizes: tuple[tuple[int, int] | None, ...] = (None,)
    batches: tuple[int, ...] = (1,)
    total_tokens: int | None = None
    heads: tuple[int, ...] = (6,)
    head_dims: tuple[int, ...] = (64,)
    dtypes: tuple[str, ...] = ("float32",)
    directions: tuple[str, ...] = ("inference",)
    modes: tuple[str, ...] = ("eager",)
    channels_last: bool = False
    device: str = "auto"
    effort: Effort = field(default_factory=Effort)
    seed: int = 0
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, given, known in (
            ("dtype", self.dtypes, DTYPES),
            ("direction", self.directions, tuple(DIRECTIONS)),
            ("mode", self.modes, MODES),
        ):
            for name in given:
                if name not in known:
                    raise unknown(kind, name, known)
        if self.torch_device.type not in ("cpu", "cuda"):
            raise MitaswapError(
                f"times are taken on cpu and cuda, not on {self.device!r}; give --device cpu"
            )
        if "cuda-graph" in self.modes and (self.model or self.torch_device.type != "cuda"):
            subject = f"the model {self.model}" if self.model else f"device {self.torch_device}"
            raise MitaswapError(
                f"CUDA graphs are timed of attention cores on a CUDA device, not of {subject}; "
                "leave --cuda-graph out, or give --compile"
            )
        if self.model is None and self.channels_last:
            raise MitaswapError("channels last is for whole models: attention cores have no images")
        if self.model is None and 0 in self.batches:
            raise MitaswapError(
                "the batch that suits best is searched for whole models; attention cores need a "
                "number (-b 4), or --total-tokens 65536 for as many images as have so many tokens"
            )

    @property
    def torch_device(self) -> torch.device:
        """The device that "auto" stands for here."""
        return pick_device(self.device)

    @property
    def device_name(self) -> str:
        """The device in words."""
        device = self.torch_device
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
        return f"cpu, {torch.get_num_threads()} threads"

    @property
    def specs(self) -> list[Spec]:
        """The mechanisms, written in full; in front the baseline of the cores."""
        asked = [mechanism(spec).spec for spec in self.run]
        return list(dict.fromkeys([*([] if self.model else [BASELINE]), *asked]))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values: what a run directory stores and compares."""
        options = {k: v for k, v in self.model_options.items() if v is not None and v is not False}
        own: dict[str, Any] = {
            "bench": "model" if self.model else "core",
            "model": self.model,
            "run": [str(spec) for spec in self.run],
            "batches": [batch or "auto" for batch in self.batches],
            "dtypes": list(self.dtypes),
            "directions": list(self.directions),
            "modes": list(self.modes),
            "device": self.device_name,
            "effort": asdict(self.effort),
            "seed": self.seed,
            **options,
        }
        if self.model:
            last = {"channels_last": True} if self.channels_last else {}
            return {**own, **last, "img_size": [_size(size) for size in self.sizes]}
        return {
            **own,
            "tokens": [str(layout) for layout in self.layouts],
            "heads": list(self.heads),
            "head_dims": list(self.head_dims),
            "total_tokens": self.total_tokens,
        }


def bench_cells(plan: BenchPlan, rates: Mapping[str, Rates]) -> list[Cell]:
    """One cell per comparison, checked but not computed.

    Args:
        rates: those of the plan's device, by dtype; see `rates_of`.

    Raises:
        MitaswapError: a mechanism that is unknown, or whose options do not fit a size.
    """
    made = _networks(plan) if plan.model else _cores(plan, rates)
    return list({cell.key: cell for cell in made}.values())


def rates_of(plan: BenchPlan) -> dict[str, Rates]:
    """The device's rates, measured now, for each dtype of the plan."""
    device = plan.torch_device
    return {name: measure_rates(device, getattr(torch, name)) for name in plan.dtypes}


def _settings(plan: BenchPlan) -> Iterator[tuple[Setting, str, Row]]:
    """Every dtype, direction and mode, with the columns that all rows under it share."""
    for dtype, direction, mode in itertools.product(plan.dtypes, plan.directions, plan.modes):
        setting = Setting(
            dtype=getattr(torch, dtype),
            device=plan.torch_device,
            backward=direction == "train",
            seed=plan.seed,
            channels_last=plan.channels_last,
        )
        columns: Row = {
            "study": "bench",
            "bench": "model" if plan.model else "core",
            "device": str(plan.torch_device),
            "device_name": plan.device_name,
            "dtype": dtype,
            "direction": DIRECTIONS[direction],
            "mode": mode,
            "seed": plan.seed,
        }
        words = f"{dtype}, {DIRECTIONS[direction]}, {mode}"
        if plan.channels_last:
            columns["memory_format"] = "channels last"
            words += ", channels last"
        yield setting, words, columns


def _cores(plan: BenchPlan, rates: Mapping[str, Rates]) -> Iterator[Cell]:
    specs = plan.specs
    for heads, dim, layout in itertools.product(plan.heads, plan.head_dims, plan.layouts):
        for spec in specs:
            _ask(spec, SiteShape(heads, dim, layout))
    for (setting, words, columns), heads, dim, layout in itertools.product(
        _settings(plan), plan.heads, plan.head_dims, plan.layouts
    ):
        total = plan.total_tokens
        batches = (max(1, total // layout.tokens),) if total else plan.batches
        for batch in batches:
            site = SiteShape(heads, dim, layout)
            alike = f"{total} tokens" if total else _images(batch)
            about: Row = {**columns, "heads": heads, "head_dim": dim, "batching": alike}
            label = f"{layout.tokens} tokens x {batch}, {heads} heads of {dim}, {words}"
            yield Cell(
                key=f"bench/core/{layout}/{alike}/{heads}x{dim}/{words}",
                label=label,
                images=len(specs),
                compute=time_cores(
                    specs, plan.effort, setting, batch, site, about, rates[str(columns["dtype"])]
                ),
            )


def _ask(spec: Spec, site: SiteShape) -> None:
    """Raise `MitaswapError` if the options do not fit a site: before any work is done."""
    try:
        with suppress(RuntimeError):  # no room for learned parts: a cell's own answer
            mechanism(spec).attach(site)
    except MitaswapError as error:
        where = f"{site.heads} heads of {site.head_dim} at {site.layout} tokens"
        raise MitaswapError(f"{where}: {error}") from None


def _networks(plan: BenchPlan) -> Iterator[Cell]:
    assert plan.model is not None
    opened: dict[tuple[int, int] | None, Swaps] = {}
    # the dtype of the kernels that are timed, so that no others are compiled; a CPU may lack it
    alone = len(plan.dtypes) == 1 and plan.torch_device.type == "cuda"
    dtype = {"dtype": getattr(torch, plan.dtypes[0])} if alone else {}

    def swaps(size: tuple[int, int] | None) -> Swaps:
        """The network at one size; only the latest is kept."""
        if size not in opened:
            opened.clear()
            assert plan.model is not None
            opened[size] = Swaps.open(
                plan.model, size, plan.seed, plan.torch_device, **dtype, **plan.model_options
            )
        return opened[size]

    for size in plan.sizes:
        for spec in plan.specs:
            swaps(size).check(spec)
    every = itertools.product(plan.sizes, plan.batches, _settings(plan))
    for size, batch, (setting, words, columns) in every:
        alike = _images(batch) if batch else "best batch"
        label = f"{plan.model} at {_size(size)} pixels, {alike}, {words}"

        def compute(
            on_images: Callable[[int], None],
            size: tuple[int, int] | None = size,
            batch: int = batch,
            setting: Setting = setting,
            about: Row = {**columns, "batching": alike},  # noqa: B006
        ) -> list[Row]:
            made = time_networks(plan.specs, plan.effort, setting, batch, swaps(size), about)
            return made(on_images)

        yield Cell(f"bench/model/{_size(size)}/{alike}/{words}", label, len(plan.specs), compute)


def _images(batch: int) -> str:
    return f"{batch} image" + ("" if batch == 1 else "s")


def _size(size: tuple[int, int] | None) -> Literal["own"] | str:
    if size is None:
        return "own"
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
