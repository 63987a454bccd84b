"""Small image and parquet files for the tests of data sets, and how to read them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from mitaswap.data import open_set
from mitaswap.errors import MitaswapError


def encoded(value: int, kind: str = "PNG", size: int = 8) -> bytes:
    """An image whose mean grey is `value`, noisy enough to have some bytes to cut off."""
    noise = np.random.default_rng(value).integers(-8, 8, (size, size, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(value + noise, 0, 255).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def to_uint8(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def grey(image: Image.Image) -> int:
    return round(float(np.asarray(image).mean()) / 10) * 10


def message(*args: Any, **kwargs: Any) -> str:
    """The error of opening and reading everything."""
    with pytest.raises(MitaswapError) as error:
        list(open_set(*args, **kwargs))
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, values: list[Any], labels: list[Any] | pa.Array, **options: Any) -> Path:
    """A parquet file in the Hugging Face layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, label = options.get("columns", ("image", "label"))
    table = pa.table({image: values, label: labels})
    if "names" in options:
        feature = {"names": options["names"], "_type": "ClassLabel"}
        features = {image: {"_type": "Image"}, label: feature}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=options.get("group", 3))
    return path


def structs(*values: int) -> list[dict[str, Any]]:
    return [{"bytes": encoded(value), "path": f"{value}.png"} for value in values]
