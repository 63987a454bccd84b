"""The embedded digits, and the scenes that are made of them."""

from __future__ import annotations

import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
from image_files import message
from PIL import Image

from mitaswap.data import SampleError, open_set
from mitaswap.errors import MitaswapError


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    runpy.run_path(str(Path(__file__).parents[1] / "tools" / "make_digits.py"))["main"](
        tmp_path / "digits.parquet"
    )
    made = open_set(str(tmp_path / "digits.parquet"))
    shipped = open_set(str(Path(__file__).parents[1] / "mitaswap" / "data" / "digits.parquet"))
    levels = datasets.load_digits()
    assert len(made) == len(shipped) == 1797
    for i, (image, label) in enumerate(shipped):
        assert image.tobytes() == made[i][0].tobytes()
        assert label == made[i][1] == levels.target[i]
        back = np.rint(np.asarray(image)[:, :, 0] / 255 * 16)
        assert (back == levels.images[i]).all()


def test_digits_splits_part_the_whole() -> None:
    train, test = (
        [(image.tobytes(), label) for image, label in open_set("digits(size=8)", split)]
        for split in ("train", "test")
    )
    assert (len(train), len(test)) == (1442, 355)
    assert not set(train) & set(test)
    share = np.bincount([label for _, label in test]) / np.bincount(
        [lab for _, lab in train + test]
    )
    assert (abs(share - 0.2) < 0.01).all()


def test_digits_are_upsampled() -> None:
    small, large = open_set("digits(size=8)")[5][0], open_set("digits")[5][0]
    assert (small.size, large.size) == ((8, 8), (16, 16))
    assert large.tobytes() == small.resize((16, 16), Image.Resampling.BILINEAR).tobytes()


def digits_in(scene: Image.Image, side: int, pool: dict[bytes, int]) -> list[tuple[bytes, int]]:
    """The source images and classes in a noiseless scene, found by looking for each of them."""
    pixels = np.asarray(scene)[:, :, 0]
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (side, side)).reshape(
        -1, side * side
    )
    hits = {w.tobytes() for w in windows}
    return [(image, label) for image, label in pool.items() if image in hits]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("options", ["digits=4", "digits=7,canvas=40", "digits=9,canvas=24"])
def test_exactly_one_class_occurs_twice(split: str, options: str) -> None:
    pools = {
        part: {
            np.asarray(image)[:, :, 0].tobytes(): label
            for image, label in open_set("digits(size=8)", part)
        }
        for part in ("train", "test")
    }
    count = int(options[7])
    scenes = open_set(f"digit-scenes(size=8,{options},count=40)", split)
    other = "test" if split == "train" else "train"
    for scene, label in scenes:
        found = digits_in(scene, 8, pools[split])
        classes = [c for _, c in found]
        assert len(found) == count  # all are there whole, so none covers another
        assert classes.count(label) == 2  # two different source images
        assert len(set(classes)) == count - 1
        assert not digits_in(scene, 8, pools[other])


def test_scene_labels_are_uniform() -> None:
    labels = [label for _, label in open_set("digit-scenes(size=8,count=2000)")]
    counts = np.bincount(labels, minlength=10)
    # chi squared with 9 degrees of freedom, 99.9% quantile
    assert ((counts - 200) ** 2 / 200).sum() < 27.9


def test_scenes_do_not_depend_on_each_other_but_on_the_seed() -> None:
    long, short = (
        open_set("digit-scenes(size=8,count=1000)"),
        open_set("digit-scenes(size=8,count=10)"),
    )
    assert all(long[i][0].tobytes() == short[i][0].tobytes() for i in (9, 3, 0))
    scenes = {long[i][0].tobytes() for i in range(100)}
    assert len(scenes) == 100
    for changed in (
        open_set("digit-scenes(size=8)", seed=1),
        open_set("digit-scenes(size=8)", "train"),
    ):
        assert not {changed[i][0].tobytes() for i in range(100)} & scenes
    assert (
        open_set("digit-scenes(size=8,seed=1)")[0][0].tobytes()
        == open_set("digit-scenes(size=8)", seed=1)[0][0].tobytes()
    )


def test_scene_of_a_fixed_seed_stays_the_same() -> None:
    """Weights were trained on these scenes: they must not change with a version of numpy."""
    scenes = open_set("digit-scenes(size=8,count=8)", "train")
    assert [label for _, label in scenes] == LABELS
    assert [int(np.asarray(image)[:, :, 0].sum()) for image, _ in scenes] == SUMS


LABELS = [0, 3, 8, 2, 8, 9, 7, 7]
SUMS = [21025, 20402, 21721, 20557, 21514, 19192, 19590, 19557]


def test_scene_options() -> None:
    plain = open_set("digit-scenes(canvas=48,size=12)")[0][0]
    noisy = open_set("digit-scenes(canvas=48,size=12,noise=0.1)")[0][0]
    assert plain.size == noisy.size == (48, 48)
    assert plain.tobytes() != noisy.tobytes()
    assert (len(open_set("digit-scenes")), len(open_set("digit-scenes", "train"))) == (4000, 100000)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("digits=2", "digits=2 is out of range; it must be 3 .. 11"),
        ("digits=12", "digits=12 is out of range; it must be 3 .. 11"),
        ("size=8,digits=5,canvas=16", "5 digits of 8 x 8 pixels do not fit"),
        ("size=8,digits=5,canvas=16", "Use a canvas of at least 24."),
        ("count=0", "count=0 is out of range"),
        ("noise=2", "noise=2.0 is out of range; it must be 0.0 .. 1.0"),
        ("size=0", "size=0 is out of range"),
        ("seed=-1", "seed=-1 is out of range"),
    ],
)
def test_scene_options_out_of_range(options: str, text: str) -> None:
    assert text in message(f"digit-scenes({options})")


def test_sample_errors_are_mitaswap_errors() -> None:
    assert issubclass(SampleError, MitaswapError)
    assert str(pickle.loads(pickle.dumps(SampleError("row 1")))) == "row 1"
