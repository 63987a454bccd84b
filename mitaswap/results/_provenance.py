"""How the numbers of a process are made: versions, commit, platform, command line."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("mitaswap", "torch", "triton", "timm", "transformers", "numpy", "pandas")


def provenance(device: str, dtype: str, seed: int) -> dict[str, Any]:
    """What someone else needs to make the same numbers, as a JSON dict.

    Args:
        device: where it runs, in words ("cpu", "NVIDIA H100 80GB").
        dtype: number format of the forward passes ("float32", "bfloat16").
        seed: the run's seed.

    Returns:
        command, started (UTC, ISO 8601), device, dtype, seed, commit (None when unknown), platform,
        cpu_count and versions (package to version; Python's under "python").
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return {
        "command": shlex.join([name, *sys.argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "commit": _commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "versions": versions,
    }


def _commit() -> str | None:
    """The commit of this package's source, "-dirty" with local changes; None if unknown."""
    here = Path(__file__)

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # A virtual environment may lie inside somebody else's repository: its commit is not ours.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
