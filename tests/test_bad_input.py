"""Bad input at the command line: one clear message, exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import errno
import json
import logging
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from image_files import encoded, structs, write
from safetensors.torch import save_file
from timm.models.vision_transformer import Attention

import mitaswap
from mitaswap.results import load_rows

Command = Callable[..., Any]
Refused = Callable[..., str]
MITA = "mita(m=9,k=9)"
DIGITS = ("--data", "digits", "--limit", "40", "--device", "cpu")
BEIT = (
    "timm:beit_base_patch16_224(img_size=16,patch_size=4,embed_dim=24,depth=2,num_heads=2,"
    "num_classes=10,pretrained=false)"
)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, with the content of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(cli: Command, tmp_path: Path) -> Refused:
    """Run a command that must be refused, and check what all refusals have in common. Returns the
    message in one line.
    """

    def command(*args: object) -> str:
        before = tree(tmp_path)
        done = cli(*args)
        assert done.code == 2
        assert done.out == ""
        assert done.err.startswith("error: ") and done.err.count("error: ") == 1
        assert "Traceback" not in done.err
        assert tree(tmp_path) == before
        return " ".join(done.err.split())

    return command


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "standard,mitta"], "unknown mechanism 'mitta'. Did you mean 'mita'?"),
        (["--run", "mita(m=9,kk=9)"], "unknown option of mita 'kk'. Did you mean 'k'?"),
        (["--run", "linear(feature=rely)"], "'rely'. Did you mean 'relu'?"),
        (["--run", "mita(m=9.5)"], "m=9.5 in 'mita(m=9.5)' must be of type int"),
        (["--run", "mita(m=9"], "expected NAME or NAME(option=value, ...)"),
        (
            ["--layers", "block.0.attn"],
            "pattern 'block.0.attn'. Did you mean 'blocks.0.attn'?",
        ),
        (["--run", ","], "--run ',' names nothing; leave it out, or give names"),
        (["--run", ""], "--run '' names nothing"),
        (["--stats", ","], "--stats ',' names nothing"),
        (["--layers", "attn.0"], "pattern 'attn.0'. Did you mean 'blocks.0.attn'?"),
        (["--grid", "K=4", "--grid", "M=9"], "unknown axis of mita 'M'. Did you mean 'm'?"),
        (["--layers", "0-5"], "layer pattern '0-5' is outside the model's 2 sites (0-1)"),
        (["--stats", "overlop"], "unknown statistic 'overlop'. Did you mean 'overlap'?"),
        (["--stats", "overlap", "--run", "linear"], "has only linear; add mita"),
        (["--grid", "varient=full"], "unknown axis of mita 'varient'. Did you mean 'variant'?"),
        (["--grid", "s"], '--grid s needs values, for instance --grid "s=1,2"'),
        (["--grid", "K="], "--grid 'K=' has no values"),
        (["--grid", "=3"], "--grid '=3' names no axis"),
        (["--grid", "K=4", "--grid", "K=9"], "--grid names the axis 'K' twice"),
        (["--grid", "K=4", "--grid", "k=9"], "sweeps the option k of mita twice, as K and as k"),
        (["--grid", "K=many"], "must be of type int"),
        (["--dtype", "float23"], "unknown dtype 'float23'. Did you mean 'float32'?"),
        (["--device", "quantum"], "unknown device 'quantum'"),
        (["--split", "tset"], "tset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_options(
    refused: Refused, timm_dir: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    out = tmp_path / "run"
    assert says in refused("eval", timm_dir, *DIGITS, *arguments, "-o", out)


MODELS = {
    "timm:vit_tiny_patch16_22": "unknown model 'vit_tiny_patch16_22'. Did you mean 'vit_tiny",
    "timn:vit_tiny_patch16_224": "Did you mean 'timm'?",
    "timm:deit": "unknown model 'deit'. Did you mean 'deit_base_patch16_224',",
    "vit_tiny": "unknown model 'vit_tiny'. Did you mean 'vit_tiny_patch16_224',",
    "embedded:MITA": "unknown embedded model 'MITA'. Did you mean 'mita'?",
    "embedded:standart": "unknown embedded model 'standart'",
    "no/such/directory": "no/such/directory",
    "timm:vit_tiny_patch16_224(img_sise=16,pretrained=false)": "Did you mean 'img_size'?",
    "weights.safetensors": "there is no weights file 'weights.safetensors'",
}
VERBS = ("walk", "eval", "convert", "finetune")
NAMED = {
    "mitta=timm:test_vit": "unknown mechanism 'mitta'. Did you mean 'mita'?",
    "mine=": "'mine=' names no model: expected NAME=MODEL, or MODEL alone",
    "": "an empty MODEL",
    "MITA=timm:test_vit": "unknown mechanism 'MITA'. Did you mean 'mita'?",
    "mita(l=9)=timm:test_vit": "unknown option of mita 'l'.",
}


@pytest.mark.parametrize(
    ("verb", "model", "says"),
    [
        *((verb, *case) for verb in VERBS for case in MODELS.items()),
        *(("eval", *case) for case in NAMED.items()),
    ],
    ids=lambda value: value if "'" not in value else "",
)
def test_models(refused: Refused, tmp_path: Path, verb: str, model: str, says: str) -> None:
    rest: dict[str, tuple[object, ...]] = {
        "walk": (),
        "eval": (*DIGITS, "-o", tmp_path / "out"),
        "convert": ("--to", "linear", "-o", tmp_path / "out"),
        "finetune": ("--to", "linear", "--data", "digits", "-o", tmp_path / "out"),
    }
    assert says in refused(verb, model, *rest[verb])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "linnear"], "unknown mechanism 'linnear'. Did you mean 'linear'?"),
        (["--to", "agent(m=9)"], "unknown option of agent 'm'."),
        (["--to", "linear", "--layers", "blocks.2.*"], "unknown layer pattern 'blocks.2.*'."),
        (["--to", "linear", "--layers", ","], "names no layer"),
        (["--to", "mita(m=65,k=9)"], "m=65 must be between 1 and the 64 patches"),
        (["--to", "mita(m=9,k=9,s=10)"], "s=10 must be between 1 and the 9 experts (m)"),
        (["--to", "mita(m=11,k=9)"], "error: blocks.0.attn: mita(m=11,k=9): 11 landmarks do not"),
        (["--to", "dat(groups=5)", "--layers", "1"], "error: blocks.1.attn: dat(groups=5): groups"),
        ([], "give either --to MECHANISM or --recipe FILE.yaml"),
        (["--to", "linear", "--recipe", "r.yaml"], "give either --to"),
        (["--recipe", "r.yaml"], "cannot read the recipe 'r.yaml'"),
        (["--recipe", "r.yaml", "--layers", "1"], "a recipe has its own layer patterns"),
        (["--to", "linear", "--arch", "timm:test_vit"], "is only for bare weights files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_convert_options(
    refused: Refused, timm_dir: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    assert says in refused("convert", timm_dir, *arguments, "-o", tmp_path / "out")


@pytest.mark.parametrize("text", ["", "- mita", "'0': 3", "'0': [mita", "blocks.7: mita"])
def test_recipes(refused: Refused, timm_dir: Path, tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    message = refused("convert", timm_dir, "--recipe", recipe, "-o", tmp_path / "out")
    assert ("unknown layer pattern 'blocks.7'" if "7" in text else str(recipe)) in message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("digts", "unknown data set 'digts'. Did you mean 'digits'?"),
        ("digits(sise=16)", "Did you mean 'size'?"),
        ("no/such.parquet", "no file or directory 'no/such.parquet'"),
        ("torch/cifar11", "torch/cifar11"),
    ],
    ids=["unknown", "option", "path", "timm"],
)
@pytest.mark.parametrize("verb", ["eval", "train"])
def test_data_sets(
    refused: Refused, timm_dir: Path, tmp_path: Path, verb: str, data: str, says: str
) -> None:
    assert says in refused(verb, timm_dir, "--data", data, "-o", tmp_path / "out")


def test_two_models_of_one_name(refused: Refused, timm_dir: Path, tmp_path: Path) -> None:
    models = (f"a={timm_dir}", f"a={timm_dir}")
    message = refused("eval", *models, *DIGITS, "-o", tmp_path / "run")
    assert "two models are called 'a'; give them names: NAME=MODEL" in message


# --- models that mechanisms cannot serve ---------------------------------------------------------


def test_a_model_without_a_site(refused: Refused, tmp_path: Path) -> None:
    resnet = "timm:test_resnet(num_classes=10,pretrained=false)"
    for command in (
        ("eval", resnet, *DIGITS, "-o", tmp_path / "run"),
        ("convert", resnet, "--to", "linear", "-o", tmp_path / "run"),
    ):
        message = refused(*command)
        assert "has no site that can be swapped (it makes no attention call at all)" in message


def test_a_bias_that_the_mechanism_cannot_honour(
    refused: Refused, cli: Command, tmp_path: Path
) -> None:
    says = "blocks.0.attn (Attention) uses an additive attention bias, which linear cannot honour"
    assert says in refused("convert", BEIT, "--to", "linear", "-o", tmp_path / "out")
    # before any work, though standard would have run first
    base = ("eval", BEIT, *DIGITS, "-o", tmp_path / "run")
    assert says in refused(*base, "--run", "standard,linear")
    assert cli(*base, "--run", "standard").code == 0


def test_a_mask(
    refused: Refused, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Attention.forward

    def masked(self: Any, x: torch.Tensor, **_: Any) -> torch.Tensor:
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        keep[:, 7] = False  # nobody may look at one of the patches
        return real(self, x, attn_mask=keep)

    monkeypatch.setattr(Attention, "forward", masked)
    says = "blocks.0.attn (Attention) uses an attention mask, which mita(m=9,k=9) cannot honour"
    assert says in refused("eval", tiny, *DIGITS, "--run", MITA, "-o", tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run", "mita(m=65,k=4)"], "m=65 must be between 1 and the 64 patches (tokens 1 + 8x8)"),
        (["--run", "mita(m=4,k=66)"], "k=66 must be between 1 and the 65 tokens (tokens 1 + 8x8)"),
        (["--run", "mita(m=4,k=4,s=5)"], "s=5 must be between 1 and the 4 experts (m)"),
        (["--run", "agent(n=100)"], "n=100"),
        (["--grid", "N=4,65"], "m=65 must be between 1 and the 64 patches"),
        (["--grid", "K=4,66"], "k=66 must be between 1 and the 65 tokens"),
        (["--grid", "N=11"], "11"),
        (["--run", "mita(m=4,k=4,pool=3x3)"], "3x3"),
        # each names the site and the mechanism
        (["--run", "mita(m=11,k=4)"], "error: blocks.0.attn: mita(m=11,k=4): 11 landmarks do not"),
        (["--grid", "N=9,11"], "error: blocks.0.attn: mita(m=11,k=25): 11 landmarks do not"),
        # what is only found where a mechanism meets a site, behind what would have run
        (["--run", "dat,dat(groups=5),linear"], "error: blocks.0.attn: dat(groups=5): groups=5"),
        (["--run", "dat", "--grid", "groups=2,5"], "error: blocks.0.attn: dat(groups=5): groups=5"),
        (["--run", "dat+dwc,dat(groups=5)+dwc"], "error: blocks.0.attn: dat(groups=5): groups=5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_sizes_that_do_not_fit(
    refused: Refused,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    def work(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was begun")

    monkeypatch.setattr("mitaswap.evaluation.decode", work)
    monkeypatch.setattr("mitaswap.results.Run.open", work)
    assert says in refused("eval", tiny, *DIGITS, *arguments, "-o", tmp_path / "run")


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_options_that_fit_no_site_are_refused_before_training(
    refused: Refused, timm_dir: Path, tmp_path: Path, verb: str
) -> None:
    message = refused(
        verb, timm_dir, "--to", "dat(groups=5)", "--data", "digits", "-o", tmp_path / "out"
    )
    assert message.startswith("error: blocks.0.attn: dat(groups=5): groups=5 must divide")


def test_a_mechanism_is_asked_once_for_equal_sites(timm_dir: Path) -> None:
    from mitaswap.mechanisms import mechanism
    from mitaswap.models import open_model
    from mitaswap.spec import Recipe
    from mitaswap.surgery import ask, walk

    network, asked = open_model(str(timm_dir)), set[Any]()
    sites = walk(network.module, network.example(2))
    for spec in ("dat", "dat", "dat(groups=2)", "linear"):
        assert len(ask(network.module, Recipe.of(spec), sites, asked=asked)) == 2
    assert len(asked) == 3
    assert {mechanism(question[0]).name for question in asked} == {"dat", "linear"}


def test_classes_of_data_and_model(refused: Refused, timm_dir: Path, tmp_path: Path) -> None:
    model = "timm:test_vit(num_classes=7,pretrained=false)"
    message = refused("eval", model, *DIGITS, "-o", tmp_path / "run")
    assert "has 7 classes, but digits has 10" in message and "`mitaswap finetune`" in message
    base = ("finetune", model.replace(",pretrained=false", ""), "--arch", "timm:test_vit")
    assert "only for bare weights" in refused(*base, "--data", "digits", "-o", tmp_path / "run")
    named = "timm:test_vit(num_classes=7)"
    message = refused("train", named, "--data", "digits", "-o", tmp_path / "run")
    assert "has 7 classes, but digits (train) has 10" in message and "num_classes=10" in message


# --- broken files --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes of two images, for training and for validation."""
    for split in ("train", "val"):
        for label in range(10):
            for number in range(2):
                path = tmp_path / "images" / split / f"class{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded(20 * label + number))
    return tmp_path / "images"


