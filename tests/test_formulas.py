"""Every mechanism against a slow transcription of its formula, outputs and gradients, in fp64.

The transcriptions were written from the papers before the mechanisms were read: one batch element,
one head and one query at a time, in plain loops, with no code of mitaswap. Autograd through the
loops gives the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mitaswap import TokenLayout, mechanism

# ----------------------------------------------------------------------------------- transcriptions

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
Formula = Callable[[Tensor, Tensor, Tensor, float, TokenLayout], Tensor]


def read(query: Tensor, keys: Tensor, values: Tensor, factors: list[float]) -> Tensor:
    """One query's softmax over pairs [K, D], each pair with its own factor on the logit."""
    logits = (keys * query).sum(1) * torch.tensor(factors, dtype=query.dtype)
    weights = torch.exp(logits - logits.detach().max())
    return (weights[:, None] * values).sum(0) / weights.sum()


def windows(tokens: Tensor, first: int, grid: tuple[int, int], pool: tuple[int, int]) -> Tensor:
    """Means over a x b adaptive windows of the h x w raster at token `first`: [a * b, D]."""
    (h, w), (a, b) = grid, pool
    means = []
    for i in range(a):
        for j in range(b):
            rows = range(math.floor(i * h / a), math.ceil((i + 1) * h / a))
            columns = range(math.floor(j * w / b), math.ceil((j + 1) * w / b))
            cells = [tokens[first + r * w + c] for r in rows for c in columns]
            means.append(torch.stack(cells).sum(0) / len(cells))
    return torch.stack(means)


