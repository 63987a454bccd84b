"""The README's commands and Python, and the examples, run as they are written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mitaswap.cli import app
from mitaswap.cli._app import load_verbs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "".join(blocks("sh")).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("mitaswap ")]


def test_every_command_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_verbs()
    assert len(commands()) >= 8
    for command in commands():
        result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["out"].shape == (1, 6, 257, 64)  # type: ignore[attr-defined]


def test_the_demo_ends_with_a_report(tmp_path: Path) -> None:
    """`make demo` after the install, on fewer images and a smaller grid."""
    program = tmp_path / "mitaswap"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mitaswap "$@"\n')
    program.chmod(0o755)
    settings = {
        "MITASWAP": str(program),
        "OUT": str(tmp_path / "run"),
        "REPORT": str(tmp_path / "report"),
        "LIMIT": "20",
        "KEYS": "9,25",
        "EXPERTS": "9,25",
    }
    subprocess.run(
        ["sh", str(ROOT / "examples" / "demo.sh")], env={**os.environ, **settings}, check=True
    )
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<svg" in page or "data:image/svg" in page


def test_the_readme_links_to_files_that_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
