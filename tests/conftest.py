"""Fixtures that several files share: the command line in this process, and two tiny networks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # one process for each core: more threads would be in the way
    os.environ["OMP_NUM_THREADS"] = "1"


@dataclass(frozen=True)
class Done:
    """What a command left behind: its exit code and what it printed, with single spaces."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small are computed faster by one thread, above all on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> Command:
    """Run `mitaswap ...` in this process, 80 columns wide. An exception that would be a traceback
    comes through.
    """
    from mitaswap.cli import _app

    def command(*args: object) -> Done:
        for console in (_app.out, _app.err):
            monkeypatch.setattr(console, "width", 80)
        monkeypatch.setattr(sys, "argv", ["mitaswap", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            _app.main()
        printed = capsys.readouterr()
        return Done(int(end.value.code or 0), printed.out, printed.err)

    return command


@pytest.fixture(scope="session")
def tiny() -> str:
    """A timm ViT of 65 tokens (1 + 8 x 8), two layers and ten classes, with random weights."""
    return (
        "timm:vit_tiny_patch16_224(img_size=16,patch_size=2,embed_dim=24,depth=2,num_heads=2,"
        "num_classes=10,pretrained=false)"
    )


@pytest.fixture(scope="session")
def timm_dir(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """The same network as a directory, with weights at which mechanisms differ."""
    from networks import awaken

    from mitaswap.models import open_model

    network = open_model(tiny)
    awaken(network.module)
    return network.save(tmp_path_factory.mktemp("networks") / "tiny")


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of transformers as a directory: 17 tokens (1 + 4 x 4), two layers, ten classes."""
    import transformers
    from networks import awaken

    folder = tmp_path_factory.mktemp("networks") / "hfvit"
    fields: dict[str, Any] = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "image_size": 16, "patch_size": 4, "num_labels": 10,
    }  # fmt: skip
    config = transformers.ViTConfig(**fields)
    awaken(transformers.ViTForImageClassification(config)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return folder
