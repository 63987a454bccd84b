"""Rows as `mitaswap bench` writes them, for tests of figures and reports."""

from __future__ import annotations

from typing import Any


def speed_rows() -> list[dict[str, Any]]:
    """Three mechanisms in attention cores of three lengths, and in a model at two image sizes."""
    both = {"study": "bench", "device_name": "NVIDIA H100", "dtype": "float16", "status": "ok"}
    both |= {"direction": "forward", "mode": "eager", "batching": "4 images", "batch_size": 4}
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(("standard", "agent(n=49)", "mita(m=25,k=25)")):
        for tokens in (256, 1024, 4096):
            ms = tokens**2 / 1e6 if number == 0 else (1 + number) * tokens / 4e3
            times = {"ms_q20": 0.9 * ms, "ms_q50": ms, "ms_q80": 1.2 * ms, "rounds": 50}
            times |= {"ratio": tokens**2 / 1e6 / ms, "baseline": "standard", "peak_mib": 3.0}
            floors = {"bytes_floor_ms": tokens / 1e5, "flops_floor_ms": tokens / 1e6}
            core = {"bench": "core", "run_with": name, "tokens": tokens, "heads": 6, "prefix": 0}
            rows.append(
                {**both, **core, "grid": f"{tokens // 16}x16", "head_dim": 64, **times, **floors}
            )
        for size in (224, 512):
            rate = 1e8 / size**2 / (1 + number)
            model = {"bench": "model", "model": "deit_small_patch16_224", "img_size": size}
            times = {"infer_samples_per_sec": rate, "ms_q20": 1.0, "ms_q50": 2.0, "ms_q80": 3.0}
            times |= {"samples_per_sec_q20": 0.9 * rate, "samples_per_sec_q80": 1.1 * rate}
            where = {"pixels": size**2, "tokens": (size // 16) ** 2 + 1, "rounds": 50}
            rows.append({**both, **model, **where, "run_with": name, "ratio": 1.0, **times})
    return rows
