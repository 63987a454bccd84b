"""Converted directories: what is in them, who can read them, and that they come back."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from networks import Gated, Sharper, registered
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mitaswap
from mitaswap import Spec, TokenLayout
from mitaswap.checkpoint import (
    EXTRAS,
    KEY,
    fingerprint,
    open_network,
    save,
    saved_recipe,
    trained_with,
    training_with,
)
from mitaswap.errors import MitaswapError
from mitaswap.mechanisms import MECHANISMS, Options, learned_numbers, mechanism, spelled_out
from mitaswap.models import open_model
from mitaswap.surgery import swapped_sites

pytestmark = pytest.mark.usefixtures("one_thread")
MITA = "mita(m=9,k=9)"


def logits(name: str | Path, module: nn.Module | None = None, **options: Any) -> Tensor:
    """Class scores of a saved network for its example, or of `module` for the same input."""
    network = open_network(str(name), **options)
    network.module = (module or network.module).eval()
    with torch.no_grad():
        return network.logits(network.example(3))


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(params=["timm", "hf"])
def plain(request: pytest.FixtureRequest) -> Path:
    """An untouched directory of either library."""
    return request.getfixturevalue(f"{request.param}_dir")


@pytest.fixture
def to_mita(plain: Path, tmp_path: Path, cli: Callable[..., Any]) -> Path:
    """It after `mitaswap convert`."""
    done = cli("convert", plain, "--to", MITA, "-o", tmp_path / "converted")
    assert (done.code, done.err) == (0, "")
    assert f"2 sites swapped to {MITA}" in done.out and "mitaswap.load(" in done.out
    return tmp_path / "converted"


# --- what comes back -----------------------------------------------------------------------------


def test_load_gives_the_swapped_model_back(plain: Path, to_mita: Path) -> None:
    model = mitaswap.load(to_mita)
    specs = {path: str(part.spec) for path, part in swapped_sites(model).items()}
    assert len(specs) == 2 and set(specs.values()) == {MITA}
    expected = mitaswap.convert(mitaswap.load(plain), MITA)
    assert torch.equal(logits(to_mita), logits(plain, expected))
    # negative control: here a swap can be seen
    assert (logits(to_mita) - logits(plain)).abs().max() > 0.01


def test_timm_loads_the_same_weights_unswapped(
    timm_dir: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    cli("convert", timm_dir, "--to", MITA, "-o", tmp_path / "to")
    model = timm.create_model(f"local-dir:{tmp_path / 'to'}", pretrained=True)
    assert not swapped_sites(model)
    assert torch.equal(logits(timm_dir, model), logits(timm_dir))


def test_transformers_loads_the_same_weights_unswapped(
    hf_dir: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    cli("convert", f"hf:{hf_dir}", "--to", "agent(n=4)", "-o", tmp_path / "to")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "to")
    assert not swapped_sites(model)
    assert torch.equal(logits(hf_dir, model), logits(hf_dir))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "to")
    assert processor.size == {"height": 16, "width": 16}


def test_names_and_values_of_parameters_are_upstreams(plain: Path, to_mita: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, to_mita))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (to_mita / EXTRAS).exists()


def test_config_is_upstreams_and_one_key_more(plain: Path, to_mita: Path) -> None:
    added = config(to_mita).pop(KEY)
    assert added["trained_with"] == "standard" and added["version"] == mitaswap.__version__
    assert list(added["recipe"].values()) == [str(spelled_out(Spec.parse(MITA)))]
    assert {k: v for k, v in config(to_mita).items() if k != KEY} == config(plain)


@dataclass(frozen=True)
class Earlier(Options):
    """Options of a mechanism."""

    power: int = 2


@dataclass(frozen=True)
class Later(Options):
    """The same in a version with another default."""

    power: int = 3


def test_other_defaults_do_not_change_what_was_saved(timm_dir: Path, tmp_path: Path) -> None:
    versions = [type("Powered", (Sharper,), {"options_type": kind}) for kind in (Earlier, Later)]
    with registered(powered=versions[0]):
        model = mitaswap.convert(mitaswap.load(timm_dir), "powered+window(size=1,mix=gate)")
        save(model, tmp_path / "to")
        recipe = saved_recipe(open_network(str(tmp_path / "to")))
        # no word of what is usual
        assert recipe and str(recipe.rules[0][1]) == "powered+window(size=1,mix=gate)"
    (written,) = config(tmp_path / "to")[KEY]["recipe"].values()
    assert written.startswith("powered(power=2)+window(size=1,") and "impl" not in written
    with registered(powered=versions[1]):
        assert mechanism("powered").settings["power"] == 3
        part = next(iter(swapped_sites(mitaswap.load(tmp_path / "to")).values()))
        assert part.settings["power"] == 2
        assert str(part.spec) == "powered(power=2)+window(size=1,mix=gate)"


def test_model_card_tells_how_to_load_it(to_mita: Path) -> None:
    card = (to_mita / "README.md").read_text()
    library = "timm.create_model" if "architecture" in config(to_mita) else "from_pretrained"
    assert library in card and "mitaswap.load(" in card and f"`{MITA}`" in card
    assert "trained with `standard`" in card


# --- layers, recipes, again ----------------------------------------------------------------------


def test_layers_and_recipes(timm_dir: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    assert cli("convert", timm_dir, "--to", MITA, "--layers", "1", "-o", tmp_path / "a").code == 0
    assert list(swapped_sites(mitaswap.load(tmp_path / "a"))) == ["blocks.1.attn"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'"0": {MITA}\n"blocks.*": agent(n=16)\n')
    assert cli("convert", timm_dir, "--recipe", recipe, "-o", tmp_path / "b").code == 0
    model = mitaswap.load(tmp_path / "b")
    found = [str(part.spec) for part in swapped_sites(model).values()]
    assert found == [MITA, "agent(n=16)"]
    expected = mitaswap.convert(mitaswap.load(timm_dir), {"0": MITA, "1": "agent(n=16)"})
    assert torch.equal(logits(tmp_path / "b"), logits(timm_dir, expected))


@pytest.mark.parametrize("in_place", [False, True], ids=["elsewhere", "in-place"])
def test_converting_a_converted_directory(
    plain: Path, to_mita: Path, tmp_path: Path, cli: Callable[..., Any], in_place: bool
) -> None:
    again = to_mita if in_place else tmp_path / "again"
    assert cli("convert", to_mita, "--to", "linear", "-o", again).code == 0
    expected = mitaswap.convert(mitaswap.load(plain), "linear")
    assert torch.equal(logits(again), logits(plain, expected))
    assert torch.equal(logits(again, swapped=False), logits(plain))


def test_reverted_is_upstreams_again(plain: Path, to_mita: Path, tmp_path: Path) -> None:
    mitaswap.save(mitaswap.revert(mitaswap.load(to_mita)), tmp_path / "reverted")
    assert config(tmp_path / "reverted")[KEY]["recipe"] is None
    assert not swapped_sites(mitaswap.load(tmp_path / "reverted"))
    assert torch.equal(logits(tmp_path / "reverted"), logits(plain))


# --- bare modules --------------------------------------------------------------------------------


def test_a_bare_module_of_timm_is_saved(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=7)
    mitaswap.save(mitaswap.convert(model, "linear"), tmp_path / "saved")
    assert config(tmp_path / "saved")["architecture"] == "test_vit"
    assert torch.equal(logits(tmp_path / "saved"), logits(tmp_path / "saved", model))


def test_a_bare_module_of_transformers_is_saved(hf_dir: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(hf_dir)
    mitaswap.save(mitaswap.convert(model, "linear"), tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(hf_dir, model))


def test_a_module_of_neither_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MitaswapError, match="a Linear is neither timm's nor transformers'"):
        mitaswap.save(nn.Linear(2, 2), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# --- what it was trained with --------------------------------------------------------------------


def test_trained_with_stays_with_the_weights(plain: Path, tmp_path: Path) -> None:
    assert trained_with(open_network(str(plain))) == "standard"
    mitaswap.save(mitaswap.load(plain), tmp_path / "a", trained_by=MITA)
    # through a bare module, a copy of it, and another conversion
    again = copy.deepcopy(mitaswap.load(tmp_path / "a"))
    mitaswap.save(mitaswap.convert(again, "linear"), tmp_path / "b")
    assert config(tmp_path / "b")[KEY]["trained_with"] == MITA
    assert trained_with(open_network(str(tmp_path / "b"), swapped=False)) == MITA


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ({}, "standard"),
        ({"*": MITA}, MITA),
        ({"0-1": MITA}, MITA),
        ({"0": MITA}, f"blocks.0.attn: {MITA}"),
        ({"0": MITA, "1": "linear"}, f"blocks.0.attn: {MITA}; blocks.1.attn: linear"),
    ],
    ids=["untouched", "all", "all-by-number", "one-layer", "two-mechanisms"],
)
def test_name_of_what_is_trained(timm_dir: Path, recipe: dict[str, str], name: str) -> None:
    network = open_model(str(timm_dir))
    if recipe:
        mitaswap.convert(network.module, recipe)
    assert training_with(network) == name


# --- learned extras ------------------------------------------------------------------------------


@pytest.fixture
def gated(plain: Path, tmp_path: Path) -> Any:
    """A directory with a mechanism that has learned something, and its scores."""
    with registered(gated=Gated):
        model = mitaswap.convert(mitaswap.load(plain), "gated")
        with torch.no_grad():
            gates: list[Any] = [part.gate for part in swapped_sites(model).values()]
            for gate in gates:
                gate.uniform_(1.0, 3.0)
        mitaswap.save(model, tmp_path / "gated")
        yield tmp_path / "gated", logits(plain, model)


def test_learned_extras_lie_beside_the_weights_and_come_back(plain: Path, gated: Any) -> None:
    folder, scores = gated
    weights, extras = load_file(folder / "model.safetensors"), load_file(folder / EXTRAS)
    assert list(weights) == list(load_file(plain / "model.safetensors"))
    assert len(extras) == 2 and all(name.endswith(".mitaswap.gate") for name in extras)
    assert torch.equal(logits(folder), scores)
    fresh = mitaswap.convert(mitaswap.load(plain), "gated")
    assert not torch.equal(logits(plain, fresh), scores)  # they matter
    assert torch.equal(logits(folder, swapped=False), logits(plain))


def test_extras_of_an_earlier_network_do_not_stay(gated: Any) -> None:
    folder, _ = gated
    mitaswap.save(mitaswap.convert(mitaswap.revert(mitaswap.load(folder)), "linear"), folder)
    assert not (folder / EXTRAS).exists()
    assert set(map(str, (p.spec for p in swapped_sites(mitaswap.load(folder)).values()))) == {
        "linear"
    }


@pytest.mark.parametrize("damage", ["missing", "truncated", "another", "shape"])
def test_damaged_extras_are_named(gated: Any, damage: str) -> None:
    folder, _ = gated
    path = folder / EXTRAS
    extras = load_file(path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "another":
        save_file({name.replace(".gate", ".door"): v for name, v in extras.items()}, path)
    else:
        save_file({name: torch.zeros(5) for name in extras}, path)
    with pytest.raises(MitaswapError, match=EXTRAS) as error:
        mitaswap.load(folder)
    expected = {
        "missing": "with 2 learned tensors is missing",
        "truncated": "truncated or broken",
        "another": "does not fit the swapped network",
        "shape": "does not fit the swapped network",
    }
    assert expected[damage] in str(error.value)


@pytest.mark.parametrize("entry", ["mita", {"recipe": "mita"}, ["mita"]], ids=str)
def test_a_broken_entry_in_config_is_refused(to_mita: Path, entry: Any) -> None:
    (to_mita / "config.json").write_text(json.dumps({**config(to_mita), KEY: entry}))
    with pytest.raises(MitaswapError, match="must hold a recipe that maps layer patterns"):
        mitaswap.load(to_mita)


# --- what lies there already ---------------------------------------------------------------------


@pytest.mark.parametrize("file", ["README.md", "config.json", "src/code.py"])
def test_files_of_others_are_never_replaced(timm_dir: Path, tmp_path: Path, file: str) -> None:
    model, target = mitaswap.load(timm_dir), tmp_path / "project"
    (target / file).parent.mkdir(parents=True)
    (target / file).write_text('{"name": "mine"}')
    name = file.partition("/")[0]
    with pytest.raises(MitaswapError, match=rf"mitaswap did not write \({name}\)"):
        mitaswap.save(model, target)
    assert [path.name for path in target.iterdir()] == [name]
    assert (target / file).read_text() == '{"name": "mine"}'
    save(model, target, into_existing=True)  # for those who know better
    assert (target / "model.safetensors").exists() and (target / file).exists()


def test_a_plain_network_of_another_library_is_never_replaced(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "net")
    with pytest.raises(MitaswapError, match=r"config\.json, model\.safetensors"):
        mitaswap.save(mitaswap.load(plain), tmp_path / "net")
    assert config(tmp_path / "net") == config(plain)


def test_empty_directories_and_ones_own_are_written_to(timm_dir: Path, tmp_path: Path) -> None:
    model = mitaswap.load(timm_dir)
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        mitaswap.save(model, tmp_path / "empty")
    assert KEY in config(tmp_path / "empty")


def test_fingerprint_follows_the_weights_and_the_extras(timm_dir: Path, tmp_path: Path) -> None:
    first = fingerprint(open_network(str(timm_dir)))
    assert first == fingerprint(open_network(str(timm_dir)))
    other = open_network(str(timm_dir))
    with torch.no_grad():
        next(other.module.parameters()).view(-1)[0] += 1
    assert fingerprint(other) != first
    mitaswap.save(mitaswap.load(timm_dir), tmp_path / "net")
    assert fingerprint(open_network(str(tmp_path / "net"))) == first
    save_file({"blocks.0.attn.mitaswap.gate": torch.ones(2)}, tmp_path / "net" / EXTRAS)
    assert fingerprint(open_network(str(tmp_path / "net"))) != first


# --- writing fails -------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["config.json", "README.md", "rename"])
def test_nothing_half_written_when_the_disk_is_full(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model = mitaswap.convert(mitaswap.load(plain), MITA)
    real = Path.write_bytes if where == "README.md" else Path.write_text

    def write(path: Path, *args: Any, **kwargs: Any) -> Any:
        return (full if path.name == where else real)(path, *args, **kwargs)

    if where == "rename":
        monkeypatch.setattr(Path, "rename", full)
    else:
        monkeypatch.setattr(Path, real.__name__, write)
    with pytest.raises(MitaswapError, match=r"cannot save to .*No space left"):
        mitaswap.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    mitaswap.save(model, tmp_path / "out")  # negative control: only the disk was in the way
    assert torch.equal(logits(tmp_path / "out"), logits(plain, model))


def test_an_existing_directory_survives_a_full_disk(
    plain: Path, to_mita: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in to_mita.iterdir()}
    model = mitaswap.convert(mitaswap.load(plain), "linear")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MitaswapError, match="cannot save to"):
        mitaswap.save(model, to_mita)
    assert {file.name: file.read_bytes() for file in to_mita.iterdir()} == before
    assert list(tmp_path.iterdir()) == [to_mita]


def two_heads_of_it(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Projections that are identities."""
    heads = rows.unflatten(2, (2, -1)).transpose(1, 2)
    return heads, heads