@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
@pytest.mark.parametrize("verb", ["eval", "train"])
def test_a_broken_image(
    refused: Refused, timm_dir: Path, folder: Path, tmp_path: Path, damage: str, verb: str
) -> None:
    path = folder / ("val" if verb == "eval" else "train") / "class7" / "1.png"
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": data[:-30], "text": b"not an image"}[damage])
    rest = {
        "eval": ("--run", "standard"),
        "train": ("--no-aug", "-b", 4, "--epochs", 1, "--warmup-epochs", 0, "-j", 0),
    }
    message = refused(verb, timm_dir, "--data", folder, *rest[verb], "-o", tmp_path / "run")
    assert f"the image '{path}'" in message
    assert ("is empty (0 bytes)" if damage == "empty" else "cannot be decoded") in message


@pytest.mark.parametrize("damage", ["image-empty", "image-truncated", "no-image", "no-label"])
def test_a_broken_row_of_a_parquet_file(
    refused: Refused, timm_dir: Path, tmp_path: Path, damage: str
) -> None:
    cells: list[Any] = structs(*range(10, 130, 10))
    labels: list[Any] = [*range(10), 0, 1]
    if damage == "image-empty":
        cells[5]["bytes"] = b""
    elif damage == "image-truncated":
        cells[5]["bytes"] = cells[5]["bytes"][:-30]
    elif damage == "no-image":
        cells[5] = None
    else:
        labels[5] = None
    path = write(tmp_path / "x.parquet", cells, pa.array(labels, pa.int64()))
    message = refused("eval", timm_dir, "--data", path, "-o", tmp_path / "run")
    assert f"row 5 of '{path}'" in message


