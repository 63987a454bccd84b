"""Laws of every embedded data set; opening by name; limits; decoding once."""

from __future__ import annotations

import gc
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from mitaswap.data import SETS, ImageSet, SampleError, decode, open_set, same_classes
from mitaswap.data._base import spread
from mitaswap.errors import MitaswapError

EMBEDDED = [name for name, source in SETS.items() if source.embedded]


def to_uint8(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Grey(ImageSet):
    """Image i has the grey value i; number `broken` cannot be decoded; counts what it decodes."""

    name = "grey"

    def __init__(
        self, size: int = 100, broken: int = -1, wide: int = -1, label: object = 0
    ) -> None:
        self.broken, self.wide, self.label, self.decoded = broken, wide, label, [0] * size
        super().__init__("test", size, 2, ["a", "b"])

    def _sample(self, index: int) -> tuple[Image.Image, object]:
        if index == self.broken:
            raise SampleError(f"{self._where(index)} is broken: SOS.")
        self.decoded[index] += 1
        size = (5, 4) if index == self.wide else (4, 4)
        return Image.new("RGB", size, (index % 256,) * 3), self.label

    def _where(self, index: int | None) -> str:
        return "grey" if index is None else f"image {index} of grey"


# --- laws over the registry


def test_embedded_sets_are_there() -> None:
    assert {"digits", "digit-scenes"} <= set(EMBEDDED)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", EMBEDDED)
class TestLaws:
    def test_same_index_same_pixels(self, name: str, split: str) -> None:
        images = open_set(name, split, limit=20)
        again = open_set(name, split, limit=20)
        for i in reversed(range(20)):
            assert images[i][0].tobytes() == again[i][0].tobytes()
            assert images[i][1] == again[i][1]
        assert images[0][0].tobytes() != images[1][0].tobytes()

    def test_images_are_rgb_and_labels_in_range(self, name: str, split: str) -> None:
        images = open_set(name, split, limit=300)
        labels = [label for _, label in images.samples()]
        assert set(labels) == set(range(images.num_classes))
        assert all(type(label) is int for label in labels)
        assert images[0][0].mode == "RGB"
        assert images.class_names is not None and len(images.class_names) == images.num_classes

    def test_limit_takes_samples_of_the_whole(self, name: str, split: str) -> None:
        whole, part = open_set(name, split), open_set(name, split, limit=7)
        assert len(part) == 7
        for i, place in enumerate(spread(len(whole), 7).tolist()):
            assert part[i][0].tobytes() == whole[place][0].tobytes()
        assert len(open_set(name, split, limit=10**9)) == len(whole)

    def test_picklable(self, name: str, split: str) -> None:
        images = open_set(name, split, limit=9)
        images.sample(3)
        copy = pickle.loads(pickle.dumps(images))
        assert copy[3][0].tobytes() == images[3][0].tobytes()
        assert (len(copy), copy.name, copy.split) == (9, name, split)

    def test_transform_is_applied(self, name: str, split: str) -> None:
        images = open_set(name, split)
        plain = to_uint8(images[2][0])
        images.transform = to_uint8
        assert torch.equal(images[2][0], plain)

    def test_held_out_split_is_the_default(self, name: str, split: str) -> None:
        assert open_set(name).split == open_set(name, "validation").split == "test"

    def test_ends_like_a_sequence(self, name: str, split: str) -> None:
        images = open_set(name, split, limit=3)
        assert len(list(images)) == 3
        assert images[-1][1] == images[2][1]
        with pytest.raises(IndexError, match="3 images, no number 3"):
            images[3]

    def test_fingerprint_is_of_the_images(self, name: str, split: str) -> None:
        def of(text: str, split: str, limit: int | None = None) -> str:
            images = open_set(text, split, limit)
            images.sample(0)
            return images.fingerprint()

        same = {of(name, split), of(name, split, 10**9), of(f"{name}()", split)}
        other = {"train": "test", "test": "train"}[split]
        others = [
            of(name, other),
            of(name, split, 7),
            of(name, split, 8),
            of(f"{name}(size=9)", split),
        ]
        assert len(same) == 1 and len({*same, *others}) == 5
        assert len(next(iter(same))) == 16 and int(next(iter(same)), 16)


# --- fingerprints and classes


def test_fingerprint_of_generated_sets_has_the_seed() -> None:
    found = [open_set("digit-scenes(count=9)", seed=seed).fingerprint() for seed in (0, 1)]
    found += [open_set(f"digit-scenes(count=9,{o})").fingerprint() for o in ("seed=1", "noise=0.5")]
    assert found[1] == found[2] and len(set(found)) == 3


def test_fingerprint_of_a_set_that_says_nothing_is_its_name_and_number() -> None:
    images = Grey(5)
    assert images.fingerprint() == Grey(5, label=1).fingerprint()
    images.name = "other"
    assert len({images.fingerprint(), Grey(5).fingerprint(), Grey(6).fingerprint()}) == 3


@pytest.mark.parametrize(
    ("model", "data"),
    [(None, ["a"]), (["a"], None), (["a", "b"], ["a", "b"]), (["tabby", "dog"], ["dog", "cat"])],
)
def test_classes_that_may_be_the_same(model: list[str] | None, data: list[str] | None) -> None:
    same_classes(model, data)


def test_the_same_classes_in_another_order_are_an_error() -> None:
    with pytest.raises(MitaswapError, match=r"class 1 is 'b' for the model, but 'c' in the data"):
        same_classes(("a", "b", "c"), ["a", "c", "b"])


# --- limits


@pytest.mark.parametrize(("size", "count"), [(1, 1), (10, 10), (10, 3), (1797, 500), (10**6, 999)])
def test_spread_is_one_index_per_run(size: int, count: int) -> None:
    chosen = spread(size, count)
    assert len(chosen) == count == len(set(chosen.tolist()))
    for i, index in enumerate(chosen.tolist()):
        assert i * size // count <= index < (i + 1) * size // count


@pytest.mark.parametrize("layout", ["sorted", "periodic"])
def test_limit_keeps_classes_balanced(layout: str) -> None:
    labels = np.arange(5000) // 500 if layout == "sorted" else np.arange(5000) % 10
    counts = np.bincount(labels[spread(5000, 500)], minlength=10)
    assert counts.min() >= 45 and counts.max() <= 55


def test_limit_must_be_positive() -> None:
    with pytest.raises(MitaswapError, match="limit must be at least 1, got 0"):
        open_set("digits", limit=0)


# --- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "unknown data set 'digit'. Did you mean 'digits' or 'digit-scenes'?"),
        ("digits(sizes=8)", "unknown option of digits 'sizes'. Did you mean 'size'?"),
        ("digits(size=big)", "size='big' in 'digits(size=big)' must be of type int"),
        ("digits(size=true)", "must be of type int"),
        ("digits(size=0)", "size must be at least 1 pixel, got 0"),
        ("digit-scenes(count=1.5)", "must be of type int or none"),
        ("digit-scenes(task=once)", "'once'. Allowed: twice."),
        ("nowhere/images", "no file or directory 'nowhere/images'"),
        ("nowhere.parquet", "no file or directory 'nowhere.parquet'"),
        ("folder", "folder needs the option root: folder(root=...)"),
        ("folder(root=nowhere)", "no directory 'nowhere'"),
        ("parquet(root=nowhere)", "no file or directory 'nowhere'"),
    ],
)
def test_bad_names(name: str, message: str) -> None:
    with pytest.raises(MitaswapError) as error:
        open_set(name)
    assert message in str(error.value)