LEARNED = [name for name in MECHANISMS.names() if learned_numbers(mitaswap.mechanism(name))] + [
    "agent(n=6,bias=true)",
    "pvt(place=after)",
    "reformer(chunk=8)",
    "linear+dwc",
    "standard+gate(per=head)",
]


@pytest.mark.parametrize("spec", LEARNED)
def test_learned_parts_are_loaded_at_other_image_sizes(spec: str, tmp_path: Path) -> None:
    """Created at one grid, saved, opened at another: the same function, interpolated from there."""
    name = "vit_tiny_patch16_224"
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model(name, img_size=64, **shape, dynamic_img_size=True).eval()
    layout = TokenLayout(1, (8, 8))
    if "(" not in spec and "+" not in spec:
        spec = str(Spec(spec, MECHANISMS.get(spec).suggest(layout)))
    mitaswap.convert(model, spec, example=torch.randn(2, 3, 64, 64))
    (part,) = swapped_sites(model).values()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.set_input_size((96, 80))  # the network moves on; what is learned knows where it is from
    where = mitaswap.save(model, tmp_path / "saved")
    for size in (None, (64, 64), (128, 96)):
        twin = mitaswap.load(where, **({} if size is None else {"img_size": size}))
        (again,) = swapped_sites(twin).values()
        assert again.site == part.site
        for grid in ((8, 8), (12, 10), (16, 12)):
            at = TokenLayout(1, grid)
            q, k, v = torch.randn(3, 2, 2, at.tokens, 12, generator=generator)
            extra = {"x": torch.randn(2, at.tokens, 24)} if "x" in part.needs else {}
            if "project" in part.needs:
                extra["project"] = two_heads_of_it
            want = part(q, k, v, layout=at, **extra)
            assert torch.equal(again(q, k, v, layout=at, **extra), want)
