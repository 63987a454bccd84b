"""TTT: a small inner model per head, trained on the image's keys and values while it is being read
(Sun et al. 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mitaswap.errors import MitaswapError
from mitaswap.mechanisms._base import MECHANISMS, Mechanism, Options
from mitaswap.mechanisms._card import Card, Cost, SiteShape
from mitaswap.operators.counting import product_flops
from mitaswap.operators.heads import norm_over_heads
from mitaswap.operators.inner import EPS, InnerModel
from mitaswap.operators.precision import outside_autocast, working
from mitaswap.operators.ranges import at_least, in_range
from mitaswap.operators.rotary import turned_in_sequence
from mitaswap.tokens import TokenLayout


@dataclass(frozen=True)
class TttOptions(Options):
    """Options of TTT layers. The paper's formula has none of the last five; the released code
    (test-time-training/ttt-lm-pytorch) always has them all.

    Args:
        inner: the inner model f_res. `linear`: x W (TTT-Linear); `mlp`: gelu(x W1) W2 (TTT-MLP).
        ratio: hidden width of the MLP over head_dim.
        batch: tokens per inner step, in the order of the sequence; 0 takes all tokens at once.
        order: `all` reads every query after the last inner step; `causal` is the paper's: a query
            sees the tokens up to its own. That is a language model's mask; a class token in front
            would see nothing, and no mechanism here has it by default.
        eta: inner learning rate; 0 is the paper's, 1 for `linear` and 0.1 for `mlp`.
        rate: `learned` multiplies eta by sigmoid(w x + b) for each token of the attention module's
            input x, as the paper does; `constant` does not, and needs no x.
        norm: f(x) = x + LN(f_res(x)), the paper's; false: f = f_res.
        step: `sum` adds the inner loss up over features and over the tokens of a step, as the paper
            prints it; `mean` takes half of its average over both, as the authors' code does, a step
            2 * batch * Dv times smaller.
        bias: biases of the inner model's layers, which the inner steps train like its weights.
        positions: learned factors of the inner step: what the tokens of a mini-batch up to its
            i-th teach counts max(0, 1 + offset_i) times (`step=mean`: 1 / i + offset_i).
        rope: rotary embedding of queries and keys by their position within the mini-batch.
        output_norm: LayerNorm of the output over the channels of all heads.
        gelu: of the MLP; `tanh` approximates it.
    """

    inner: Literal["linear", "mlp"] = "linear"
    ratio: int = 4
    batch: int = 16
    order: Literal["all", "causal"] = "all"
    eta: float = 0.0
    rate: Literal["learned", "constant"] = "learned"
    norm: bool = True
    step: Literal["sum", "mean"] = "sum"
    bias: bool = False
    positions: bool = False
    rope: bool = False
    output_norm: bool = False
    gelu: Literal["exact", "tanh"] = "exact"


@MECHANISMS.register("ttt")
class Ttt(Mechanism):
    """o(q) = f(q; W), where W comes from W0 by gradient steps on sum_t |f(k_t; W) - v_t|^2, one
    step for each mini-batch of tokens: N d^2.

    Gradients of the whole run through the inner steps. Special tokens are ordinary tokens, at their
    place in the sequence. Where values have another width than keys, the x in x + LN(f_res(x))
    loses its last channels or gets zeros.

    With `norm=false,batch=0` this is linear attention without a normaliser (the paper's Theorem 1).

    With `positions`, W_t = W - max(0, s_i + offset_i) (sum of the steps of the first i tokens of
    t's mini-batch), s_i = 1, or 1 / i with `step=mean`. With `order=all` no query is read in the
    middle of a mini-batch, so only the factors of last positions act, each on a whole step. `rope`
    turns channels (2j, 2j + 1) by (t mod batch) 10000^(-2j / D), also in the x of x + LN(f_res(x));
    of an odd D the last one stays.

    Parameters:
        weight: [H, D, Dv], W0 of the linear model; or
        weight1, weight2: [H, D, R], [H, R, Dv] with R = ratio * D, of the MLP. They start as
            N(0, 0.02^2), alike in all heads; zero for the linear model without norm.
        norm_weight, norm_bias: [H, Dv], of the LayerNorm; start one and zero.
        rate_weight, rate_bias: [H, C] and [H], of the learned rate; start zero.
        bias: [H, Dv], or bias1, bias2: [H, R], [H, Dv], with `bias`; start zero.
        offset: [batch], with `positions`, one for each position on any grid; starts zero.
        output_weight, output_bias: [H Dv], with `output_norm`; start one and zero.
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
    limits = (("ttt(positions=true)", "ttt"),)
    samples = (
        {},
        {"inner": "mlp", "ratio": 2, "batch": 20},
        {"order": "causal", "rate": "constant"},
        {"norm": False, "batch": 0, "rate": "constant"},
        {"inner": "mlp", "batch": 0, "eta": 0.01},
        {"bias": True, "batch": 0, "step": "mean"},
        {"order": "causal", "positions": True, "batch": 20},
        {"norm": False, "batch": 0, "rate": "constant", "rope": True},
        {"norm": False, "batch": 0, "output_norm": True},
        {
            "inner": "mlp", "ratio": 2, "order": "causal", "bias": True, "positions": True,
            "rope": True, "output_norm": True, "gelu": "tanh",
        },
    )  # fmt: skip
    rate_weight: nn.Parameter
    rate_bias: nn.Parameter
    offset: nn.Parameter
    output_weight: nn.Parameter
    output_bias: nn.Parameter

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"x"} if self.options.rate == "learned" else ())

    @property
    def traits(self) -> frozenset[str]:  # type: ignore[override]
        o, held = self.options, {"scaled", "heads"}
        if o.output_norm:
            held -= {"heads"} | ({"scaled"} if self._starts_at_zero and not o.bias else set())
        elif self._starts_at_zero:
            held |= {"linear"}
        if o.batch == 0 and not o.rope:
            held |= {"key-set", "pointwise", "special-set", "mirror"}
        return frozenset(held)

    @property
    def _starts_at_zero(self) -> bool:
        return self.options.inner == "linear" and not self.options.norm

    def check(self, layout: TokenLayout, head_dim: int) -> None:
        o = self.options
        most = max(layout.tokens, self._built(layout).tokens, 1024)
        in_range(self, "batch", o.batch, 0, most, "tokens at a time that can be of use")
        in_range(self, "ratio", o.ratio, 1, 64, "times head_dim that are allowed")
        at_least(self, "eta", o.eta, 0, most=100, limit="or inner steps overflow")
        if o.order == "causal" and o.batch == 0:
            raise MitaswapError(
                f"{self.spec}: order=causal compares all queries of a mini-batch with its keys, "
                f"N x N work with batch=0; use batch={TttOptions.batch}"
            )
        if o.positions and o.batch == 0:
            raise MitaswapError(
                f"{self.spec}: positions=true learns a factor for each position of a mini-batch; "
                f"with batch=0 their number would follow the image; use batch={TttOptions.batch}"
            )

    def build(self, site: SiteShape) -> None:
        o, heads = self.options, site.heads
        generator = torch.Generator().manual_seed(0)
        for end, shape in zip(self._ends, self._layers(site), strict=True):
            spread = 0.0 if self._starts_at_zero else 0.02
            start = (spread * torch.randn(shape, generator=generator)).repeat(heads, 1, 1)
            self.register_parameter(f"weight{end}", nn.Parameter(start))
            if o.bias:
                self.register_parameter(f"bias{end}", nn.Parameter(torch.zeros(heads, shape[1])))
        if o.norm:
            self.norm_weight = nn.Parameter(torch.ones(heads, site.value_dim))
            self.norm_bias = nn.Parameter(torch.zeros(heads, site.value_dim))
        if o.rate == "learned":
            self.rate_weight = nn.Parameter(torch.zeros(heads, site.width))
            self.rate_bias = nn.Parameter(torch.zeros(heads))
        if o.positions:
            self.offset = nn.Parameter(torch.zeros(o.batch))
        if o.output_norm:
            self.output_weight = nn.Parameter(torch.ones(heads * site.value_dim))
            self.output_bias = nn.Parameter(torch.zeros(heads * site.value_dim))

    @property
    def _ends(self) -> tuple[str, ...]:
        """What the names of the inner model's parameters end with, layer by layer."""
        return ("",) if self.options.inner == "linear" else ("1", "2")

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
        between = sum((a + int(o.bias)) * b for a, b in layers)
        return self._cost(site, flops, between)

    @outside_autocast
    def reference(
        self, q: Tensor, k: Tensor, v: Tensor, *, layout: TokenLayout, scale: float, **extra: Any
    ) -> Tensor:
        o, dtype, tokens = self.options, q.dtype, q.shape[2]
        q, k, v = working(q, k, v)
        q = q * (scale * math.sqrt(q.shape[-1]))
        size = o.batch or tokens
        if o.rope:
            place = torch.arange(tokens, device=q.device) % size
            q, k = turned_in_sequence(q, place), turned_in_sequence(k, place)
        rates, shares = self._rates(q, v.shape[-1], extra.get("x")), self._shares(size, q)
        model = self._model(q.dtype)
        out = []
        for start in range(0, tokens, size):
            at = slice(start, min(start + size, tokens))
            own = shares[: at.stop - start]
            step = model.slopes(k[:, :, at], v[:, :, at], rates[:, :, at])
            if o.order == "causal":
                out.append(model.read(q[:, :, at], step, own))
            model = model.stepped(step, own[-1])
        if o.order == "all":
            out.append(model.read(q))
        rows = torch.cat(out, dim=2)
        if o.output_norm:
            rows = norm_over_heads(rows, self.output_weight, self.output_bias, EPS)
        return rows.to(dtype)

    def _model(self, dtype: torch.dtype) -> InnerModel:
        """The inner model before its first step."""

        def part(name: str) -> Tensor:
            return self.get_parameter(name).to(dtype)

        o = self.options
        return InnerModel(
            [part(f"weight{end}") for end in self._ends],
            [part(f"bias{end}")[:, None] for end in self._ends] if o.bias else [],
            (part("norm_weight")[:, None], part("norm_bias")[:, None]) if o.norm else None,
            tanh=o.gelu == "tanh",
        )

    def _rates(self, q: Tensor, width: int, x: Tensor | None) -> Tensor:
        """Inner learning rate of each token's |f(k) - v|^2 / 2, `width` features, [B, H, N, 1]."""
        o = self.options
        eta = o.eta or (1.0 if o.inner == "linear" else 0.1)
        eta = eta / width if o.step == "mean" else eta * 2.0
        if x is None or o.rate == "constant":
            return torch.full_like(q[..., :1], eta)
        weight, bias = self.rate_weight.to(q.dtype), self.rate_bias.to(q.dtype)
        gate = F.linear(x.to(q.dtype), weight, bias).sigmoid()
        return eta * gate.transpose(1, 2)[..., None]

    def _shares(self, size: int, like: Tensor) -> Tensor:
        """Factor of the summed steps of the first 1, 2, .. tokens of a mini-batch, [size]."""
        count = torch.arange(1, size + 1, device=like.device, dtype=like.dtype)
        share = 1.0 / count if self.options.step == "mean" else torch.ones_like(count)
        if self.options.positions:
            share = (share + self.offset.to(like.dtype)).clamp(min=0.0)
        return share