@pytest.mark.parametrize("damage", ["empty", "truncated"])
def test_a_broken_parquet_file(
    refused: Refused, timm_dir: Path, tmp_path: Path, damage: str
) -> None:
    path = write(tmp_path / "x.parquet", structs(*range(10, 110, 10)), list(range(10)))
    path.write_bytes(path.read_bytes()[:-50] if damage == "truncated" else b"")
    message = refused("eval", timm_dir, "--data", path, "-o", tmp_path / "run")
    assert f"cannot read the parquet file '{path}'" in message and "Fetch it again." in message


@pytest.mark.parametrize("damage", ["empty", "truncated"])
@pytest.mark.parametrize("library", ["timm", "hf", "bare"])
def test_a_broken_weights_file(
    request: pytest.FixtureRequest,
    refused: Refused,
    tiny: str,
    tmp_path: Path,
    library: str,
    damage: str,
) -> None:
    model, arch = tmp_path / "model", ()
    source = request.getfixturevalue(f"{'timm' if library == 'bare' else library}_dir")
    mitaswap.save(mitaswap.load(source), model)
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if damage == "truncated" else b"")
    if library == "bare":
        model, arch = path, ("--arch", tiny)  # type: ignore[assignment]
    message = refused("eval", model, *arch, *DIGITS, "-o", tmp_path / "run")
    assert "model.safetensors" in message and str(tmp_path / "model") in message


