"""Where the patches stand among the tokens, followed from the feature map through one dry forward.

Nothing is guessed: an operation that could move tokens and is not understood here makes the place
unknown, and so does anything that leaves a sequence of another length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


class Place(NamedTuple):
    """The token axis of a tensor: `before` special tokens, `patches`, `after` special ones.

    Args:
        before, after: special tokens in front of the patches and behind them.
        first: number of the first of these patches, for parts of a sequence.
        patches: number of patches.
    """

    before: int
    first: int
    patches: int
    after: int

    @property
    def total(self) -> int:
        """Length of the token axis."""
        return self.before + self.patches + self.after

    def part(self, start: int, stop: int) -> Place | None:
        """The place within [start, stop) of the axis; None where no patch is left."""
        low, high = max(start, self.before), min(stop, self.before + self.patches)
        if low >= high:
            return None
        return Place(low - start, self.first + low - self.before, high - low, stop - high)


#: patches, at a place that was lost
UNKNOWN = Place(0, -1, 0, 0)

_CAT = {torch.cat, torch.concat, torch.concatenate}
_SPLIT = {
    *(torch.split, Tensor.split, torch.split_with_sizes, Tensor.split_with_sizes),
    *(torch.chunk, Tensor.chunk, torch.tensor_split, Tensor.tensor_split),
}
_FRESH = {
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like),
    *(torch.randn_like, torch.randint_like),
}
_NARROW = {torch.narrow, Tensor.narrow}
_SELECT = {torch.select, Tensor.select, torch.unbind, Tensor.unbind}
_REORDER = {
    *(torch.roll, Tensor.roll, torch.flip, Tensor.flip, torch.gather, Tensor.gather),
    *(torch.index_select, Tensor.index_select, torch.take_along_dim, Tensor.take_along_dim),
    *(torch.scatter, Tensor.scatter, Tensor.scatter_, torch.index_copy, Tensor.index_copy),
    *(torch.sort, Tensor.sort),
}


class Places:
    """The place of the patches in every tensor that was computed from a feature map."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> Place | None:
        """The place in `tensor`; None without patches, `UNKNOWN` where it was lost."""
        return self._known.get(tensor)

    def start(self, feature: Tensor) -> None:
        """`feature` [B, C, h, w] is a new feature map: all of it is patches."""
        count = feature.shape[2] * feature.shape[3]
        if count > 1:  # one value for the whole image is a gate, not a map
            self._known[feature] = Place(0, 0, count, 0)

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note the places in the result of one call."""
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(leaf in self._known for leaf in leaves):
            return
        if func is Tensor.__setitem__:
            self._set(args[0], self._assigned(*args))
            return
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for output, place in zip(
            outputs, self._results(func, args, kwargs, leaves, outputs), strict=True
        ):
            self._set(output, place)

    def _set(self, tensor: Tensor, place: Place | None) -> None:
        if place is not None:
            self._known[tensor] = place
        else:
            self._known.pop(tensor, None)

    def _results(
        self, func: Any, args: Any, kwargs: Any, leaves: list[Tensor], outputs: list[Tensor]
    ) -> Sequence[Place | None]:
        if func in _FRESH:
            return [None] * len(outputs)
        if func in _CAT:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            return [self._joined(leaves, dim)]
        tensor = args[0] if args and isinstance(args[0], Tensor) else leaves[0]
        place = self.of(tensor)
        if place is not None and place is not UNKNOWN:
            axis = _axis(tensor, place)
            if func is Tensor.__getitem__:
                return [_indexed(tensor, place, axis, args[1])]
            if func in _SPLIT:
                dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
                if dim % tensor.ndim == axis:
                    return _split(place, [output.shape[dim] for output in outputs])
            if func in _NARROW and len(args) == 4 and args[1] % tensor.ndim == axis:
                start = int(args[2]) % place.total
                return [place.part(start, start + args[3])]
            if func in _SELECT:
                dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
                if dim % tensor.ndim == axis:
                    return [None] * len(outputs)
            if func is F.pad and axis is not None:
                return [_padded(tensor, place, axis, args[1] if len(args) > 1 else kwargs["pad"])]
            if func in _REORDER and (place.before or place.after):
                return [UNKNOWN] * len(outputs)
        found = {known for leaf in leaves if (known := self.of(leaf)) is not None}
        return [_agreed(found, output) for output in outputs]

    def _joined(self, parts: list[Tensor], dim: int) -> Place | None:
        known = [self.of(part) for part in parts]
        if UNKNOWN in known:
            return UNKNOWN
        axes = [p and _axis(t, p) for t, p in zip(parts, known, strict=True)]
        along = [a == dim % t.ndim for a, t in zip(axes, parts, strict=True)]
        if not any(along):  # joined along another axis, such as the halves of rotated queries
            found = {place for place in known if place is not None}
            return found.pop() if len(found) == 1 else UNKNOWN
        whole, specials = None, 0
        for part, place, joined in zip(parts, known, along, strict=True):
            if place is None or not joined:
                specials += part.shape[dim]
            elif whole is None:
                whole = place._replace(before=specials + place.before, after=0)
                specials = place.after
            elif specials or place.before or place.first != whole.first + whole.patches:
                return UNKNOWN
            else:
                whole = whole._replace(patches=whole.patches + place.patches)
                specials = place.after
        return whole and whole._replace(after=specials)

    def _assigned(self, target: Tensor, index: Any, value: Any) -> Place | None:
        """The place in `target` after `target[index] = value`."""
        before = self.of(target)
        put = self.of(value) if isinstance(value, Tensor) else None
        if UNKNOWN in (before, put):
            return UNKNOWN
        entries = _entries(index, target.ndim)
        if before is not None:
            axis = _axis(target, before)
            bounds = None if axis is None else _bounds(entries[axis], before.total)
            same = bounds and before.part(*bounds) == put
            return before if same else UNKNOWN
        for axis in range(target.ndim) if put is not None else ():
            bounds = _bounds(entries[axis], target.shape[axis])
            if put and bounds and bounds[1] - bounds[0] == put.total == _length(value, put):
                behind = target.shape[axis] - bounds[1]
                return put._replace(before=bounds[0] + put.before, after=put.after + behind)
        return None if put is None else UNKNOWN


def _axis(tensor: Tensor, place: Place) -> int | None:
    """The token axis, by its length; where several are as long, one inside goes first."""
    found = [axis for axis, size in enumerate(tensor.shape) if size == place.total]
    inside = [axis for axis in found if 0 < axis < tensor.ndim - 1]
    return max(inside or found, default=None)


def _length(tensor: Tensor, place: Place) -> int | None:
    axis = _axis(tensor, place)
    return None if axis is None else tensor.shape[axis]


def _agreed(found: set[Place], output: Tensor) -> Place | None:
    """The one place that fits an output, of those in the inputs."""
    if len(found) > 1:
        shape = tuple(output.shape)
        sizes = {*shape, *(a * b for a, b in pairwise(shape))}
        found = {place for place in found if place is not UNKNOWN and place.total in sizes} | (
            found & {UNKNOWN}
        )
    return next(iter(found)) if len(found) == 1 else UNKNOWN


def _entries(index: Any, ndim: int) -> list[Any]:
    """What an index takes of each axis."""
    parts = [part for part in (index if isinstance(index, tuple) else (index,)) if part is not None]
    where = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    behind = parts[where + 1 :]
    rest: list[Any] = [slice(None)] * max(0, ndim - where - len(behind))
    return [*parts[:where], *rest, *behind]


def _bounds(entry: Any, size: int) -> tuple[int, int] | None:
    """Start and stop of a slice without gaps."""
    if not isinstance(entry, slice):
        return None
    start, stop, step = entry.indices(size)
    return (start, stop) if step == 1 else None


def _indexed(tensor: Tensor, place: Place, axis: int | None, index: Any) -> Place | None:
    entries = _entries(index, tensor.ndim)
    if any(isinstance(entry, (Tensor, list)) for entry in entries):
        return UNKNOWN  # tokens that are chosen by number, or by a mask over several axes
    if axis is None:
        return place
    if isinstance(entries[axis], int):
        return None
    bounds = _bounds(entries[axis], place.total)
    return place.part(*bounds) if bounds else UNKNOWN


def _split(place: Place, sizes: list[int]) -> list[Place | None]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [place.part(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _padded(tensor: Tensor, place: Place, axis: int, pad: Sequence[int]) -> Place:
    last = 2 * (tensor.ndim - 1 - axis)  # pairs count from the last axis
    before, after = pad[last : last + 2] if last < len(pad) else (0, 0)
    if before < 0 or after < 0:
        return UNKNOWN
    return place._replace(before=place.before + before, after=place.after + after)
