"""Write mitaswap/data/digits.parquet from scikit-learn's copy of the UCI handwritten digits.

    python tools/make_digits.py [OUT]

One row per image, in scikit-learn's order: `image` {bytes: PNG, 8 x 8 grey; path} and `label`, with
the class names in the Hugging Face metadata of the schema. The 17 grey levels 0 .. 16 become
round(level * 255 / 16), which keeps them apart, so that the levels can be had back. The same input
gives the same pixels; needs scikit-learn.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

SOURCE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin, C. Kaynak, "
    "UCI Machine Learning Repository, 1998"
)
LICENSE = "CC BY 4.0"
OUT = Path(__file__).parents[1] / "mitaswap" / "data" / "digits.parquet"


def main(out: Path) -> None:
    """Write the file."""
    digits = load_digits()
    rows = []
    for index, levels in enumerate(digits.images):
        buffer = io.BytesIO()
        Image.fromarray(np.rint(levels * 255 / 16).astype(np.uint8)).save(
            buffer, "PNG", optimize=True
        )
        rows.append({"bytes": buffer.getvalue(), "path": f"digit-{index:04d}.png"})
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": [str(name) for name in digits.target_names]},
    }
    info = {"info": {"features": features, "citation": SOURCE, "license": LICENSE}}
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ],
        metadata={"huggingface": json.dumps(info)},
    )
    table = pa.table({"image": rows, "label": digits.target}, schema=schema)
    pq.write_table(table, out, compression="zstd")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