def test_weights_of_another_network(refused: Refused, tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"head.weight": torch.zeros(10, 24)}, path)
    message = refused("eval", path, "--arch", tiny, *DIGITS, "-o", tmp_path / "run")
    assert "do not fit" in message and "missing" in message


# --- run directories -----------------------------------------------------------------------------


@pytest.fixture
def run(cli: Command, timm_dir: Path, tmp_path: Path) -> Path:
    """A finished run of two cells."""
    done = cli("eval", timm_dir, *DIGITS, "--run", "linear", "-o", tmp_path / "run")
    assert done.code == 0
    return tmp_path / "run"


def test_a_run_of_another_command(refused: Refused, timm_dir: Path, run: Path) -> None:
    base = ("eval", timm_dir, *DIGITS, "-o", run)
    message = refused(*base, "--run", "linear,agent(n=9)", "--limit", 50, "-b", 8)
    assert "rows of two plans are not mixed. These fields differ:" in message
    for field in (
        "limit: there 40, asked now 50",
        "batch_size: there 64, asked now 8",
        'run: there ["linear"], asked now ["linear", "agent(n=9)"]',
    ):
        assert field in message
    assert "split" not in message and len(load_rows(run)) == 2


@pytest.mark.parametrize("first", ["eval", "bench"])
def test_a_run_of_another_verb(
    cli: Command, refused: Refused, timm_dir: Path, tmp_path: Path, first: str
) -> None:
    out = ("-o", tmp_path / "run")
    verbs: dict[str, tuple[object, ...]] = {
        "eval": ("eval", timm_dir, *DIGITS, "--run", "linear", *out),
        "bench": ("bench", "--run", "linear", "--tokens", 16, "--seconds", 0, *out),
    }
    assert cli(*verbs.pop(first)).code == 0
    ((other, command),) = verbs.items()
    message = refused(*command)
    assert f"was made by `mitaswap {first}`, and `mitaswap {other}` writes other" in message
    assert "differ" not in message and "not set" not in message


