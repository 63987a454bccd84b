"""The columns of a row that tells a speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Union

import numpy as np

from mitaswap.benchmark import CoreShape, Failure, Rates, Setting, Times, Verdict, floor
from mitaswap.mechanisms import mechanism
from mitaswap.results import Row
from mitaswap.spec import Spec

Measured = Union[Times, Failure]


def described(spec: Spec) -> Row:
    """A mechanism's columns: what it is, its options, its place in the taxonomy."""
    part = mechanism(spec)
    card = {entry.name: getattr(part.card, entry.name) for entry in fields(part.card)}
    options = {k: str(v) if isinstance(v, tuple) else v for k, v in part.settings.items()}
    return {"run_with": str(spec), "mechanism": part.family, **options, **card}


def checked(verdict: Verdict | None) -> Row:
    """The check that it passed, if it came so far."""
    if verdict is None:
        return {}
    return {
        "implementation": verdict.implementation,
        "gate_error": verdict.error,
        "gate_tolerance": verdict.tolerance,
        "gate_tokens": verdict.tokens,
    }


def measured(
    name: str, base: str, found: Mapping[str, Measured], batches: Mapping[str, int]
) -> Row:
    """Times and the ratio to the baseline's images/s, each taken within one round."""
    times, against = found[name], found.get(base)
    if isinstance(times, Failure):
        return {"status": times.status, "error": times.error}
    ratio = None
    if isinstance(against, Times):
        share = batches.get(name, 1) / batches.get(base, 1)
        ratio = float(np.median(against.ms / times.ms)) * share
    return {
        "status": "ok",
        **times.quantiles(),
        "rounds": len(times.ms),
        "baseline": base,
        "ratio": ratio,
        "peak_mib": None if times.peak is None else times.peak / 2**20,
    }


def rate(times: Measured, batch: int, setting: Setting) -> Row:
    """Images/s under timm's name, with its 20% and 80% quantiles."""
    if isinstance(times, Failure):
        return {}
    name = "train" if setting.backward else "infer"
    low, mid, high = (1e3 * batch / q for q in np.quantile(times.ms, [0.8, 0.5, 0.2]))
    return {
        f"{name}_samples_per_sec": mid,
        "samples_per_sec_q20": low,
        "samples_per_sec_q80": high,
    }


def roofline(spec: Spec, shape: CoreShape, rates: Rates, row: Row) -> Row:
    """The least time by traffic and by operations, and the share of it in the time of the row."""
    try:
        cost = mechanism(spec).cost(shape.site)
    except NotImplementedError:
        return {}
    moved, computed = floor(cost, shape.site, shape.batch, shape.dtype, rates, shape.backward)
    ms = row.get("ms_q50")
    return {
        "bytes_floor_ms": moved,
        "flops_floor_ms": computed,
        "floor_share": max(moved, computed) / ms if isinstance(ms, float) else None,
        "copy_gb_s": rates.copy / 1e9,
        "matmul_tflop_s": rates.matmul / 1e12,
    }
