"""An inner model: one linear layer or two, trained on keys and values by steps of gradient descent,
then read by queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # of the LayerNorm, as in TTT's released code


@dataclass(frozen=True)
class Slopes:
    """What a step needs of its tokens, for each layer.

    Args:
        inputs: the layer's inputs, [B, H, N, ..].
        outward: the gradient of each token's own loss by the layer's outputs, [B, H, N, ..].
    """

    inputs: Sequence[Tensor]
    outward: Sequence[Tensor]


@dataclass(frozen=True)
class InnerModel:
    """g(x) = x W + b, or gelu(x W1 + b1) W2 + b2; f = g, or with a norm f(x) = x + LN(g(x)).

    Where f's outputs have another width than x, the x in x + LN loses its last channels or gets
    zeros.

    Args:
        weights: W, or W1 and W2, [.., H, inputs, outputs].
        biases: of each layer, [.., H, 1, outputs]; empty without.
        norm: factor and summand of the LayerNorm, [H, 1, Dv] each; None without.
        tanh: GELU by its tanh approximation.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor] = ()
    norm: tuple[Tensor, Tensor] | None = None
    tanh: bool = False

    def slopes(self, k: Tensor, v: Tensor, rates: Tensor) -> Slopes:
        """Those of the losses rates * |f(k) - v|^2 / 2, with one rate for each token, [B, H, N,
        1]; the gradients stay in autograd's graph.
        """
        inputs, hidden = [k], self._layer(k, 0)
        out = hidden
        if len(self.weights) > 1:
            inputs.append(self._gelu(hidden))
            out = self._layer(inputs[1], 1)
        if self.norm is None:
            slope = out - v
        else:
            gain, bias = self.norm
            centred = out - out.mean(dim=-1, keepdim=True)
            deviation = (centred.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
            unit = centred / deviation
            error = (_resized(k, v.shape[-1]) + unit * gain + bias - v) * gain
            along = unit * (error * unit).mean(dim=-1, keepdim=True)
            slope = (error - error.mean(dim=-1, keepdim=True) - along) / deviation
        slope = slope * rates
        if len(self.weights) == 1:
            return Slopes(inputs, [slope])
        inner = (slope @ self.weights[1].transpose(-1, -2)) * self._gelu_slope(hidden)
        return Slopes(inputs, [inner, slope])

    def stepped(self, step: Slopes, share: Tensor) -> InnerModel:
        """The model after a step down `share` times the sum of the gradients."""
        pairs = list(zip(step.inputs, step.outward, strict=True))
        weights = [
            weight - share * (x.transpose(-1, -2) @ slope)
            for weight, (x, slope) in zip(self.weights, pairs, strict=True)
        ]
        biases = [
            bias - share * slope.sum(dim=-2, keepdim=True)
            for bias, slope in zip(self.biases, step.outward, strict=False)
        ]
        return InnerModel(weights, biases, self.norm, self.tanh)

    def read(self, q: Tensor, own: Slopes | None = None, shares: Tensor | None = None) -> Tensor:
        """f(q); or with the slopes of the queries' own tokens, f(q_t) after a step of shares[t]
        times the gradients of the tokens up to t (the dual form: no weights for each t).
        """
        x = q
        for i in range(len(self.weights)):
            out = self._layer(x, i)
            if own is not None and shares is not None:
                seen = x @ own.inputs[i].transpose(-1, -2)
                seen = (seen + 1.0 if self.biases else seen).tril()  # a bias has the input 1
                out = out - (seen * shares[:, None]) @ own.outward[i]
            x = self._gelu(out) if i + 1 < len(self.weights) else out
        if self.norm is None:
            return x
        gain, bias = self.norm
        return _resized(q, x.shape[-1]) + F.layer_norm(x, x.shape[-1:], eps=EPS) * gain + bias

    def _layer(self, x: Tensor, i: int) -> Tensor:
        out = x @ self.weights[i]
        return out + self.biases[i] if self.biases else out

    def _gelu(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh" if self.tanh else "none")

    def _gelu_slope(self, x: Tensor) -> Tensor:
        if not self.tanh:
            density = (x.square() * -0.5).exp() / math.sqrt(2.0 * math.pi)
            return torch.special.ndtr(x) + x * density
        factor, cubic = math.sqrt(2.0 / math.pi), 0.044715
        x = x.clamp(-10.0, 10.0)  # flat beyond, where cubes may overflow
        squares = x.square()
        bend = (factor * x * (1.0 + cubic * squares)).tanh()
        inner = factor * (1.0 + 3.0 * cubic * squares)
        return 0.5 * (1.0 + bend) + 0.5 * x * (1.0 - bend.square()) * inner


def _resized(x: Tensor, width: int) -> Tensor:
    """The first `width` channels of x, zeros where it has fewer."""
    return F.pad(x, (0, width - x.shape[-1]))
