"""TTT: a small inner model per head, trained on the image's keys and values while it is being read
(Sun et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import product_flops
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import at_least
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class TttOptions(Options):
    """Options of TTT layers.

    Args:
        inner: the inner model f_res. `linear`: x W (TTT-Linear); `mlp`: gelu(x W1) W2 (TTT-MLP).
        ratio: hidden width of the MLP over head_dim.
        batch: tokens per inner step, in the order of the sequence; 0 takes all tokens at once.
        order: `all` reads every query after the last inner step, which suits images; `causal` is
            the paper's: a query sees the tokens up to its own.
        eta: inner learning rate; 0 is the paper's, 1 for `linear` and 0.1 for `mlp`.
        rate: `learned` multiplies eta by sigmoid(w x + b) for each token of the attention module's
            input x, as the paper does; `constant` does not, and needs no x.
        norm: f(x) = x + LN(f_res(x)), the paper's; false: f = f_res.
        step: `mean` averages the inner loss over features and over the tokens of a step, as the
            authors' code does; `sum` adds them up, as the paper prints it, and diverges easily.
    """

    inner: Literal["linear", "mlp"] = "linear"
    ratio: int = 4
    batch: int = 16
    order: Literal["all", "causal"] = "all"
    eta: float = 0.0
    rate: Literal["learned", "constant"] = "learned"
    norm: bool = True
    step: Literal["mean", "sum"] = "mean"


@MECHANISMS.register("ttt")
class Ttt(Mechanism):
    """o(q) = f(q; W), where W comes from W0 by gradient steps on sum_t |f(k_t; W) - v_t|^2, one
    step for each mini-batch of tokens: N d^2.

    Gradients of the whole run through the inner steps. Special tokens are ordinary tokens, at their
    place in the sequence. Where values have another width than keys, the x in x + LN(f_res(x))
    loses its last channels or gets zeros.

    With `norm=false,batch=0` this is linear attention without a normaliser (the paper's Theorem 1).
    What the released code has besides the paper's formula is left out: biases of the inner model,
    learned factors per position of a mini-batch, rotary embedding, the LayerNorm of the output.

    Parameters:
        weight: [H, D, Dv], W0 of the linear model; or
        weight1, weight2: [H, D, R], [H, R, Dv] with R = ratio * D, of the MLP. They start as
            N(0, 0.02^2), alike in all heads; zero for the linear model without norm.
        norm_weight, norm_bias: [H, Dv], of the LayerNorm; start one and zero.
        rate_weight, rate_bias: [H, C] and [H], of the learned rate; start zero.
    """

    options_type = TttOptions
    options: TttOptions
    card = Card(
        strategy="compression",
        expert_type="linear layer or MLP",
        expert_count="1 shared",
        construction="test-time training",
        topology="all-to-one",
        source="Sun et al. 2024, arXiv 2407.04620, Eq. 1-6",
        cost="N d^2",
        untrained="needs finetuning",
    )
    samples = (
        {},
        {"inner": "mlp", "ratio": 2, "batch": 20},
        {"order": "causal", "rate": "constant"},
        {"norm": False, "batch": 0, "rate": "constant"},
        {"inner": "mlp", "batch": 0, "step": "sum", "eta": 0.01},
    )
    norm_weight: nn.Parameter
    norm_bias: nn.Parameter
    rate_weight: nn.Parameter
    rate_bias: nn.Parameter

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"x"} if self.options.rate == "learned" else ())

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        held = {"scaled", "heads"} | ({"linear"} if self._starts_at_zero else set())
        if self.options.batch == 0:
            held |= {"key-set", "pointwise", "special-set", "mirror"}
        return frozenset(held)

    @property
    def _starts_at_zero(self) -> bool:
        return self.options.inner == "linear" and not self.options.norm

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o = self.options
        at_least(self, "batch", o.batch, 0)
        at_least(self, "ratio", o.ratio, 1)
        at_least(self, "eta", o.eta, 0)
        if o.order == "causal" and o.batch == 0:
            raise MitaswapError(
                f"{self.spec}: order=causal compares all queries of a mini-batch with its keys, "
                f"N x N work with batch=0; use batch={TttOptions.batch}"
            )

    def build(self, site: SiteShape) -> None:
        o, heads = self.options, site.heads
        generator = torch.Generator().manual_seed(0)
        for name, shape in zip(self._names, self._layers(site), strict=True):
            spread = 0.0 if self._starts_at_zero else 0.02
            start = (spread * torch.randn(shape, generator=generator)).repeat(heads, 1, 1)
            self.register_parameter(name, nn.Parameter(start))
        if o.norm:
            self.norm_weight = nn.Parameter(torch.ones(heads, site.value_dim))
            self.norm_bias = nn.Parameter(torch.zeros(heads, site.value_dim))
        if o.rate == "learned":
            self.rate_weight = nn.Parameter(torch.zeros(heads, site.width))
            self.rate_bias = nn.Parameter(torch.zeros(heads))

    @property
    def _eta(self) -> float:
        """Inner learning rate."""
        return self.options.eta or (1.0 if self.options.inner == "linear" else 0.1)

    @property
    def _names(self) -> tuple[str, ...]:
        return ("weight",) if self.options.inner == "linear" else ("weight1", "weight2")

    def _layers(self, site: SiteShape) -> list[tuple[int, int]]:
        if self.options.inner == "linear":
            return [(site.head_dim, site.value_dim)]
        hidden = self.options.ratio * site.head_dim
        return [(site.head_dim, hidden), (hidden, site.value_dim)]

    def cost(self, site: SiteShape) -> Cost:
        o, n, layers = self.options, site.layout.tokens, self._layers(site)
        # layers run on keys, have their gradient, and run on queries; the second passes it on
        flops = sum((3 + i) * product_flops(n, *shape) for i, shape in enumerate(layers))
        if o.rate == "learned":
            flops += product_flops(n, site.width, 1)
        if o.order == "causal":
            for size in (min(o.batch, n - start) for start in range(0, n, o.batch)):
                flops += sum(product_flops(size, size, sum(shape)) for shape in layers)
        return self._cost(site, flops, between=sum(a * b for a, b in layers))

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        o, dtype, tokens = self.options, q.dtype, q.shape[2]
        q, k, v = working(q, k, v)
        q = q * (scale * math.sqrt(q.shape[-1]))
        rates = self._rates(q, extra.get("x"))
        weights = [getattr(self, name).to(q.dtype) for name in self._names]
        size = o.batch or tokens
        out = []
        for start in range(0, tokens, size):
            rows = slice(start, min(start + size, tokens))
            inputs, slopes = self._slopes(k[:, :, rows], v[:, :, rows], weights)
            slopes = [slope * rates[:, :, rows] for slope in slopes]
            if o.order == "causal":
                out.append(self._read(q[:, :, rows], weights, zip(inputs, slopes, strict=True)))
            share = 1.0 / (rows.stop - start) if o.step == "mean" else 1.0
            weights = [
                weight - share * (x.transpose(-1, -2) @ slope)
                for weight, x, slope in zip(weights, inputs, slopes, strict=True)
            ]
        if o.order == "all":
            out.append(self._read(q, weights))
        return torch.cat(out, dim=2).to(dtype)

    def _rates(self, q: Tensor, x: Tensor | None) -> Tensor:
        """Inner learning rate of every token, [B, H, N, 1]."""
        if x is None or self.options.rate == "constant":
            return torch.full_like(q[..., :1], self._eta)
        weight, bias = self.rate_weight.to(q.dtype), self.rate_bias.to(q.dtype)
        gate = F.linear(x.to(q.dtype), weight, bias).sigmoid()
        return self._eta * gate.transpose(1, 2)[..., None]

    def _slopes(self, k: Tensor, v: Tensor, weights: list[Tensor]) -> tuple[list[Tensor], ...]:
        """For each layer its inputs, and the gradient of every token's loss by its outputs."""
        inputs, hidden = [k], k @ weights[0]
        out = hidden
        if len(weights) > 1:
            inputs.append(F.gelu(hidden))
            out = inputs[1] @ weights[1]
        if self.options.norm:
            gain, bias = (x.to(out.dtype)[:, None] for x in (self.norm_weight, self.norm_bias))
            centred = out - out.mean(dim=-1, keepdim=True)
            deviation = (centred.square().mean(dim=-1, keepdim=True) + _EPS).sqrt()
            unit = centred / deviation
            error = (_resized(k, v.shape[-1]) + unit * gain + bias - v) * gain
            along = unit * (error * unit).mean(dim=-1, keepdim=True)
            slope = (error - error.mean(dim=-1, keepdim=True) - along) / deviation
        else:
            slope = out - v
        slope = slope / v.shape[-1] if self.options.step == "mean" else slope * 2.0
        if len(weights) == 1:
            return inputs, [slope]
        below = torch.special.ndtr(hidden)
        density = (hidden.square() * -0.5).exp() / math.sqrt(2.0 * math.pi)
        inner = (slope @ weights[1].transpose(-1, -2)) * (below + hidden * density)
        return inputs, [inner, slope]

    def _read(
        self, q: Tensor, weights: list[Tensor], own: Iterable[tuple[Tensor, Tensor]] = ()
    ) -> Tensor:
        """f(q; W), or with each layer's inputs and slopes of the queries' own mini-batch, f(q_t;
        W_t): a query sees the steps of the tokens up to its own (the paper's dual form).
        """
        x = q
        for i, (weight, step) in enumerate(zip_longest(weights, own)):
            out = x @ weight
            if step is not None:
                inputs, slopes = step
                seen = (x @ inputs.transpose(-1, -2)).tril()
                if self.options.step == "mean":
                    count = torch.arange(1, q.shape[2] + 1, device=q.device, dtype=q.dtype)
                    seen = seen / count[:, None]
                out = out - seen @ slopes
            x = F.gelu(out) if i + 1 < len(weights) else out
        if not self.options.norm:
            return x
        gain, bias = (part.to(x.dtype)[:, None] for part in (self.norm_weight, self.norm_bias))
        unit = F.layer_norm(x, x.shape[-1:], eps=_EPS)
        return _resized(q, x.shape[-1]) + unit * gain + bias


_EPS = 1e-6  # of the LayerNorm, as in the released code


def _resized(x: Tensor, width: int) -> Tensor:
    """The first `width` channels of x, zeros where it has fewer."""
    return F.pad(x, (0, width - x.shape[-1]))