def largest(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` largest scores; of equal ones the lowest index."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def each_head(head: Head, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A transcription of one head, applied to every batch element and head of [B, H, N, D]."""
    batches = []
    for b in range(q.shape[0]):
        batches.append(torch.stack([head(q[b, h], k[b, h], v[b, h]) for h in range(q.shape[1])]))
    return torch.stack(batches)


def standard() -> Formula:
    """softmax(Q K^T scale) V."""

    def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: TokenLayout) -> Tensor:
        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.stack([read(row, k, v, [scale] * len(k)) for row in q])

        return each_head(head, q, k, v)

    return formula


def agent(pool: tuple[int, int]) -> Formula:
    """softmax(Q A^T scale) softmax(A K^T scale) V, agents A pooled from the patch queries."""

    def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: TokenLayout) -> Tensor:
        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            agents = windows(q, layout.prefix, layout.grid, pool)
            gathered = torch.stack([read(row, k, v, [scale] * len(k)) for row in agents])
            return torch.stack([read(row, agents, gathered, [scale] * len(agents)) for row in q])

        return each_head(head, q, k, v)

    return formula


def mita(
    pool: tuple[int, int],
    width: int,
    routed: int = 1,
    shared: bool = True,
    landmark_twice: bool = False,
    from_first_token: bool = False,
    count_twice: bool = True,
) -> Formula:
    """Eq. 5 to 12.

    Args:
        pool: a x b windows, so m = a * b landmarks.
        width: k, keys per routed expert.
        routed: s, routed experts per query; 0 leaves them out (compress-only).
        shared: whether the shared expert takes part (False: route-only).
        landmark_twice: the released code's shared logits, scaled once more.
        from_first_token: the released code's windows over the first h * w tokens.
        count_twice: False drops a key that another chosen expert has brought already: not the
            paper, a control.
    """

    def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: TokenLayout) -> Tensor:
        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            marks = windows(q, 0 if from_first_token else layout.prefix, layout.grid, pool)
            held = [largest((k * mark).detach().sum(1) * scale, width) for mark in marks]
            compressed = torch.stack([read(mark, k, v, [scale] * len(k)) for mark in marks])
            rows = []
            for row in q:
                keys, values, factors = [], [], []
                if shared:
                    keys, values = list(marks), list(compressed)
                    factors = [scale * scale if landmark_twice else scale] * len(marks)
                seen: set[int] = set()
                for expert in largest((marks * row).detach().sum(1), routed):
                    for j in held[expert]:
                        if count_twice or j not in seen:
                            keys.append(k[j])
                            values.append(v[j])
                            factors.append(scale)
                        seen.add(j)
                rows.append(read(row, torch.stack(keys), torch.stack(values), factors))
            return torch.stack(rows)

        return each_head(head, q, k, v)

    return formula


def elu_plus_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, torch.exp(torch.minimum(x, torch.zeros_like(x))))


def positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def over_width(x: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm without gain over the full width: all heads' features of one token together."""
    batches = []
    for element in x:
        tokens = []
        for n in range(x.shape[2]):
            token = element[:, n]  # [H, D], the whole width
            tokens.append(token / torch.sqrt((token * token).sum() / token.numel() + eps))
        batches.append(torch.stack(tokens, dim=1))
    return torch.stack(batches)


def linear(feature: Callable[[Tensor], Tensor], norm: bool = False, eps: float = 1e-6) -> Formula:
    """Katharopoulos et al.: sum_j (phi(q) . phi(k_j)) v_j / (sum_j phi(q) . phi(k_j) + eps)."""

    def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: TokenLayout) -> Tensor:
        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = []
            for row in q:
                weights = (feature(k) * feature(row)).sum(1)
                rows.append((weights[:, None] * v).sum(0) / (weights.sum() + eps))
            return torch.stack(rows)

        q = q * (scale * math.sqrt(q.shape[3]))
        if norm:
            q, k = over_width(q), over_width(k)
        return each_head(head, q, k, v)

    return formula


def efficient() -> Formula:
    """Shen et al.: softmax of each query over its features, of each key feature over the tokens."""

    def formula(q: Tensor, k: Tensor, v: Tensor, scale: float, layout: TokenLayout) -> Tensor:
        def head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mass = torch.exp(k)
            mass = mass / mass.sum(0)
            rows = []
            for row in q:
                features = torch.exp(row) / torch.exp(row).sum()
                rows.append(((mass * features).sum(1)[:, None] * v).sum(0))
            return torch.stack(rows)

        return each_head(head, q * (scale * math.sqrt(q.shape[3])), k, v)

    return formula


# -------------------------------------------------------------------------------------------- cases


PLAIN = TokenLayout(1, (3, 5))
BARE = TokenLayout(0, (3, 5))
TAIL = TokenLayout(0, (4, 7), suffix=2)
DEEP = TokenLayout(5, (3, 5))
BOTH = TokenLayout(1, (4, 7), suffix=2)


@dataclass(frozen=True)
class Case:
    """A mechanism, its transcription, and where they are compared."""

    spec: str
    formula: Formula
    layout: TokenLayout = PLAIN
    dim: int = 8
    scale: float | None = None
    inputs: str = "random"

    def __str__(self) -> str:
        scale = "" if self.scale is None else f" scale={self.scale}"
        return f"{self.spec} on {self.layout} D={self.dim}{scale} {self.inputs}".strip()


CASES = [
    Case("standard", standard()),
    Case("standard", standard(), BOTH, 24, scale=0.3),
    Case("linear", linear(elu_plus_one)),
    Case("linear", linear(elu_plus_one), TAIL, 24, scale=0.31),
    Case("linear(eps=0.5)", linear(elu_plus_one, eps=0.5), BARE),
    Case("linear(feature=relu)", linear(positive), DEEP, 24),
    Case("linear(feature=relu)", linear(positive), BARE, scale=0.9),
    Case("linear(feature=softmax)", efficient(), BOTH, 8),
    Case("linear(feature=softmax)", efficient(), BARE, 24, scale=0.41),
    Case("linear(feature=relu,norm=rms)", linear(positive, norm=True), BOTH),
    Case("linear(norm=rms)", linear(elu_plus_one, norm=True), DEEP, 72, scale=0.2),
    Case("agent(n=1)", agent((1, 1))),
    Case("agent(n=15)", agent((3, 5)), DEEP),
    Case("agent(n=6)", agent((2, 3)), BOTH, 24, scale=0.25),
    Case("agent(n=8,pool=2x4)", agent((2, 4)), TAIL, 72),
    Case("agent(n=8,pool=4x2)", agent((4, 2)), TAIL),
    Case("agent(n=6,pool=2x3)", agent((2, 3)), BARE, 8, 0.25, "constant"),
    Case("mita(m=6,k=5)", mita((2, 3), 5)),
    Case("mita(m=6,k=5)", mita((2, 3), 5), TAIL, 24),
    Case("mita(m=6,k=4)", mita((2, 3), 4), DEEP, 72),
    Case("mita(m=6,k=7)", mita((2, 3), 7), BARE, scale=0.7),
    Case("mita(m=15,k=1)", mita((3, 5), 1), TokenLayout(1, (3, 5), 2)),
    Case("mita(m=1,k=3)", mita((1, 1), 3)),
    Case("mita(m=6,k=16)", mita((2, 3), 16)),
    Case("mita(m=6,k=5,s=2)", mita((2, 3), 5, 2), BOTH),
    Case("mita(m=6,k=12,s=3)", mita((2, 3), 12, 3)),
    Case("mita(m=4,k=5,s=4)", mita((2, 2), 5, 4), DEEP),
    Case("mita(m=8,k=6,pool=2x4)", mita((2, 4), 6), TAIL),
    Case("mita(m=8,k=6,pool=4x2)", mita((4, 2), 6), TAIL),
    Case("mita(m=6,k=5,variant=route-only)", mita((2, 3), 5, shared=False), BOTH),
    Case("mita(m=6,k=5,s=3,variant=route-only)", mita((2, 3), 5, 3, shared=False), DEEP),
    Case("mita(m=6,k=5,variant=compress-only)", mita((2, 3), 5, 0), BOTH, scale=0.5),
    Case("mita(m=6,k=5,shared_scale=released)", mita((2, 3), 5, landmark_twice=True), TAIL),
    Case(
        "mita(m=6,k=5,s=2,shared_scale=released)",
        mita((2, 3), 5, 2, landmark_twice=True),
        scale=0.6,
    ),
    Case("mita(m=6,k=5,landmark_tokens=released)", mita((2, 3), 5, from_first_token=True), DEEP),
    Case(
        "mita(m=6,k=5,shared_scale=released,landmark_tokens=released)",
        mita((2, 3), 5, landmark_twice=True, from_first_token=True),
        BOTH,
    ),
    Case("mita(m=6,k=5)", mita((2, 3), 5), TAIL, 8, 0.25, "constant"),
    Case("mita(m=6,k=5,s=3)", mita((2, 3), 5, 3), BOTH, 8, 0.25, "constant"),
    Case("mita(m=6,k=5)", mita((2, 3), 5), BOTH, 8, None, "crowd"),
    Case("mita(m=6,k=5,s=2)", mita((2, 3), 5, 2), DEEP, 8, None, "crowd"),
]


def draw(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a case, leaves that require gradients.

    constant: all queries and all keys are equal, so every score ties (dyadic numbers: their sums
        are exact in any order).
    crowd: all queries point one way, those of the first window most, so that every query chooses
        expert 0.
    """
    torch.manual_seed(len(str(case)))
    shape = (2, 3, case.layout.tokens, case.dim)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    if case.inputs == "constant":
        q, k = torch.full_like(q, 0.5), torch.full_like(k, 0.5)
    elif case.inputs == "crowd":
        strength = torch.full(shape[2:3], 0.1, dtype=torch.float64)
        strength[case.layout.prefix] = 3.0
        q = q[:, :, :1] * strength[:, None]
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def value_and_gradients(out: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients of one fixed random functional of it."""
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    grads = torch.autograd.grad((out * probe).sum(), leaves, allow_unused=True)
    return [out.detach()] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
    ]


def both(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the mechanism, and of the transcription."""
    leaves = draw(case)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    got = mechanism(case.spec)(*leaves, layout=case.layout, scale=case.scale)
    want = case.formula(*leaves, scale, case.layout)
    return value_and_gradients(got, leaves), value_and_gradients(want, leaves)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mechanism_is_its_formula(case: Case) -> None:
    for name, got, want in zip(("output", "dq", "dk", "dv"), *both(case), strict=True):
        # 1e-10 of the largest entry: entries near zero are sums that cancel
        room = 1e-10 * max(float(want.abs().max()), 1e-3)
        assert (got - want).abs().max() <= room, name


@pytest.mark.parametrize("case", [c for c in CASES if c.inputs == "crowd"], ids=str)
def test_crowd_leaves_experts_empty(case: Case) -> None:
    """The premise of the crowd cases: every query's first choice is expert 0."""
    q, k, _ = draw(case)
    routing = mechanism(case.spec).route(q, k, layout=case.layout, scale=0.3)
    assert routing is not None
    assert (routing.choice[..., 0] == 0).all()


#: a mechanism beside a formula that differs from its own in one detail
NEAR_MISSES = {
    "another scale": Case(
        "standard", lambda q, k, v, scale, at: standard()(q, k, v, 1.01 * scale, at)
    ),
    "windows transposed": Case("mita(m=8,k=6,pool=2x4)", mita((4, 2), 6), TAIL),
    "one key fewer": Case("mita(m=6,k=5)", mita((2, 3), 4)),
    "one expert more": Case("mita(m=6,k=5)", mita((2, 3), 5, 2)),
    "landmarks scaled twice": Case("mita(m=6,k=5)", mita((2, 3), 5, landmark_twice=True)),
    "landmarks with class token": Case("mita(m=6,k=5)", mita((2, 3), 5, from_first_token=True)),
    "no shared expert": Case("mita(m=6,k=5)", mita((2, 3), 5, shared=False)),
    "no routed expert": Case("mita(m=6,k=5)", mita((2, 3), 5, 0)),
    "doubled key counted once": Case("mita(m=6,k=12,s=3)", mita((2, 3), 12, 3, count_twice=False)),
    "agents transposed": Case("agent(n=8,pool=2x4)", agent((4, 2)), TAIL),
    "another feature map": Case("linear", linear(positive)),
    "another eps": Case("linear(feature=relu)", linear(positive, eps=1e-3)),
    "no norm": Case("linear(norm=rms)", linear(elu_plus_one)),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_comparison_tells_near_misses_apart(miss: str) -> None:
    """Negative control: the tolerance above is far below the effect of any one detail."""
    got, want = both(NEAR_MISSES[miss])
    assert (got[0] - want[0]).abs().max() > 1e-6
