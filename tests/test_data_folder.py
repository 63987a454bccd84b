"""Image files in class folders: splits, order of the classes, damaged files."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
from image_files import encoded, grey, message

from mitaswap.data import open_set
from mitaswap.errors import MitaswapError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, start in (("train", 20), ("val", 120)):
        for number, name in enumerate(("10", "2", "cat")):
            for i in range(2):
                path = tmp_path / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(start + 30 * number))
    return tmp_path


def test_folder_labels_are_sorted_like_timms(folder: Path) -> None:
    images = open_set(str(folder))
    assert (images.split, len(images), images.num_classes) == ("val", 6, 3)
    assert images.class_names == ["2", "10", "cat"]
    assert [(grey(image), label) for image, label in images] == [
        *[(150, 0)] * 2,
        *[(120, 1)] * 2,
        *[(180, 2)] * 2,
    ]
    assert pickle.loads(pickle.dumps(images))[0][1] == 0


@pytest.mark.parametrize(
    ("below", "split", "taken"),
    [
        ("", "train", "train"),
        ("", "training", "train"),
        ("", "validation", "val"),
        ("", "test", "val"),
        ("train", None, "train"),
        ("train", "train", "train"),
        ("val", "validation", "val"),
        ("val", None, "val"),
    ],
)
def test_folder_splits(folder: Path, below: str, split: str | None, taken: str) -> None:
    images = open_set(str(folder / below), split)
    assert images.split == taken
    assert (grey(images[0][0]) < 100) == (taken == "train")


def test_folder_never_gives_training_images_for_held_out_ones(folder: Path) -> None:
    assert "has no split 'val'. It has: train." in message(str(folder / "train"), "val")
    assert "has no split 'train'. It has: val." in message(str(folder / "val"), "train")
    assert "has no split 'extra'. It has: train, val." in message(str(folder), "extra")
    (folder / "val").rename(folder / "other")
    assert "no held-out split (validation, test). It has: train." in message(str(folder))


def test_folder_without_splits_is_one_whole(folder: Path) -> None:
    plain = (folder / "train").rename(folder / "plain")
    assert open_set(str(plain)).split == "all"
    assert "is not split, so its split 'train' is not defined" in message(str(plain), "train")


def test_a_class_may_be_called_train(folder: Path) -> None:
    plain = (folder / "train").rename(folder / "plain")
    (plain / "cat").rename(plain / "train")
    assert open_set(str(plain)).class_names == ["2", "10", "train"]


def test_folder_class_map_orders_the_classes(folder: Path) -> None:
    (folder / "map.txt").write_text("cat\n10\n2\n")
    images = open_set(f"{folder}(class_map={folder / 'map.txt'})")
    assert images.class_names == ["cat", "10", "2"]
    assert images[0][1] == 2


def test_folder_path_with_brackets_and_spaces(folder: Path) -> None:
    odd = folder / "my set (1)"
    (folder / "val").rename(odd)
    assert len(open_set(str(odd))) == 6


def test_empty_folder(tmp_path: Path) -> None:
    assert "is no directory of class folders: Found 0 images" in message(str(tmp_path))


@pytest.mark.parametrize(
    "ending", [".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".png", ".jpg", ".jpeg", ".JPEG"]
)
def test_no_kind_of_image_is_dropped(folder: Path, ending: str) -> None:
    from timm.data.readers.img_extensions import get_img_extensions

    before = get_img_extensions()
    for number, path in enumerate(sorted((folder / "val").rglob("*.png"))):
        if number % 2:
            path.with_suffix(ending).write_bytes(path.read_bytes())
            if ending != ".png":
                path.unlink()
    images = open_set(str(folder))
    assert len(images) == 6
    assert sorted(label for _, label in images) == [0, 0, 1, 1, 2, 2]
    assert get_img_extensions() == before  # what other users of timm get


@pytest.mark.parametrize("name", ["2.gif", "2.HEIC", "2.avif", "2.jfif"])
def test_an_image_that_is_not_read_is_refused(folder: Path, name: str) -> None:
    path = folder / "val" / "cat" / name
    path.write_bytes(encoded(100))
    says = message(str(folder))
    assert says.startswith(f"{str(path)!r} is an image of a kind that class folders are not read")
    assert ".webp" in says and "Convert it" in says
    assert len(open_set(str(folder), "train")) == 6  # the other split is not concerned


def test_files_that_are_no_images_are_passed_over(folder: Path) -> None:
    for name in ("Thumbs.db", "labels.txt", ".DS_Store", ".hidden.gif", "no-ending"):
        (folder / "val" / "cat" / name).write_bytes(b"?")
    assert len(list(open_set(str(folder)))) == 6


def test_a_folder_of_no_images_says_which_are_read(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    says = message(str(tmp_path))
    assert "Found 0 images" in says and ".webp" in says and says.count(".png") == 1


def test_image_without_a_class(folder: Path) -> None:
    (folder / "val" / "loose.png").write_bytes(encoded(1))
    assert "loose.png' lies beside the class folders" in message(str(folder))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0, 4, 20, 0.5, 0.9], ids=lambda kept: f"kept{kept}")
def test_truncated_images_are_errors_that_name_the_file(
    folder: Path, kind: str, kept: float
) -> None:
    path = folder / "val" / "2" / "1.png"
    data = encoded(100, kind, size=64)
    path.write_bytes(data)
    assert len(list(open_set(str(folder)))) == 6  # the control: whole, it can be read
    path.write_bytes(data[: int(len(data) * kept) if kept < 1 else int(kept)])
    assert f"the image {str(path)!r}" in message(str(folder))


def test_fingerprint_is_of_the_files_not_of_the_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_set(str(folder)).fingerprint()
    monkeypatch.chdir(folder)
    assert open_set(".").fingerprint() == open_set("val").fingerprint() == first
    assert open_set(".", "train").fingerprint() != first
    assert open_set(".", limit=5).fingerprint() != first
    shutil.copytree("val", "copy/val")  # with the times
    assert open_set("copy").fingerprint() == first
    path = Path("copy/val/2/1.png")
    os.utime(path, (1, 1))
    assert open_set("copy").fingerprint() != first
    images = open_set("copy")
    path.unlink()
    with pytest.raises(MitaswapError, match=r"1.png': No such file"):
        images.fingerprint()
    shutil.copy2("val/2/1.png", path)
    assert open_set("copy").fingerprint() == first
    path.rename("copy/val/cat/9.png")  # another label
    assert open_set("copy").fingerprint() != first
