"""Reading weights from files, and telling why reading or fitting them failed.

Nothing here runs code from a file.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mitaswap.errors import MitaswapError
from mitaswap.spec import Spec

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar")

# By name, because the libraries that define them (and which of them are installed) vary.
_UNREADABLE = {"SafetensorError", "EOFError", "UnpicklingError", "BadZipFile"}
_UNREACHABLE = {
    "HfHubHTTPError",
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "RepositoryNotFoundError",
    "URLError",
    "ConnectionError",
    "TimeoutError",
    "TransportError",
    "RequestException",
}


def is_weights_file(name: str) -> bool:
    """Whether a name ends as a file of weights does."""
    return name.lower().endswith(WEIGHT_SUFFIXES)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a bare file, by parameter name.

    Wrappers of training scripts (`{"model": ...}`, `{"state_dict": ...}`) and the prefix `module.`
    are removed; averaged weights beside the plain ones are not taken.

    Raises:
        MitaswapError: there is no such file, or it is empty, truncated, no mapping of tensors, or
            needs code to run.
    """
    if not path.is_file():
        raise MitaswapError(f"there is no weights file {str(path)!r}")
    if path.stat().st_size == 0:
        raise MitaswapError(f"the weights file {str(path)!r} is empty (0 bytes)")
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:
        # Whatever a broken file makes the reader do, the cause is the file.
        raise MitaswapError(f"cannot read the weights file {str(path)!r}: {_why(error)}") from error
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        found = f"it also holds {_few(strange)}" if strange else "it holds none"
        raise MitaswapError(
            f"the weights file {str(path)!r} must map parameter names to tensors; {found}"
        )
    return state


def _why(error: Exception) -> str:
    """What is wrong with a file and what to do; readers advise what this program does not do."""
    blocked = re.search(r"Unsupported globals: (.*?)\. |GLOBAL (\S+)", str(error))
    if blocked or "weights_only" in str(error):
        what = f" ({next(filter(None, blocked.groups()))})" if blocked else ""
        return (
            f"besides tensors it holds objects{what} that only running code from the file would "
            "make. Where you trust it, save its weights alone: torch.save(model.state_dict(), "
            "FILE)."
        )
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return f"{error.strerror}."
    # torch's zip reader looks for what was cut off: an invalid argument
    reason = "" if isinstance(error, (OSError, KeyError, EOFError)) else f" ({_first(error)})"
    return f"it is truncated, broken or no file of weights{reason}. Fetch it again."


def _first(error: BaseException) -> str:
    return re.split(r"\. |, expected", brief(error))[0].rstrip(".")


def fits_badly(error: Exception) -> str | None:
    """What torch's `load_state_dict` complained about, a few keys of each kind, or None."""
    text = str(error)
    if "Error(s) in loading state_dict" not in text:
        return None
    parts = []
    for kind in ("Missing key(s)", "Unexpected key(s)"):
        for listed in re.findall(re.escape(kind) + r" in state_dict: (.*)", text):
            names = re.findall(r'"([^"]+)"', listed)
            parts.append(f"{'missing' if kind.startswith('M') else 'unexpected'} {_few(names)}")
    shapes = re.findall(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", text)
    if shapes:
        parts.append(
            "of another shape "
            + _few([f"{n} [{given}] for [{wanted}]" for n, given, wanted in shapes])
        )
    return "; ".join(parts) or brief(error)


def misfit(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    """The same as a sentence, from lists of parameter names."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{kind} {_few(names)}" for kind, names in kinds if names)


def is_unreachable(error: BaseException) -> bool:
    """Whether an error comes from the hub: not reached, or without what was asked for."""
    return any(_is_named(each, _UNREACHABLE) for each in _chain(error))


def is_unreadable(error: BaseException) -> bool:
    """Whether the cause of an error is a broken weights file."""
    return any(_is_named(e, _UNREADABLE) or "PytorchStreamReader" in str(e) for e in _chain(error))


def unreachable(name: str, what: str, error: Exception) -> MitaswapError:
    """The error for something that the hub did not give."""
    return MitaswapError(
        f"cannot fetch {what} for {name!r}: {brief(error)} Without network, give a local directory "
        "that timm or transformers saved, or a weights file with --arch; the option "
        "pretrained=false gives random weights."
    )


def unreadable(name: str, folder: Path, error: Exception) -> MitaswapError:
    """The error for weights in `folder` that are truncated or no weights at all."""
    files = sorted(f.name for f in folder.glob("*") if is_weights_file(f.name))
    return MitaswapError(
        f"cannot read the weights of {name!r} ({', '.join(files) or 'cached from the hub'}): "
        f"{brief(error)} The file is truncated or broken."
    )


def unfit(name: str, spec: Spec, what: str) -> MitaswapError:
    """The error for weights of another network than the one that was built."""
    return MitaswapError(
        f"the weights of {name!r} do not fit {spec}: {what}. Give the options that they were "
        "trained with (number of classes, image size), or pretrained=false for random weights."
    )


def brief(error: BaseException) -> str:
    """The first line of an error's text, closed with a full stop."""
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else type(error).__name__
    line = line if len(line) <= 300 else line[:297] + "..."
    return line if line.endswith((".", "!", "?")) else line + "."


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _is_named(error: BaseException, names: set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
