"""How a name finds its library, and that nothing heavy is loaded before it has to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mitaswap.errors import MitaswapError
from mitaswap.models import SOURCES, embedded_names, open_model
from mitaswap.models import embedded as embedded_source

TINY = (
    "vit_tiny_patch16_224(pretrained=false,img_size=16,patch_size=4,depth=1,embed_dim=16,"
    "num_heads=2,num_classes=3)"
)


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_libraries_are_loaded_when_they_are_needed() -> None:
    code = f"""
import sys, mitaswap.models as m
def loaded():
    return sorted({{'timm', 'transformers', 'huggingface_hub'}} & sys.modules.keys())
m.SOURCES.names(), m.embedded_names()
print(loaded())
m.open_model('{TINY}')
print('timm' in loaded(), 'transformers' in loaded())
"""
    assert run(code).splitlines() == ["[]", "True False"]


def test_without_network_one_clear_error(tmp_path: Path) -> None:
    fetched = {
        "timm:vit_tiny_patch16_224": "the weights",
        "hf-hub:timm/no": "config.json",
        "hf:google/no": "config.json",
        "hf:google/no(pretrained=false)": "config.json",
    }
    code = """
from mitaswap.errors import MitaswapError
from mitaswap.models import open_model
for name in NAMES:
    try:
        open_model(name)
    except MitaswapError as error:
        print(error)
"""
    lines = run(
        f"NAMES = {list(fetched)}\n{code}",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
        TORCH_HOME=str(tmp_path),
    ).splitlines()
    for line, (name, what) in zip(lines, fetched.items(), strict=True):
        assert line.startswith(f"cannot fetch {what} for {name!r}: ")
        assert "give a local directory" in line


def test_sources_are_found_by_folder() -> None:
    assert SOURCES.names() == ["embedded", "hf", "hf-hub", "timm"]


@pytest.mark.parametrize(
    ("name", "arch", "says"),
    [
        ("tim:vit", None, "unknown model source 'tim'. Did you mean 'timm'"),
        ("no/such", None, "there is no directory 'no/such'. On the hub it would be hf:no/such."),
        ("/no/such/dir", None, "there is no directory '/no/such/dir'. Names are timm:NAME"),
        ("timm:vit_tiny(", None, "expected NAME or NAME(option=value, ...)"),
        ("no.safetensors", None, "there is no weights file 'no.safetensors'"),
        ("no.pth", TINY, "there is no weights file 'no.pth'"),
        (TINY, TINY, "only for bare weights files"),
        ("embedded:nothing", None, "unknown embedded model 'nothing'"),
    ],
)
def test_names_that_mean_nothing(name: str, arch: str | None, says: str) -> None:
    with pytest.raises(MitaswapError) as caught:
        open_model(name, arch=arch)
    assert says in str(caught.value)


def test_files_and_directories_of_no_library(tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"x")
    with pytest.raises(MitaswapError, match=r"w\.pth.*give --arch, for instance"):
        open_model(str(weights))
    with pytest.raises(MitaswapError, match=r"has no config\.json"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MitaswapError, match=r"cannot read .*config\.json"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(MitaswapError, match="must hold a JSON object, it holds a list"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        MitaswapError, match=r"neither 'model_type' \(hf\) nor 'architecture' \(timm\)"
    ):
        open_model(str(tmp_path))
    notes = tmp_path / "notes.txt"
    notes.write_text("x")
    with pytest.raises(MitaswapError, match="is a file, but not one of weights"):
        open_model(str(notes))


def test_directories_with_brackets_in_their_path(tmp_path: Path) -> None:
    out = open_model(TINY).save(tmp_path / "run (1, a=b)")
    assert open_model(str(out)).num_classes == 3


def test_a_prefix_is_stronger_than_a_directory_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    open_model(TINY).save("vit_tiny_patch16_224")
    assert open_model("vit_tiny_patch16_224").num_classes == 3
    assert open_model("timm:vit_tiny_patch16_224(pretrained=false)").num_classes == 1000


def test_embedded_networks_are_directories_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_source, "FOLDER", tmp_path)
    assert embedded_names() == []
    network = open_model(TINY)
    network.save(tmp_path / "digits-mita", extra_config={"mitaswap": {"trained_with": "mita"}})
    (tmp_path / "unfinished").mkdir()
    assert embedded_names() == ["digits-mita"]
    opened = open_model("embedded:digits-mita")
    assert opened.name == "embedded:digits-mita"
    assert opened.source == "timm"
    assert opened.config["mitaswap"] == {"trained_with": "mita"}
    assert (opened.logits(network.example()) == network.logits(network.example())).all()
    assert open_model("embedded:digits-mita(num_classes=7)").num_classes == 7
    with pytest.raises(MitaswapError, match="Did you mean 'digits-mita'"):
        open_model("embedded:digits-meta")


def test_legacy_config_of_a_timm_directory(tmp_path: Path) -> None:
    """Older hub exports hold one flat object."""
    out = open_model(TINY).save(tmp_path / "net")
    config = json.loads((out / "config.json").read_text())
    flat = {k: v for k, v in config["pretrained_cfg"].items() if k != "architecture"}
    (out / "config.json").write_text(json.dumps({"architecture": config["architecture"], **flat}))
    options = TINY[TINY.index("img_size") :]
    assert open_model(f"{out}({options}").num_classes == 3
