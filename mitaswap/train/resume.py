"""What a run leaves on disk after each epoch: `last.pt` to go on from, `log.csv` for people."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from mitaswap.checkpoint import TRAINING, fingerprint
from mitaswap.errors import MitaswapError

if TYPE_CHECKING:
    from mitaswap.data import ImageSet
    from mitaswap.models import Network
    from mitaswap.train.config import TrainConfig

LAST, LOG = TRAINING
LOG_COLUMNS = ("epoch", "lr", "train_loss", "top1", "top5", "val_loss", "images_per_s", "seconds")
_FINAL_FILES = ("model.safetensors", "config.json")


def describe(
    network: Network, config: TrainConfig, sets: Iterable[ImageSet], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides what a run computes, by dotted name: the run's identity.

    Args:
        network: its name, size, preprocessing, parameters, structure (the module's `repr`, without
            addresses) and the weights to start from count.
        config: the settings but those that only say where it runs.
        sets: the training and the validation set, in this order; their content counts.
        extra: what else the caller wants to be equal in a continued run.
    """
    module = network.module
    found: dict[str, Any] = {f"config.{name}": value for name, value in config.identity().items()}
    found |= {
        "model.name": network.name,
        "model.arch": network.arch,
        "model.classes": network.num_classes,
        "model.input_size": tuple(network.preprocess.size),
        "model.preprocess": repr(network.preprocess),
        "model.parameters": sum(p.numel() for p in module.parameters()),
        "model.trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "model.structure": re.sub(r" at 0x[0-9a-f]+", "", str(module)),
        "model.weights": fingerprint(network),
    }
    for role, images in zip(("train", "val"), sets, strict=True):
        found |= {
            f"{role}.set": images.name,
            f"{role}.split": images.split,
            f"{role}.images": len(images),
            f"{role}.content": images.fingerprint(),
        }
    return found | dict(extra)


def read_last(directory: Path) -> dict[str, Any] | None:
    """The state after the last finished epoch, on the CPU; None in a directory without a run.

    Raises:
        MitaswapError: a broken file, or a directory that holds a finished model of other origin, or
            anything else that no training run left there.
    """
    path = directory / LAST
    if directory.exists() and not directory.is_dir():
        raise MitaswapError(f"{directory} is a file. Choose a directory for the run.")
    if not path.exists():
        taken = [name for name in _FINAL_FILES if (directory / name).exists()]
        if taken:
            raise MitaswapError(
                f"{directory} holds a model ({', '.join(taken)}) that no training run left there "
                f"({LAST} is missing). Choose another directory."
            )
        # a run that was killed in the middle of writing its first epoch is no obstacle
        mine = {LOG, f"{LOG}.partial", f"{LAST}.partial"}
        files = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
        foreign = [name for name in files if name not in mine]
        if foreign:
            raise MitaswapError(
                f"{directory} holds files that no training run left there ({foreign[0]}"
                + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else "")
                + "), and the run might replace some. Choose a new or an empty directory."
            )
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"identity", "epoch", "model", "optimizer", "history"} <= state.keys():
            raise ValueError("it is no training state")
    except Exception as error:  # torch.load raises half a dozen types for one and the same cause
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MitaswapError(
            f"cannot read {path}: {reason.rstrip('.')}. Delete it to start the run afresh, or "
            "choose another directory."
        ) from None
    return state


def check_same_run(directory: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `MitaswapError` that lists what differs, unless both identities are equal."""
    lines = [
        _difference(name, before.get(name, "absent"), now.get(name, "absent"))
        for name in sorted({*before, *now})
        if before.get(name, "absent") != now.get(name, "absent")
    ]
    if lines:
        raise MitaswapError(
            f"{directory} holds a training run of another command: {'; '.join(lines)}. Choose "
            "another directory, or repeat the former settings to go on."
        )


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write `log.csv` and then `last.pt`, each whole or not at all.

    Raises:
        MitaswapError: the disk is full or the directory cannot be written; the former files are
            intact, and where there were none there is no new directory.
    """
    first = not (directory / LAST).exists()
    made = [path for path in (directory, *directory.parents) if not os.path.exists(path)]

    def write_log(file: IO[bytes]) -> None:
        file.write(_csv(state["history"]).encode())

    try:
        _replace(directory / LOG, write_log)
        _replace(directory / LAST, lambda file: torch.save(dict(state), file))
    except BaseException:
        if first:
            with contextlib.suppress(OSError):
                (directory / LOG).unlink(missing_ok=True)
                for path in made:
                    path.rmdir()
        raise


def _replace(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        why: object = error
        if isinstance(error, RuntimeError):  # what torch.save makes of a full disk
            why = f"the disk is full, it seems ({str(error).splitlines()[0]})"
        raise MitaswapError(
            f"cannot write {path}: {why}. What was there before is intact; free some space or "
            "mend the permissions, then repeat the command to go on after the last finished epoch."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, LOG_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, str) and isinstance(now, str) and "\n" in before + now:
        old, new = before.splitlines(), now.splitlines()
        first = next(
            (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
            min(len(old), len(new)),
        )
        before, now = (lines[first].strip() if first < len(lines) else "" for lines in (old, new))
        name = f"{name} (from line {first + 1} on)"
    return f"{name} was {before!r}, is now {now!r}"
