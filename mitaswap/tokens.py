"""Where the patches sit in a token sequence: the only code that knows of class, distillation and
register tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from mitaswap.errors import MitaswapError


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of `prefix` special tokens, an h x w raster of patches, then `suffix` special
    tokens.

    The grid is always given, never derived from the number of tokens: 144 tokens are 12 x 12 as
        well as 8 x 18.

    Args:
        prefix: class, distillation and register tokens in front of the patches.
        grid: rows and columns of patches, (h, w), in raster order.
        suffix: special tokens behind the patches (YOLOS' detection tokens, ViT-5's registers).
    """

    prefix: int
    grid: tuple[int, int]
    suffix: int = 0

    def __post_init__(self) -> None:
        try:
            height, width = self.grid
        except (TypeError, ValueError):
            raise MitaswapError(
                f"grid must be (h, w), rows and columns of patches, got {self.grid!r}"
            ) from None
        if self.prefix < 0 or self.suffix < 0 or height < 1 or width < 1:
            raise MitaswapError(
                f"a token layout needs prefix, suffix >= 0 and a grid of at least 1 x 1, got {self}"
            )

    @property
    def patches(self) -> int:
        """Number of patch tokens, h * w."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Number of all tokens, prefix + h * w + suffix."""
        return self.prefix + self.patches + self.suffix

    @property
    def patch_slice(self) -> slice:
        """The slice of the token axis that holds the patches."""
        return slice(self.prefix, self.prefix + self.patches)

    def check(self, tokens: int, where: str = "the sequence") -> None:
        """Raise `MitaswapError` unless the layout describes exactly `tokens` tokens."""
        if tokens != self.tokens:
            raise MitaswapError(
                f"{where} has {tokens} tokens, but its layout is {self} = {self.tokens} tokens. "
                "Give the layout of this very sequence: TokenLayout(prefix=..., grid=(h, w), "
                "suffix=...)."
            )

    def __str__(self) -> str:
        tail = f" + {self.suffix}" if self.suffix else ""
        return f"{self.prefix} + {self.grid[0]}x{self.grid[1]}{tail}"
