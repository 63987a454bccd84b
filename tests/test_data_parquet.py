"""Parquet files in the Hugging Face image layout."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from image_files import encoded, grey, message, structs, to_uint8, write

from mitaswap.data import decode, open_set
from mitaswap.errors import MitaswapError


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "labels"), ("img", "fine_label")])
@pytest.mark.parametrize("layout", ["struct", "bytes"])
def test_parquet_layouts(tmp_path: Path, columns: tuple[str, str], layout: str) -> None:
    values = [10, 50, 90, 130, 170, 210, 250]
    cells = structs(*values) if layout == "struct" else [encoded(value) for value in values]
    path = write(tmp_path / "x.parquet", cells, [0, 1, 2, 0, 1, 2, 0], columns=columns)
    images = open_set(str(path))
    assert (images.split, images.num_classes, images.class_names) == ("all", 3, None)
    read = [(grey(image), label) for image, label in images]
    assert read == list(zip(values, [0, 1, 2, 0, 1, 2, 0], strict=True))


def test_parquet_names_and_other_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.parquet", structs(10), [1], columns=("scan", "kind"), names=["a", "b", "c"]
    )
    images = open_set(f"{path}(image=scan,label=kind)")
    assert (images.num_classes, images.class_names) == (3, ["a", "b", "c"])
    assert images.name == f"{path}(image=scan,label=kind)"
    wrong = message(f"{path}(image=scan,label=kind,num_classes=4)")
    assert "names 3 classes, but num_classes=4 was given" in wrong


def test_parquet_number_of_classes_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", structs(10), [1])
    assert open_set(f"{path}(num_classes=7)").num_classes == 7


def test_parquet_files_that_images_point_to(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(80))
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    path = write(tmp_path / "x.parquet", cells, [0, 0])
    assert grey(open_set(str(path))[0][0]) == 80
    assert "row 1 of" in message(str(path)) and "'b.png'" in message(str(path))


@pytest.mark.parametrize(
    "names",
    [
        (
            "data/train-00000-of-00001.parquet",
            "data/test-0-of-2.parquet",
            "data/test-1-of-2.parquet",
        ),
        ("train/0.parquet", "test/0.parquet", "test/1.parquet"),
        ("plain/train.parquet", "plain/test-0.parquet", "plain/test-1.parquet"),
    ],
    ids=["hub", "directories", "config"],
)
def test_parquet_shards(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for number, name in enumerate(names):
        values = [10 + 60 * number + 10 * i for i in range(4)]
        write(tmp_path / name, structs(*values), [0, 1, 2, 3], names=["a", "b", "c", "d"])
    assert [grey(image) for image, _ in open_set(str(tmp_path), "train")] == [10, 20, 30, 40]
    held_out = open_set(str(tmp_path))
    assert (held_out.split, len(held_out)) == ("test", 8)
    assert [grey(image) for image, _ in held_out] == [70, 80, 90, 100, 130, 140, 150, 160]
    copy = pickle.loads(pickle.dumps(held_out))
    assert grey(copy[7][0]) == 160
    assert len(decode(held_out, to_uint8, workers=1)) == 8


def test_parquet_split_in_the_name_of_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "set-train.parquet", structs(10), [0])
    assert open_set(str(path)).split == open_set(str(path), "training").split == "train"
    assert "has no split 'test'. It has: train." in message(str(path), "test")


def test_parquet_unsplit_has_no_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", structs(10), [0])
    assert "is not split, so its split 'train' is not defined" in message(str(path), "train")


def test_parquet_large_sets_keep_a_part_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.parquet", structs(*range(0, 240, 10)), [0] * 24)
    monkeypatch.setattr("mitaswap.data.parquet._CACHE", 1500)
    images: Any = open_set(str(path))
    assert [grey(images[i][0]) for i in (23, 0, 12, 1, 23)] == [230, 0, 120, 10, 230]
    assert 1 <= len(images._cache) < 8  # of 8 row groups


@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.99], ids=lambda kept: f"kept{kept}")
def test_truncated_parquet(tmp_path: Path, kept: float) -> None:
    path = write(tmp_path / "x.parquet", structs(10, 20), [0, 1])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if kept < 1 else int(kept)])
    assert f"cannot read the parquet file {str(path)!r}" in message(str(path))


def test_damage_inside_a_parquet_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", structs(*range(0, 200, 10)), list(range(20)), group=20)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56  # the header of the first page of images; the footer is whole
    path.write_bytes(data)
    images = open_set(str(path))
    for workers in (0, 1):
        with pytest.raises(MitaswapError) as error:
            decode(images, to_uint8, workers)
        text = str(error.value)
        assert "cannot read row group 0" in text and str(path) in text and "\n" not in text


@pytest.mark.parametrize(
    ("cells", "labels", "text"),
    [
        ([], pa.array([], pa.int64()), "holds no images in split 'all'"),
        (structs(1, 2, 3, 4), [0, 1, 2, -1], "row 3 of {path} has the label -1"),
        (structs(1, 2, 3, 4), [0, 1, None, 2], "row 2 of {path} has no label"),
        (structs(1, 2), ["cat", "dog"], "holds string, but labels must be integers"),
        (structs(1, 2), [0.0, 1.0], "holds double, but labels must be integers"),
        ([*structs(1, 2, 3), None], [0] * 4, "row 3 of {path} has no image"),
        ([encoded(1), b""], [0, 0], "row 1 of {path} is empty (0 bytes)"),
        ([encoded(1), b"no image"], [0, 0], "row 1 of {path} cannot be decoded: not an image."),
        ([encoded(1), encoded(1)[:90]], [0, 0], "row 1 of {path} cannot be decoded"),
        ([1, 2], [0, 0], "row 0 of {path} holds int in the column 'image'"),
    ],
    ids=lambda value: value.replace("{path} ", "")[:40] if isinstance(value, str) else "",
)
def test_bad_parquet_rows(tmp_path: Path, cells: list[Any], labels: Any, text: str) -> None:
    path = write(tmp_path / "x.parquet", cells, labels)
    assert text.format(path=repr(str(path))) in message(str(path))


def test_parquet_label_beyond_the_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", structs(1, 2), [0, 2], names=["a", "b"])
    assert f"row 1 of {str(path)!r} has the label 2" in message(str(path))


def test_bad_rows_are_counted_within_their_shard(tmp_path: Path) -> None:
    write(tmp_path / "test-0.parquet", structs(*range(5)), [0] * 5)
    second = write(tmp_path / "test-1.parquet", [*structs(1, 2, 3, 4), None], [0] * 5)
    assert f"row 4 of {str(second)!r} has no image" in message(str(tmp_path))


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", structs(1), [0], columns=("scan", "kind"))
    text = message(str(path))
    assert "has no column 'image or img' of images. Its columns: scan, kind." in text
    assert "has no column 'lab' of labels" in message(f"{path}(image=scan,label=lab)")


def test_shards_of_different_sets_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "test-0.parquet", structs(1), [0], names=["a", "b"])
    write(tmp_path / "test-1.parquet", structs(1), [0], names=["c", "d"])
    assert "name different classes" in message(str(tmp_path))


def test_fingerprint_is_of_the_files_not_of_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.parquet", structs(10, 20, 30), [0, 1, 2])
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    first = open_set(str(path)).fingerprint()
    assert open_set("x.parquet").fingerprint() == open_set(".").fingerprint() == first
    assert open_set("x.parquet", limit=2).fingerprint() != first
    shutil.copy2(path, "sub/y.parquet")
    assert open_set("sub/y.parquet").fingerprint() == first
    # as large and as old, but the footer knows the range of the labels
    text, before = "x.parquet(num_classes=9)", os.stat(path)
    first = open_set(text).fingerprint()
    write(path, structs(10, 20, 30), [0, 1, 3])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert open_set(text).fingerprint() != first
    first = open_set("sub/y.parquet").fingerprint()
    os.utime("sub/y.parquet", (1, 1))
    assert open_set("sub/y.parquet").fingerprint() != first
    images = open_set("sub/y.parquet")
    os.unlink("sub/y.parquet")
    with pytest.raises(MitaswapError, match=r"y.parquet': No such file"):
        images.fingerprint()
