"""What the seam costs: `standard` swapped in, against the untouched model, on the same batches."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import in_turn, paired_ratio, quantiles, write_rows
from torch import nn

import mitaswap
from mitaswap.benchmark.core import compile_alone


def timm_vit(size: str) -> nn.Module:
    import timm

    return timm.create_model(f"vit_{size}_patch16_224", pretrained=False)


def hf_vit(size: str) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    width, heads = {"tiny": (192, 3), "small": (384, 6)}[size]
    config = ViTConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        attn_implementation="sdpa",
    )
    return ViTForImageClassification(config)


def forward(model: Callable[..., Any], x: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def compiled(model: nn.Module, name: str) -> Callable[..., Any]:
    """Compiled code of its own: equal models would share theirs, and the third would be looked for
    behind it before each of its calls.
    """

    def call(x: torch.Tensor) -> Any:
        return model(x)

    return compile_alone(call, name, fullgraph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="also under torch.compile")
    parser.add_argument("--name", default="seam", help="stem of the rows' file")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    rows = []
    for library, build in {"timm": timm_vit, "transformers": hf_vit}.items():
        plain = build(args.size).eval().to(device, dtype)
        swapped = mitaswap.convert(copy.deepcopy(plain), "standard")
        again = copy.deepcopy(plain)  # what two equal models differ by: the error of the ratio
        for batch in args.batch:
            x = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
            for mode in ["eager", "compiled"] if args.compile else ["eager"]:
                models: dict[str, Callable[..., Any]]
                models = {"untouched": plain, "control": again, "swapped": swapped}
                if mode == "compiled":
                    torch.compiler.reset()
                    models = {k: compiled(m, k) for k, m in models.items()}  # type: ignore[arg-type]
                seconds = in_turn({k: forward(m, x) for k, m in models.items()}, args.rounds)
                for name, values in seconds.items():
                    rows.append(
                        {
                            "benchmark": "seam",
                            "library": library,
                            "model": f"vit_{args.size}_patch16_224",
                            "batch_size": batch,
                            "dtype": str(dtype).removeprefix("torch."),
                            "mode": mode,
                            "variant": name,
                            "rounds": args.rounds,
                            "ratio": paired_ratio(values, seconds["untouched"]),
                            **quantiles(values),
                        }
                    )
    table = Table(title="standard swapped in, against the untouched model")
    for column in ("library", "batch", "mode", "untouched ms", "swapped ms", "ratio", "control"):
        table.add_column(column)
    for untouched, control, changed in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        table.add_row(
            untouched["library"],
            str(untouched["batch_size"]),
            untouched["mode"],
            f"{untouched['ms_q50']:.2f}",
            f"{changed['ms_q50']:.2f}",
            f"{changed['ratio']:.3f}",
            f"{control['ratio']:.3f}",
        )
    Console().print(table, f"rows: {write_rows(args.name, rows)}")


if __name__ == "__main__":
    main()
