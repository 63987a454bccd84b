"""A small ViT-5 (Wang et al. 2026): RMS norms, normed q and k, 2-D RoPE on the patches, LayerScale,
registers behind the patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary(grid: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [h * w, dim]: half of the channels turn with the row, half with the
    column.
    """
    rate = 100.0 ** -(torch.arange(0, dim // 2, 2) / (dim // 2))
    row, column = torch.meshgrid(*(torch.arange(n).float() for n in grid), indexing="ij")
    angle = torch.cat([row.flatten()[:, None] * rate, column.flatten()[:, None] * rate], dim=1)
    angle = angle.repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], registers: int) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        patches = slice(1, tokens - registers)

        def place(y: Tensor) -> Tensor:  # the class token and the registers are nowhere
            turned = rotate(y[:, :, patches], *rope)
            return torch.cat([y[:, :, :1], turned, y[:, :, tokens - registers :]], dim=2)

        q, k = place(self.q_norm(q)), place(self.k_norm(k))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((width,), 0.5)) for _ in range(2))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], registers: int) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x), rope, registers)
        return x + self.gamma2 * self.mlp(self.norm2(x))


class ViT5(nn.Module):
    """Tokens: one class token, h x w patches, four registers at the tail."""

    def __init__(self, width: int = 48, heads: int = 3, depth: int = 2, classes: int = 5) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.registers = nn.Parameter(torch.randn(1, 4, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        rope = rotary(patches.shape[2:], self.blocks[0].attn.q_norm.normalized_shape[0])
        cls, registers = (t.expand(len(x), -1, -1) for t in (self.cls_token, self.registers))
        x = torch.cat([cls, patches.flatten(2).transpose(1, 2), registers], dim=1)
        for block in self.blocks:
            x = block(x, rope, registers.shape[1])
        return self.head(self.norm(x)[:, 0])
