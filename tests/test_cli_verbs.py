"""What convert, walk, train and finetune do at their edges: places, sizes, heads, help."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import encoded
from rich.console import Console
from safetensors.torch import load_file

import mitaswap
from mitaswap.checkpoint import save
from mitaswap.models import open_model

Command = Callable[..., Any]
FAST = ("--no-aug", "--epochs", 1, "-b", 6, "--warmup-epochs", 0, "-j", 0, "--device", "cpu")


def words(text: str) -> str:
    return " ".join(text.split())


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


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_writes_its_network_beside_its_state_and_convert_leaves_both(
    cli: Command, timm_dir: Path, colours: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base = ("finetune", timm_dir, "--data", colours, *FAST, "-o", out)
    for _ in range(2):  # the second is the same command again
        assert cli(*base).code == 0
    assert {"last.pt", "log.csv", "model.safetensors", "README.md"} <= {
        p.name for p in out.iterdir()
    }
    before = content(out)
    for model in (out, timm_dir):
        done = cli("convert", model, "--to", "linear", "-o", out)
        assert (done.code, done.out) == (2, "")
        assert "it holds a training (last.pt, log.csv), whose network would be" in words(done.err)
        assert "Give a new directory." in words(done.err)
        assert content(out) == before
    assert cli("convert", out, "--to", "linear", "-o", tmp_path / "other").code == 0


def test_convert_replaces_other_mechanisms_but_no_other_weights(
    cli: Command, timm_dir: Path, hf_dir: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    model = mitaswap.load(timm_dir)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    mitaswap.save(model, other)
    for spec in ("linear", "mita(m=4,k=4)", "linear+dwc", "linear+dwc"):
        assert cli("convert", timm_dir, "--to", spec, "-o", out).code == 0
    assert cli("convert", out, "--to", "linear+gate", "-o", out).code == 0  # in place
    before = content(out)
    for source in (other, hf_dir, "embedded:mita"):
        done = cli("convert", source, "--to", "linear", "-o", out)
        assert (done.code, done.out) == (2, "")
        assert "it holds weights of another network (vit_tiny" in words(done.err)
        assert "Give a new directory, or delete that one first." in words(done.err)
        assert content(out) == before


def test_convert_replaces_no_trained_parts_of_mechanisms(
    cli: Command, timm_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model = mitaswap.convert(mitaswap.load(timm_dir), "linear+dwc")
    save(model, out, trained_by="linear+dwc")
    before = content(out)
    done = cli("convert", out, "--to", "linear", "-o", out)
    assert done.code == 2 and "it holds learned parts of the mechanisms" in words(done.err)
    assert content(out) == before
    assert cli("convert", out, "--to", "linear", "-o", tmp_path / "new").code == 0


@pytest.mark.parametrize("verb", ["convert", "report", "train"])
def test_long_paths_are_printed_in_one_piece(
    cli: Command, timm_dir: Path, colours: Path, tmp_path: Path, verb: str
) -> None:
    out = tmp_path / ("long" * 30)
    if verb == "report":
        cli("eval", timm_dir, "--data", "digits", "--limit", 20, "--run", "linear", "-o", out)
        done = cli("report", out)
    elif verb == "convert":
        done = cli("convert", timm_dir, "--to", "linear", "-o", out)
    else:
        done = cli("train", timm_dir, "--data", colours, *FAST, "-o", out)
        assert "after 1 epoch, trained with" in done.out
    assert done.code == 0 and str(out) in done.out


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


def test_walk_says_which_mechanisms_a_bias_leaves(cli: Command) -> None:
    done = cli(
        "walk", "timm:beit_base_patch16_224(depth=2,embed_dim=24,num_heads=2)", "--no-pretrained"
    )
    assert done.code == 0, done.err
    assert done.out.count("standard only") == 2
    assert "added to the scores, only mechanisms that honour it run" in done.out


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


# --- progress ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_the_bar_of_a_training_keeps_its_times_and_rate(
    cli: Command,
    timm_dir: Path,
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
) -> None:
    from mitaswap.cli import _progress
    from mitaswap.train import loop

    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(_progress, "err", screen)
    bars: list[Any] = []

    class Kept(_progress.Progress):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(_progress, "Progress", Kept)
    real = loop.validate
    lines: list[str] = []

    def validate(*args: Any) -> Any:
        paper = Console(file=io.StringIO(), width=width, color_system=None)
        (task,) = bars[0].tasks
        task.start_time -= 4000
        bars[0].update(task.id, stats=task.fields["stats"].replace("epoch 2/2", "epoch 299/300"))
        paper.print(bars[0].get_renderable())
        lines.append(paper.file.getvalue())
        return real(*args)

    monkeypatch.setattr(loop, "validate", validate)
    done = cli("train", timm_dir, "--data", colours, *FAST, "--epochs", 2, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    line = lines[1].rstrip("\n")
    assert "\n" not in line and len(line) <= width
    shown = r"training [━╸╺ ]+ epoch 299/300 loss \d\.\d{3} top1 \d+\.\d \d+ img/s "
    assert re.fullmatch(shown + r"1:06:\d\d left (-:--:--|\d+:\d\d:\d\d)", line), line
    assert len(re.findall("[━╸╺]", line)) >= (4 if width == 80 else 24)


def test_the_bar_of_an_evaluation_of_many_images_keeps_its_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mitaswap.cli import _progress

    screen = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(_progress, "err", screen)
    bar = _progress.Bar()
    bar.start(1_250_000)
    bar.images(1_000_000)
    (task,) = bar._progress.tasks
    task.start_time, task.finished_speed = task.start_time - 36000, 123456.0
    screen.print(bar._progress.get_renderable())
    line = screen.file.getvalue().rstrip("\n")
    assert len(line) <= 80 and "1000000/1250000 123456 img/s 10:00:0" in line
    assert line.endswith("left -:--:--")


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0.5), (3, 1.5), (4, 2.0), (30, 2.0)])
def test_the_warm_up_is_shorter_than_the_training(
    cli: Command,
    timm_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    epochs: int,
    warmup: float,
) -> None:
    seen: list[float] = []

    def train(*args: Any, **_: Any) -> Any:
        seen.append(args[3].warmup_epochs)
        raise KeyboardInterrupt

    monkeypatch.setattr("mitaswap.train.train", train)
    base = ("train", timm_dir, "--data", "digits", "--epochs", epochs, "-o", tmp_path / "out")
    cli(*base)
    cli(*base, "--warmup-epochs", 0)
    assert seen == [warmup, 0]


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


@pytest.mark.parametrize(
    "verb", ["ls", "walk", "convert", "eval", "bench", "train", "finetune", "report"]
)
def test_nothing_is_cut_in_the_help(
    cli: Command, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    text = cli(verb, "--help").out
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert ("--trust-remote-code " in text) == (verb not in ("ls", "report"))


def test_train_and_finetune_have_one_set_of_options_and_two_descriptions(cli: Command) -> None:
    train, finetune = (cli(verb, "--help").out for verb in ("train", "finetune"))
    about, options = zip(*(text.split("Arguments", 1) for text in (train, finetune)), strict=True)
    assert options[0] == options[1] and "--weight-decay" in options[0]
    assert "from random weights" in about[0] and "pretrained model further" in about[1]
    assert "pretrained" not in about[0] and "random" not in about[1]
