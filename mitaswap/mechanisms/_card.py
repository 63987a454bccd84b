"""What is known of a mechanism before it runs: its place in the taxonomy, its needs, its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class Card:
    """A mechanism's place in the paper's five-dimensional taxonomy (Tab. 1), and where it comes
    from.

    Args:
        strategy: how the N-wide fast-weight MLP is scaled: by compression, by routing, or both.
        expert_type: what one expert is (a linear layer, an MLP, ...).
        expert_count: how many experts there are.
        construction: how experts are formed from keys and values.
        topology: which queries go to which experts.
        source: paper, year and equation.
        cost: order of the operations for N tokens, as a formula.
        untrained: what a model trained with softmax attention is after conversion, before any
            training: `usable` where a fresh module with its default options, or those suggested
            for 14 x 14 patches, is clearly nearer to softmax attention than the mean of the values
            is (a law of the test suite measures it), `needs finetuning` otherwise.
    """

    strategy: str
    expert_type: str
    expert_count: str
    construction: str
    topology: str
    source: str
    cost: str
    untrained: Literal["usable", "needs finetuning"]


@dataclass(frozen=True)
class SiteShape:
    """All that a mechanism may know of the place where it runs.

    Args:
        heads: number of heads H.
        head_dim: width D of one head's queries and keys.
        layout: token layout of the sequence.
        value_dim: width of one head's values; 0 (the default) means head_dim.
        width: channels C of the attention module's input x; 0 means heads * head_dim.
    """

    heads: int
    head_dim: int
    layout: TokenLayout
    value_dim: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)
        object.__setattr__(self, "width", self.width or self.heads * self.head_dim)


@dataclass(frozen=True)
class Cost:
    """What one forward of the attention core costs for one image, all heads together.

    Args:
        flops: floating-point operations of the matrix products and convolutions in the formula, a
            multiply-add counted as two (papers that say FLOPs mostly count it as one).
        moved: numbers that must pass between memory and chip however well it is implemented:
            inputs, output, learned parameters, and intermediates that all tokens contribute to
            before any token can use them.
        padding: FLOPs that the PyTorch reference spends on top, on slots of its blocks that stay
            empty. A counter of executed operations sees flops + padding.
        between: the intermediates among `moved`: where all of a head fits on the chip, they need
            not pass either.
    """

    flops: int
    moved: int
    padding: int = 0
    between: int = 0

    def bytes(self, itemsize: int = 2) -> int:
        """Bytes moved with numbers of `itemsize` bytes each (2: half precision)."""
        return self.moved * itemsize

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.moved + other.moved,
            self.padding + other.padding,
            self.between + other.between,
        )


@dataclass(frozen=True)
class Routing:
    """Who holds which keys and who asks whom: all that statistics see of a routed mechanism.

    Args:
        members: key positions that each expert holds, int64 [B, H, M, K]; -1 where an expert holds
            fewer than K.
        choice: experts that each query takes, best first, int64 [B, H, N, s]; -1 where a query
            takes fewer than s.
    """

    members: Tensor
    choice: Tensor


#: what a mechanism's formula is, as laws that the test suite holds it to: those it names must
#: hold, those it does not name must not
TRAITS: dict[str, str] = {
    "linear": "the output is linear in the values",
    "averages": "every query's weights sum to one: constant values come back",
    "convex": "and none is negative: no output leaves the range of the values",
    "scaled": "the factor of q k^T changes the output",
    "heads": "heads are independent, and a fresh module treats them alike",
    "key-set": "keys and values may be permuted together, all tokens alike",
    "pointwise": "permuted tokens give permuted outputs: no raster, no order",
    "special-set": "prefix and suffix tokens may change places",
    "mirror": "mirrored patches give mirrored outputs, on any grid",
    "routed-softmax": "the output is one softmax over the keys that `route` names",
    "every-pair": "looks at all N x N pairs, even if only to choose among them",
}