def test_unknown_split_lists_those_that_exist() -> None:
    with pytest.raises(MitaswapError, match=r"has no split 'extra'. It has: test, train"):
        open_set("digits", "extra")


def test_the_name_is_the_call_string() -> None:
    images = open_set("digit-scenes( digits=5, count=10 )")
    assert images.name == "digit-scenes(digits=5,count=10)"
    assert repr(images) == "<digit-scenes(digits=5,count=10) test: 10 images, 10 classes>"


# --- decoding


@pytest.mark.parametrize("workers", [0, 2])
def test_decode_gives_every_image_in_order(workers: int) -> None:
    seen: list[tuple[int, int]] = []
    decoded = decode(Grey(150), to_uint8, workers, lambda done, total: seen.append((done, total)))
    assert decoded.images.dtype == torch.uint8 and decoded.labels.dtype == torch.int64
    assert decoded.images.shape == (150, 3, 4, 4) and len(decoded) == 150
    assert torch.equal(decoded.images[:, 0, 0, 0], torch.arange(150, dtype=torch.uint8))
    assert seen == [(64, 150), (128, 150), (150, 150)]
    assert (decoded.num_classes, decoded.class_names, decoded.split) == (2, ["a", "b"], "test")


def test_decode_decodes_once_and_only_the_limit() -> None:
    images = Grey(100)
    images.limit(30)
    assert len(decode(images, to_uint8)) == 30
    assert sum(images.decoded) == 30 and max(images.decoded) == 1


