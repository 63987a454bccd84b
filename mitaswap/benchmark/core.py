"""The attention core alone: random q, k, v, a mechanism, and the gradients if asked for."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import Mechanism, SiteShape, mechanism
from mitaswap.spec import Spec
from mitaswap.tokens import TokenLayout

#: an attention call: q, k, v and the attention module's input x, which few mechanisms read
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How tensors are computed with.

    Args:
        dtype, device: of all tensors.
        backward: whether gradients are part of it.
        seed: of the random numbers.
        channels_last: whether images and the weights of convolutions lie channels last in memory.
    """

    dtype: torch.dtype
    device: torch.device
    backward: bool = False
    seed: int = 0
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """How 4-D tensors lie in memory."""
        return torch.channels_last if self.channels_last else torch.preserve_format


@dataclass(frozen=True, kw_only=True)
class CoreShape(Setting):
    """Everything about one comparison of attention cores but the mechanism.

    Args:
        batch: images.
        site: heads, head dim and token layout.
    """

    batch: int
    site: SiteShape

    @property
    def names(self) -> tuple[str, ...]:
        """What `once` returns."""
        return ("output", "dq", "dk", "dv", "dx") if self.backward else ("output",)


@dataclass(frozen=True)
class Inputs:
    """What a mechanism is called with: q, k, v [B, H, N, D], x [B, N, C], the output's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    grad: Tensor

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.x

    @classmethod
    def draw(cls, shape: CoreShape, x: bool) -> Inputs:
        """Normal random numbers: the same for all mechanisms. Without x, that is empty."""
        made = torch.Generator(shape.device).manual_seed(shape.seed)

        def normal(*size: int) -> Tensor:
            found = torch.randn(size, generator=made, device=shape.device, dtype=torch.float32)
            return found.to(shape.dtype)

        site, tokens = shape.site, shape.site.layout.tokens
        wide = (shape.batch, site.heads, tokens)
        q, k = (normal(*wide, site.head_dim) for _ in range(2))
        v = normal(*wide, site.value_dim)
        read = normal(shape.batch, tokens, site.width if x else 0)
        for tensor in (q, k, v, read):
            tensor.requires_grad_(shape.backward)
        grad = normal(*wide, site.value_dim) if shape.backward else v.new_empty(0)
        return cls(q, k, v, read, grad)


def projecting(
    shape: CoreShape, dtype: torch.dtype | None = None
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What stands in for a network's key and value projections: products with random numbers, the
    same for all mechanisms, rounded to the shape's dtype. `dtype` is what they are computed in
    where it is another one.
    """
    site, made = shape.site, torch.Generator().manual_seed(shape.seed + 2**16)
    widths = [site.heads * site.head_dim, site.heads * site.value_dim]
    drawn = torch.randn(site.width, sum(widths), generator=made) * site.width**-0.5
    weight = drawn.to(shape.device, shape.dtype).to(dtype or shape.dtype)

    def project(rows: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (rows.to(weight.dtype) @ weight).to(rows.dtype).split(widths, dim=2)
        keys = keys.unflatten(2, (site.heads, -1)).transpose(1, 2)
        values = values.unflatten(2, (site.heads, -1)).transpose(1, 2)
        return keys, values

    return project


def cast(spec: Spec, shape: CoreShape) -> Mechanism:
    """A mechanism settled at the shape's site, in the precision it would choose itself."""
    part = mechanism(spec)
    part.attach(shape.site)
    # as at a first call: half precision keeps learned parts in float32
    half = shape.dtype.itemsize < 4
    return part.to(shape.device, torch.float32 if half else shape.dtype).eval()


def attending(part: Mechanism, shape: CoreShape, compiled: bool = False) -> Attend:
    """The mechanism as a function of tensors."""
    layout, reads_x = shape.site.layout, "x" in part.needs
    project = projecting(shape) if "project" in part.needs else None

    def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        extra: dict[str, Any] = {"x": x} if reads_x else {}
        if project is not None:
            extra["project"] = project
        return part(q, k, v, layout=layout, **extra)

    return compile_alone(attend, str(part.spec)) if compiled else attend


def compile_alone(
    call: Callable[..., Any], name: str, fullgraph: bool = False
) -> Callable[..., Any]:
    """`torch.compile` for the shapes that come, of code that belongs to this call only: closures of
    one function share their code, and the compiler would take them for one that changes.
    """
    code = call.__code__.replace(co_name="".join(c if c.isalnum() else "_" for c in name))
    alone = types.FunctionType(
        code, call.__globals__, code.co_name, call.__defaults__, call.__closure__
    )
    return torch.compile(alone, dynamic=False, fullgraph=fullgraph)


def once(attend: Attend, inputs: Inputs, backward: bool, also: Sequence[Tensor]) -> list[Any]:
    """One pass: the output, and the gradients of q, k, v, x (None where there is none).

    Args:
        also: parameters whose gradients are computed too.
    """
    if not backward:
        with torch.inference_mode():
            return [attend(*inputs.given)]
    out = attend(*inputs.given)
    grads = torch.autograd.grad(out, [*inputs.given, *also], inputs.grad, allow_unused=True)
    return [out.detach(), *grads[:4]]


class Captured:
    """A call as a CUDA graph, captured when it is first called: its launches cost the host next to
    nothing then, so that short ones are not timed waiting for Python.
    """

    def __init__(self, plain: Callable[[], object]) -> None:
        self.plain = plain
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is None:
            for _ in range(2):  # compiles and tunes, which a capture cannot
                self.plain()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.plain()
            self.graph = graph
        self.graph.replay()


def core_runs(
    parts: Mapping[str, Mechanism], shape: CoreShape, compiled: bool, captured: bool = False
) -> dict[str, Callable[[], object]]:
    """What is timed: one call per mechanism, all on the same random numbers."""
    inputs = Inputs.draw(shape, x=any("x" in part.needs for part in parts.values()))

    def run(part: Mechanism) -> Callable[[], object]:
        attend, learned = attending(part, shape, compiled), list(part.parameters())

        def plain() -> object:
            return once(attend, inputs, shape.backward, learned)

        return Captured(plain) if captured else plain

    return {name: run(part) for name, part in parts.items()}


def squarest(tokens: int, prefix: int) -> TokenLayout:
    """The layout of so many tokens whose grid is nearest to a square.

    Raises:
        MitaswapError: nothing is left for the grid, or it would be a single row.
    """
    patches = tokens - prefix
    height = next((h for h in range(math.isqrt(max(patches, 0)), 0, -1) if patches % h == 0), 0)
    if height < 1 or (height == 1 and patches > 3):
        raise MitaswapError(
            f"{tokens} tokens with a prefix of {prefix} leave {patches} for the grid, which is no "
            "raster of several rows and columns; give another number, or the grid itself: 14x14"
        )
    return TokenLayout(prefix, (height, patches // height))