def test_bench_of_nothing(refused: Refused, tmp_path: Path) -> None:
    assert "--run ',' names nothing" in refused("bench", "--run", ",", "-o", tmp_path / "run")


def test_a_directory_that_is_called_as_a_source(
    refused: Refused, timm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ("eval", timm_dir, "--data", "folder", "-o", tmp_path / "run")
    assert refused(*base).endswith("folder needs the option root: folder(root=...)")
    (tmp_path / "folder").mkdir()
    assert "or, for what lies here under that name, ./folder" in refused(*base)


def test_retries_of_the_hub_are_not_told(cli: Command) -> None:
    from huggingface_hub.utils import _http

    cli("ls", "mita")
    assert not _http.logger.isEnabledFor(logging.WARNING)
    assert _http.logger.isEnabledFor(logging.ERROR)


def test_a_run_of_other_weights(
    refused: Refused, cli: Command, timm_dir: Path, tmp_path: Path
) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    mitaswap.save(mitaswap.load(timm_dir), model)
    base = ("eval", model, *DIGITS, "--run", "linear", "-o", run)
    assert cli(*base).code == 0
    changed = mitaswap.load(model)
    with torch.no_grad():
        next(changed.parameters()).mul_(2)
    mitaswap.save(changed, model)
    assert 'weights.model: there "' in refused(*base)


@pytest.mark.parametrize("verb", ["eval", "report"])
def test_a_damaged_run(refused: Refused, timm_dir: Path, run: Path, verb: str) -> None:
    base = (verb, timm_dir, *DIGITS, "--run", "linear", "-o", run)
    command = base if verb == "eval" else (verb, run)
    rows = (run / "rows.jsonl").read_text()
    (run / "rows.jsonl").write_text(rows.replace('"study"', '"stu', 1))
    assert f"'{run / 'rows.jsonl'}' is damaged at line 1" in refused(*command)
    (run / "rows.jsonl").write_text(rows)
    plan = (run / "run.json").read_text()
    for broken in ("", plan[:50], "[]"):
        (run / "run.json").write_text(broken)
        assert f"cannot read '{run / 'run.json'}'" in refused(*command)


def test_directories_that_are_no_runs(refused: Refused, timm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for verb in ("eval", "report"):
        rest = (timm_dir, *DIGITS, "--run", "linear", "-o") if verb == "eval" else ()
        assert "not a run directory" in refused(verb, *rest, tmp_path / "mine")
        assert str(tmp_path / "file") in refused(verb, *rest, tmp_path / "file")
    assert "is not a directory" in refused("report", tmp_path / "nothing")
    assert "is a file" in refused("convert", timm_dir, "--to", "linear", "-o", tmp_path / "file")
    train = ("train", timm_dir, "--data", "digits", "-o")
    assert "is a file" in refused(*train, tmp_path / "file")


def test_a_model_directory_is_no_place_to_train_into(
    refused: Refused, cli: Command, timm_dir: Path, tmp_path: Path
) -> None:
    cli("convert", timm_dir, "--to", "linear", "-o", tmp_path / "net")
    message = refused("train", timm_dir, "--data", "digits", "-o", tmp_path / "net")
    assert "holds a model" in message and "Choose another directory" in message


def test_a_training_of_another_command(
    refused: Refused, cli: Command, timm_dir: Path, tmp_path: Path
) -> None:
    base = ("finetune", timm_dir, "--data", "digits", "--limit", 40, "--no-aug", "-b", 20, "-j", 0)
    more = ("--warmup-epochs", 0, "--epochs", 1, "-o", tmp_path / "out")
    assert cli(*base, *more).code == 0
    message = refused(*base, *more, "--lr", 0.5)
    assert "holds a training run of another command: config.lr was 0.001, is now 0.5" in message
    assert "recipe" in refused(*base, *more, "--to", "linear")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epochs", "0"], "epochs=0 (must be at least 1)"),
        (["--lr", "-1"], "lr=-1.0 (must be above 0)"),
        (["--opt", "adamm"], "adamm"),
        (["--sched", "cosin"], "unknown schedule 'cosin'. Did you mean 'cosine'?"),
        (["--amp", "fp8"], "unknown precision (amp) 'fp8'."),
        (["--device", "quantum"], "quantum"),
        (["--limit", "10", "-b", "20", "--no-aug", "-j", "0"], "10"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_settings(
    refused: Refused, timm_dir: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    base = ("train", timm_dir, "--data", "digits", "-o", tmp_path / "out")
    assert says in refused(*base, *arguments)


# --- in the middle of the work -------------------------------------------------------------------


def test_outputs_that_are_no_numbers(
    cli: Command, refused: Refused, timm_dir: Path, tmp_path: Path
) -> None:
    broken = mitaswap.load(timm_dir)
    with torch.no_grad():
        dict(broken.named_parameters())["blocks.1.norm1.weight"][3] = float("nan")
    mitaswap.save(broken, tmp_path / "broken")
    message = refused(
        "eval", tmp_path / "broken", *DIGITS, "--run", "linear", "-o", tmp_path / "run"
    )
    assert f"'{tmp_path / 'broken'}' run with standard in float32 gives outputs that are" in message
    assert "parameter blocks.1.norm1.weight is not finite" in message
    # a sound model first: its rows are kept
    base = ("eval", timm_dir, tmp_path / "broken", *DIGITS, "--run", "linear", "-o")
    done = cli(*base, tmp_path / "run")
    assert done.code == 2 and "error: " in done.err and "Traceback" not in done.err
    assert list(load_rows(tmp_path / "run")["model"]) == [timm_dir.name] * 2


def test_overflow_in_half_precision(refused: Refused, timm_dir: Path, tmp_path: Path) -> None:
    huge = mitaswap.load(timm_dir)
    with torch.no_grad():
        dict(huge.named_parameters())["blocks.1.mlp.fc2.weight"].fill_(6e4)
    mitaswap.save(huge, tmp_path / "huge")
    message = refused(
        "eval", tmp_path / "huge", *DIGITS, "--dtype", "float16", "-o", tmp_path / "run"
    )
    assert "in float16 gives outputs" in message and "try the dtype float32" in message


def test_the_disk_is_full(cli: Command, timm_dir: Path, tmp_path: Path) -> None:
    """A real limit of the system: a file may have no more bytes than some of the cells take."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    base = ("eval", timm_dir, *DIGITS, "--run", "mita(m=4,k=1)", "--grid", "K=1,2,3,4,5,6", "-o")
    assert cli(*base, whole).code == 0
    lines = (whole / "rows.jsonl").read_bytes().splitlines(keepends=True)
    size = sum(map(len, lines[:5])) + len(lines[5]) // 2
    assert len(lines) == 8 and (whole / "run.json").stat().st_size < size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        done = cli(*base, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert done.code == 2 and done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert "the disk is full" in done.err and "All rows before it are kept" in done.err
    kept = len(load_rows(run))
    assert kept in (4, 5, 6)  # the digits of a loss or time may be one more or less
    assert f"it has {kept} of 8 cells" in cli(*base, run).err
    assert set(load_rows(run)["cell"]) == set(load_rows(whole)["cell"])


@pytest.mark.parametrize("verb", ["eval", "train"])
@pytest.mark.parametrize("there", ["", "runs", "runs/new"])
def test_a_disk_that_is_full_from_the_start_leaves_nothing(
    cli: Command, timm_dir: Path, tmp_path: Path, verb: str, there: str
) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    base: tuple[object, ...] = ("eval", timm_dir, *DIGITS, "--run", "linear")
    if verb == "train":
        rest = ("--no-aug", "--epochs", 1, "-b", 20, "-j", 0)
        base = ("train", timm_dir, "--data", "digits", "--limit", 40, *rest)
    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        done = cli(*base, "-o", tmp_path / "runs" / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert done.code == 2 and done.err.count("error: cannot write") == 1
    assert tree(tmp_path) == before
    assert cli(*base, "-o", tmp_path / "runs" / "new").code == 0


@pytest.mark.parametrize("room", [0, 2], ids=["at-once", "after-two-cells"])
def test_the_disk_is_full_while_rows_are_written(
    cli: Command, timm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    from mitaswap.results import _run

    run, real, written = tmp_path / "run", _run.os.write, iter(range(99))

    def write(descriptor: int, data: Any) -> int:
        if next(written) < room:
            return real(descriptor, data)
        real(descriptor, bytes(data)[:100])  # a part of it fits
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ("eval", timm_dir, *DIGITS, "--run", "linear,agent(n=4)", "-o", run)
    with monkeypatch.context() as patch:
        patch.setattr(_run.os, "write", write)
        done = cli(*command)
    assert done.code == 2 and "Traceback" not in done.err
    assert "the disk is full (No space left on device)" in done.err
    assert "give the same command again" in done.err
    if room == 0:
        assert not run.exists()
    else:
        assert [json.loads(line)["cell"] for line in (run / "rows.jsonl").open()] == [
            f"matrix/{timm_dir.name}/standard",
            f"matrix/{timm_dir.name}/linear",
        ]
    again = cli(*command)
    assert again.code == 0 and len(load_rows(run)) == 3
