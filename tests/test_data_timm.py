"""timm's data sets by name: with random access, as streams, and what goes wrong."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import encoded, grey, message, structs, to_uint8, write
from PIL import Image

from mitaswap.data import decode, open_set
from mitaswap.errors import MitaswapError


def write_mnist(root: Path, labels: list[int]) -> None:
    """The raw files of MNIST's test split; image i has the grey value 10 i."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.repeat(np.arange(len(labels), dtype=np.uint8) * 10, 28 * 28)
    for part in ("t10k", "train"):
        head = np.array([2051, len(labels), 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = np.array([2049, len(labels)], dtype=">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(labels))


def test_torchvision_set_through_timm(tmp_path: Path) -> None:
    write_mnist(tmp_path, [3, 1, 4, 1, 5, 9])
    images = open_set(f"torch/mnist(root={tmp_path})", limit=6)
    assert (images.split, images.num_classes) == ("validation", 10)
    assert images.class_names is not None and images.class_names[1] == "1 - one"
    assert [label for _, label in images] == [3, 1, 4, 1, 5, 9]
    assert images[2][0].mode == "RGB" and grey(images[2][0]) == 20
    assert pickle.loads(pickle.dumps(images))[5][1] == 9
    assert len(decode(images, to_uint8, workers=1)) == 6


def test_fingerprint_has_name_and_number_but_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, labels in (("a", [3, 1]), ("b", [3, 1]), ("c", [3, 1, 4])):
        write_mnist(tmp_path / name, labels)
    monkeypatch.chdir(tmp_path)
    one, two, three, four = (
        open_set(f"torch/mnist(root={root})").fingerprint()
        for root in (tmp_path / "a", "a", "b", "c")
    )
    assert one == two == three != four
    assert open_set("torch/mnist(root=a)", limit=1).fingerprint() != one


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("torch/nothing", "timm cannot open torch/nothing, split validation: Unknown torchvision"),
        (
            "torch/mnist(root={tmp})",
            "Give its directory, torch/mnist(root=DIR), or fetch it with download=true.",
        ),
        ("torch/mnist(root={tmp}/no)", "There is no directory"),
        ("torch/mnist(root={tmp},colour=red)", "unexpected keyword argument 'colour'"),
        ("timm(dataset=mnist)", "'mnist' is no data set of timm; its names are PREFIX/NAME"),
        ("torch/", "'torch/' is no data set of timm"),
    ],
)
def test_timm_errors(tmp_path: Path, name: str, text: str) -> None:
    assert text in message(name.format(tmp=tmp_path))


def test_timm_reader_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs the package webdataset, which is not installed" in message("wds/x")


class Reader:
    """A reader such as timm's: (file, label) by index, or (image, label) one after the other."""

    def __init__(self, cells: list[bytes], stated: int | None = None) -> None:
        self.cells = cells
        self.stated = len(cells) if stated is None else stated
        self.class_to_idx = {"b": 1, "a": 0}

    def __len__(self) -> int:
        return self.stated

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        return io.BytesIO(self.cells[index]), index % 2

    def __iter__(self) -> Any:
        for index, cell in enumerate(self.cells):
            yield Image.open(io.BytesIO(cell)), index % 2


def fake(monkeypatch: pytest.MonkeyPatch, reader: Reader) -> None:
    """timm's own data set classes over a reader that needs neither network nor package."""
    from timm.data import ImageDataset, IterableImageDataset

    def create(name: str, **options: Any) -> Any:
        kind = ImageDataset if name.startswith("hfds/") else IterableImageDataset
        return kind(None, reader=reader)

    monkeypatch.setattr("timm.data.create_dataset", create)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)


def test_timms_substitution_of_broken_images_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, Reader([encoded(10), encoded(50)[:60], encoded(90)]))
    images: Any = open_set("hfds/x")
    assert images.class_names == ["a", "b"]
    assert grey(images._timm[1][0]) == 90  # what timm does: the neighbour, and a warning
    assert "image 1 of hfds/x cannot be decoded" in message("hfds/x")


def test_streams_are_decoded_but_not_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [10 * i for i in range(20)]
    fake(monkeypatch, Reader([encoded(value) for value in values]))
    images = open_set("wds/x")
    decoded = decode(images, to_uint8, workers=2)
    assert [grey(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in decoded.images] == values
    assert decoded.labels.tolist() == [0, 1] * 10
    with pytest.raises(MitaswapError, match=r"wds/x is a stream.* for training give a set with"):
        images[0]
    part = decode(open_set("wds/x", limit=4), to_uint8)
    assert len(part) == 4 and torch.equal(part.images[0], decoded.images[0])


@pytest.mark.parametrize(
    ("stated", "text"),
    [(4, "wds/x ended after 3 of 4 images"), (2, "holds more than the 2 images"), (0, "unknown")],
)
def test_streams_of_another_length(monkeypatch: pytest.MonkeyPatch, stated: int, text: str) -> None:
    fake(monkeypatch, Reader([encoded(10)] * 3, stated))
    with pytest.raises(MitaswapError, match=text):
        decode(open_set("wds/x"), to_uint8)


def test_hub_set_from_local_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    names = ["a", "b", "c"]
    write(tmp_path / "set" / "test.parquet", structs(10, 50, 90), [2, 0, 1], names=names)
    name = f"{tmp_path / 'set'}(root={tmp_path / 'cache'}"
    images = open_set(f"hfds/{name})")
    assert images.split == "test"  # there is no validation split
    assert images.class_names == names
    assert [(grey(image), label) for image, label in images] == [(10, 2), (50, 0), (90, 1)]
    assert "timm cannot open hfds/" in message(f"hfds/{name})", "train")
    assert 'Unknown split "train". Should be one of' in message(f"hfds/{name})", "train")

    stream = open_set(f"hfids/{name},num_classes=3,num_samples=3)")
    assert (stream.split, stream.random_access) == ("test", False)
    assert decode(stream, to_uint8).labels.tolist() == [2, 0, 1]
    assert "Here: hfids/" in message(f"hfids/{name})")