def test_decode_ignores_the_transform() -> None:
    images = Grey(3)
    images.transform = lambda image: 1 / 0
    assert len(decode(images, to_uint8)) == 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Grey(70, broken=66), "image 66 of grey is broken: SOS."),
        (
            Grey(3, label=2),
            "image 0 of grey has the label 2, but the labels of 2 classes are 0 .. 1. "
            "Is this split labelled, and the label column the right one?",
        ),
        (
            Grey(70, wide=2),
            "the images of grey have different sizes after preprocessing, [3, 4, 4] and "
            "[3, 4, 5]. Prepare them to one size (resize and crop).",
        ),
    ],
    ids=["broken", "label", "size"],
)
def test_errors_are_one_message_also_from_workers(images: Grey, message: str, workers: int) -> None:
    with pytest.raises(MitaswapError) as error:
        decode(images, to_uint8, workers)
    assert str(error.value) == message


def test_a_size_that_changes_between_batches_is_an_error() -> None:
    images = Grey(65, wide=64)
    with pytest.raises(MitaswapError, match="different sizes"):
        decode(images, to_uint8)


def test_errors_are_one_message_from_any_loader() -> None:
    images = Grey(3, broken=1)
    images.transform = to_uint8
    with pytest.raises(MitaswapError) as error:
        list(DataLoader(images, num_workers=1))
    assert str(error.value) == "image 1 of grey is broken: SOS."
    gc.collect()  # torch's re-raise leaves a cycle; its workers end here, not in a later test


@pytest.mark.parametrize("label", [-1, 2, 0.5, "a", None], ids=repr)
def test_labels_outside_the_classes(label: object) -> None:
    with pytest.raises(SampleError, match=f"image 0 of grey has the label {label!r}"):
        Grey(1, label=label).sample(0)


def test_an_empty_set_is_an_error() -> None:
    with pytest.raises(MitaswapError, match="grey holds no images in split 'test'"):
        Grey(0)


def test_to_uint8_that_gives_floats_is_a_bug_not_a_request() -> None:
    with pytest.raises(TypeError, match=r"must give uint8 \[3, H, W\], got torch.float32"):
        decode(Grey(3), lambda image: to_uint8(image).float())


def test_large_arrays_are_mapped_and_leave_no_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    decoded = decode(Grey(100), to_uint8, cache_dir=cache, ram_limit=1000)
    plain = decode(Grey(100), to_uint8)
    assert cache.is_dir() and list(cache.iterdir()) == []
    assert torch.equal(decoded.images, plain.images)
    if os.path.exists("/proc/self/maps"):
        mapped = Path("/proc/self/maps").read_text()
        assert str(cache) in mapped  # it really is the file, not RAM
        del decoded
        assert str(cache) not in Path("/proc/self/maps").read_text()


def test_small_arrays_touch_no_disk(tmp_path: Path) -> None:
    decode(Grey(100), to_uint8, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_no_room_for_the_pixels(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MitaswapError, match=r"the pixels of 100 images need .* GiB in"):
        decode(Grey(100), to_uint8, cache_dir=tmp_path / "file", ram_limit=1)


def test_a_full_disk_is_an_error_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(MitaswapError, match=r"No space left on device.* Make room there"):
        decode(Grey(100), to_uint8, cache_dir=tmp_path, ram_limit=1)
    assert list(tmp_path.iterdir()) == []
