"""Spatial-reduction attention of the Pyramid Vision Transformer: r x r patches become one key and
one value (Wang et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.chosen import attend_all
from mitaswap.operators.counting import attend_flops, product_flops
from mitaswap.operators.experts import Branch
from mitaswap.operators.pool import pool_tokens
from mitaswap.operators.ranges import in_range
from mitaswap.operators.special import split
from mitaswap.spec import Value
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class PvtOptions(Options):
    """Options of spatial-reduction attention.

    Args:
        reduction: `conv` reduces windows of r x r patches by a learned strided convolution (PVT);
            `pool` averages the grid to size x size entries, without parameters (PVTv2's linear
            attention, as its paper has it); `pool-conv` maps the averages by a learned 1 x 1
            convolution, norms them and takes the GELU (its released code).
        place: where the reduction stands: `before` the key and value projections, on the module's
            input (the paper), or `after` them, on keys and on values, with a map and a norm for
            each. `after` runs also where the site's projections are not known.
        r: side of the windows of `conv`; 2 as in PVT's stage of 14 x 14 patches.
        size: side of the pooled map of `pool` and `pool-conv`.
        mix: `width` reduces all channels together, as the paper; `head` H groups of them (with
            `after` each head's) among themselves, at 1 / H of the parameters and operations.
        norm: layer norm of what `conv` and `pool-conv` map, over the channels that `mix` takes
            together: the paper's Norm in SR. `false` serves pretrained weights, whose scores and
            values it would all change. Bare averages (`pool`) have none.
    """

    reduction: Literal["conv", "pool", "pool-conv"] = "conv"
    place: Literal["before", "after"] = "before"
    r: int = 2
    size: int = 7
    mix: Literal["width", "head"] = "width"
    norm: bool = True


@MECHANISMS.register("pvt")
class Pvt(Mechanism):
    """O = softmax(Q [K_S; SR(X_P) W_K]^T scale) [V_S; SR(X_P) W_V],
    SR(X) = Norm(Reshape(X, r) W / cells).

    X is the module's input, W_K and W_V are its own projections, biases included. Reshape lays the
    r x r patches of a window (row by row) and their channels, the last index, in one row of r r C
    numbers. With place=after the projections come first, SR(X_P W_K) and SR'(X_P W_V), and keys and
    values have a W and a Norm each, of H D channels. Without Norm and until W is trained that is
    the same. In either place Norm changes every score and every value of a pretrained network;
    norm=false leaves it out.

    With pooling SR(X) is the average of each adaptive window, or, as PVTv2's code has it,
    GELU(Norm(average W)).

    Where r does not divide a side, windows at the bottom and right edge are smaller: their missing
    patches count as zeros, and `cells`, r^2 elsewhere, is the number of those that are there.
    Special tokens (subscript S) are entries of their own, with the keys and values that they have,
    never normed, and every query reads all entries.

    A network that this is swapped into still makes keys and values of all its patches, which
    place=before does not read; and a fused projection of queries, keys and values makes queries of
    the reduced rows too. Neither is in the mechanism's cost, which is the formula's.

    Parameters (W / r^2 are the weights of a strided convolution), one set for keys and values:
        reduction: W, [1, r r C, C], or [H, r r C / H, C / H] for mix=head; an identity for each
            patch of the window, so that SR starts as the average. pool-conv has r = 1, pool none.
        norm_weight, norm_bias: of Norm, [1, C], or [H, C / H] for mix=head; 1 and 0. Not with
            norm=false or reduction=pool.
        key_reduction, key_norm_weight, key_norm_bias, value_reduction, ...: with place=after, of
            H D and H Dv channels in the place of C.
    """

    options_type = PvtOptions
    options: PvtOptions
    card = Card(
        strategy="compression",
        expert_type="MLP",
        expert_count="1 shared",
        construction="learnable projection",
        topology="all-to-one",
        source="Wang et al. 2021, arXiv 2102.12122, Eq. 2-3; PVTv2: arXiv 2106.13797",
        cost="N^2 d / r^2",
        untrained="needs finetuning",
    )
    limits = (
        ("pvt(r=1,norm=false)", "standard"),
        ("pvt(r=1,norm=false,place=after)", "standard"),
        ("pvt(reduction=pool,size=7)", "linformer(n=49)"),
        ("pvt(reduction=pool,size=7,place=after)", "linformer(n=49)"),
    )
    samples = (
        {"r": 3},
        {"r": 3, "norm": False},
        {"r": 4, "mix": "head"},
        {"reduction": "pool", "size": 4},
        {"reduction": "pool-conv", "size": 4, "mix": "head", "norm": False},
        {"place": "after", "r": 3},
        {"place": "after", "r": 3, "norm": False},
        {"place": "after", "r": 4, "mix": "head", "norm": False},
        {"place": "after", "reduction": "pool", "size": 4},
        {"place": "after", "reduction": "pool-conv", "size": 4, "mix": "head"},
    )
    unprojected: ClassVar[dict[str, Value]] = {"place": "after"}

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"grid", "x", "project"} if self._before else {"grid"})

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        o, held = self.options, {"scaled", "special-set"}
        if not self._norms and o.reduction != "pool-conv":
            held |= {"linear", "averages", "convex"}
        if not self._norms or (o.mix == "head" and not self._before):
            held |= {"heads"}
        if o.reduction != "conv":
            held |= {"mirror"}
        elif o.r == 1:  # softmax attention, until it is trained
            held |= {"mirror", "every-pair"} | (set() if self._norms else {"key-set", "pointwise"})
        return frozenset(held)

    @property
    def _before(self) -> bool:
        return self.options.place == "before"

    @property
    def _norms(self) -> bool:
        return self.options.norm and self.options.reduction != "pool"

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o, side = self.options, min(layout.grid)
        if self.site is None:  # once it is built, windows follow the grid
            # the option that is not in use may be the default on any grid
            conv, of = o.reduction == "conv", f"(tokens {layout})"
            small = side if conv else max(side, PvtOptions.r)
            in_range(self, "r", o.r, 1, small, f"patches along the grid's smaller side {of}")
            large, least = max(*layout.grid, PvtOptions.size), PvtOptions.size
            of = f"patches along the grid's longer side, or {least} on smaller grids {of}"
            in_range(self, "size", o.size, 1, large, of)

    def check_site(self, site: SiteShape) -> None:
        super().check_site(site)
        if self._before and site.width % self._groups(site.heads):
            raise MitaswapError(
                f"{self.spec} cuts the input's channels into one group per head, and {site.width} "
                f"channels are no multiple of {site.heads} heads; use mix=width"
            )

    def _groups(self, heads: int) -> int:
        """Groups of channels that are reduced apart; averages of any are the same."""
        return heads if self.options.mix == "head" and self.options.reduction != "pool" else 1

    def _maps(self, site: SiteShape) -> list[tuple[str, int, int]]:
        """Each SR: in front of its parameters' names, groups of channels, channels of each."""
        groups, widths = self._groups(site.heads), {"": site.width}
        if not self._before:
            widths = {"key_": site.heads * site.head_dim, "value_": site.heads * site.value_dim}
        return [(name, groups, width // groups) for name, width in widths.items()]

    def build(self, site: SiteShape) -> None:
        o = self.options
        cells = o.r**2 if o.reduction == "conv" else 1
        for name, groups, channels in self._maps(site):
            if o.reduction != "pool":
                start = torch.eye(channels).repeat(groups, cells, 1)
                self.register_parameter(f"{name}reduction", nn.Parameter(start))
            if self._norms:
                shape = groups, channels
                self.register_parameter(f"{name}norm_weight", nn.Parameter(torch.ones(shape)))
                self.register_parameter(f"{name}norm_bias", nn.Parameter(torch.zeros(shape)))

    def _windows(self, layout: TokenLayout) -> tuple[int, int]:
        """Rows and columns of windows, so of reduced entries."""
        height, width = layout.grid
        o = self.options
        if o.reduction != "conv":
            return min(o.size, height), min(o.size, width)
        return -(-height // o.r), -(-width // o.r)

    def cost(self, site: SiteShape) -> Cost:
        o, layout, d, dv = self.options, site.layout, site.head_dim, site.value_dim
        rows, columns = self._windows(layout)
        reduced, special = rows * columns, layout.tokens - layout.patches
        flops = attend_flops(layout.tokens, reduced + special, d, dv)
        core = self._cost(site, flops, between=reduced * (d + dv))
        if self._before:  # reads the projections, and of the given keys and values the special ones
            width, made = site.width, site.heads * (d + dv)
            core += Cost(product_flops(reduced, width, made), (width - layout.patches) * made)
        if o.reduction == "pool":
            return core
        each = sum(groups * product_flops(1, n, n) for _, groups, n in self._maps(site))
        mapped, slots = reduced, reduced
        if o.reduction == "conv":
            mapped, slots = layout.patches, reduced * o.r**2
        return core + Cost(mapped * each, 0, (slots - mapped) * each)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Branch:
        heads = q.shape[1]
        (keys, own_keys), (values, own_values) = split(k, layout), split(v, layout)
        if self._before:
            x = split(extra["x"].to(q.dtype), layout)[0]
            keys, values = extra["project"](self._reduced(x, "", layout, heads))
        else:
            keys, values = (
                self._reduced(y.transpose(1, 2).flatten(2), name, layout, heads)
                .unflatten(2, (heads, -1))
                .transpose(1, 2)
                for y, name in ((keys, "key_"), (values, "value_"))
            )
        keys, values = torch.cat([own_keys, keys], dim=2), torch.cat([own_values, values], dim=2)
        # there may be N / r^2 entries: all scores at once would be too many on large grids
        return attend_all(q, keys, values, scale)

    def _reduced(self, x: Tensor, name: str, layout: TokenLayout, heads: int) -> Tensor:
        """SR of patches x [B, h w, C] by the parameters of that name: [B, windows, C]."""
        o, groups = self.options, self._groups(heads)
        rows = self._cells(x.unflatten(2, (groups, -1)).transpose(1, 2), layout)
        if o.reduction != "pool":
            weight = getattr(self, f"{name}reduction").to(x.dtype)
            # one group: a single product of all images' rows, not a batch of them
            rows = rows @ weight if groups > 1 else (rows[:, 0] @ weight[0])[:, None]
        if o.reduction == "conv":
            rows = rows / self._counts(layout, x)
        if self._norms:
            gain, bias = (getattr(self, f"{name}norm_{y}").to(x.dtype) for y in ("weight", "bias"))
            rows = F.layer_norm(rows, rows.shape[-1:]) * gain[:, None] + bias[:, None]
        if o.reduction == "pool-conv":
            rows = F.gelu(rows)
        return rows.transpose(1, 2).flatten(2)

    def _cells(self, patches: Tensor, layout: TokenLayout) -> Tensor:
        """What becomes an entry each, of patches [B, G, h w, D]: averages, or for `conv` all
        patches of a window beside each other, [B, G, windows, cells D].
        """
        o, windows = self.options, self._windows(layout)
        if o.reduction != "conv":
            return pool_tokens(patches, 0, layout.grid, windows)
        # a convolution whose stride is its kernel is a matrix product: exact in the working
        # precision also where convolutions are not
        r, (height, width), (rows, columns) = o.r, layout.grid, windows
        image = patches.unflatten(2, (height, width))
        image = F.pad(image, (0, 0, 0, columns * r - width, 0, rows * r - height))
        cells = image.unflatten(3, (columns, r)).unflatten(2, (rows, r))  # [B, G, a, r, b, r, D]
        return cells.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(2, 3)

    def _counts(self, layout: TokenLayout, like: Tensor) -> Tensor:
        """Patches in each window of `conv`, [windows, 1]."""
        down, across = (
            (side - self.options.r * torch.arange(count, device=like.device))
            .clamp(max=self.options.r)
            .to(like.dtype)
            for side, count in zip(layout.grid, self._windows(layout), strict=True)
        )
        return (down[:, None] * across).view(-1, 1)
