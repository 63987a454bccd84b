"""What convert, walk, train and finetune do at their edges: places, sizes, heads, help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import encoded
from safetensors.torch import load_file

from mitaswap.models import open_model

Command = Callable[..., Any]
FAST = ("--no-aug", "--epochs", 1, "-b", 6, "--warmup-epochs", 0, "-j", 0, "--device", "cpu")


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A folder of three classes, six images each for training and three for validation."""
    for split, count in (("train", 6), ("val", 3)):
        for label in range(3):
            for number in range(count):
                path = tmp_path / "colours" / split / f"class{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(40 + 70 * label + number))
    return tmp_path / "colours"


# --- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["convert", "finetune"])
def test_a_project_directory_keeps_its_files(
    cli: Command,
    timm_dir: Path,
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("mine")
    monkeypatch.chdir(project)
    given = {
        # refused before the model is opened: this one does not exist
        "convert": ("convert", "timm:no_such_model", "--to", "linear"),
        "finetune": ("finetune", timm_dir, "--data", colours, *FAST),
    }
    done = cli(*given[verb], "-o", ".")
    assert (done.code, done.out) == (2, "") and "README.md" in done.err
    assert [(path.name, path.read_text()) for path in project.iterdir()] == [("README.md", "mine")]


def test_a_run_writes_its_network_beside_its_state_and_convert_replaces_it_there(
    cli: Command, timm_dir: Path, colours: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base = ("finetune", timm_dir, "--data", colours, *FAST, "-o", out)
    for _ in range(2):  # the second is the same command again
        assert cli(*base).code == 0
    assert {"last.pt", "log.csv", "model.safetensors", "README.md"} <= {
        p.name for p in out.iterdir()
    }
    assert cli("convert", out, "--to", "linear", "-o", out).code == 0


# --- sizes ---------------------------------------------------------------------------------------


def test_walk_of_fixed_networks_at_another_size(
    cli: Command, tiny: str, timm_dir: Path, hf_dir: Path
) -> None:
    for model in (tiny, timm_dir):
        done = cli("walk", model, "--img-size", 24, 32)
        assert done.code == 0 and "193 = 1 + 12x16" in done.out, done.err
    done = cli("walk", hf_dir, "--img-size", 24, 32)
    assert done.code == 0 and "49 = 1 + 6x8" in done.out, done.err
    assert "2 of 2 sites can be swapped." in done.out
    done = cli("walk", "embedded:mita", "--img-size", 48, 32)
    assert done.code == 0 and "385 = 1 + 24x16" in done.out, done.err


def test_walk_at_an_impossible_size(cli: Command, tiny: str) -> None:
    done = cli("walk", tiny, "--img-size", 0, 32)
    assert (done.code, done.out) == (2, "")
    assert "0 x 32 is impossible: height and width must be at least 1 pixel" in done.err
    done = cli("walk", tiny, "--img-size", 1, 1)  # less than a patch
    assert done.code == 2 and "than actual input size. Fixed-size models" in done.err


# --- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_finetune_of_a_bare_file_onto_other_classes(
    request: pytest.FixtureRequest,
    cli: Command,
    tiny: str,
    colours: Path,
    tmp_path: Path,
    library: str,
) -> None:
    source = request.getfixturevalue(f"{library}_dir")
    state = load_file(source / "model.safetensors")
    torch.save(state, tmp_path / "weights.pth")
    arch = tiny if library == "timm" else f"hf:{source}"
    base = ("finetune", tmp_path / "weights.pth", "--arch", arch, "--data", colours, *FAST)
    done = cli(*base, "--lr", 1e-6, "--min-lr", 0, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert open_model(str(tmp_path / "out")).num_classes == 3
    # the file's weights, and hardly moved
    now = load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in state if now[name].shape == state[name].shape]
    assert len(kept) == len(state) - 2
    assert all(torch.allclose(now[name], state[name], atol=1e-4) for name in kept)


def test_training_opens_the_network_once(
    cli: Command, timm_dir: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mitaswap import checkpoint

    opened: list[str] = []
    real = checkpoint.open_network

    def count(name: str, **options: Any) -> Any:
        opened.append(name)
        return real(name, **options)

    monkeypatch.setattr(checkpoint, "open_network", count)
    assert cli("finetune", timm_dir, "--data", colours, *FAST, "-o", tmp_path / "out").code == 0
    assert opened == [str(timm_dir)]


def test_other_weights_under_the_same_name_are_not_continued(
    cli: Command, timm_dir: Path, colours: Path, tmp_path: Path
) -> None:
    network = open_model(str(timm_dir))
    source = network.save(tmp_path / "source")
    base = ("finetune", source, "--data", colours, *FAST, "-o", tmp_path / "out")
    assert cli(*base).code == 0
    with torch.no_grad():
        next(network.module.parameters()).add_(1)
    network.save(source)
    done = cli(*base)
    assert done.code == 2 and "model.weights was" in done.err


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["convert", "walk", "train", "finetune", "report"])
def test_examples_stand_on_one_line_of_the_help(
    cli: Command, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    lines = [line.strip() for line in cli(verb, "--help").out.splitlines()]
    (at,) = [number for number, line in enumerate(lines) if line.startswith("Example:")]
    assert lines[at].startswith(f"Example: mitaswap {verb} ") and lines[at + 1] == ""


def test_train_and_finetune_have_one_set_of_options_and_two_descriptions(cli: Command) -> None:
    train, finetune = (cli(verb, "--help").out for verb in ("train", "finetune"))
    about, options = zip(*(text.split("Arguments", 1) for text in (train, finetune)), strict=True)
    assert options[0] == options[1] and "--weight-decay" in options[0]
    assert "from random weights" in about[0] and "pretrained model further" in about[1]
    assert "pretrained" not in about[0] and "random" not in about[1]
