"""From a name to the library that serves it: prefixes, directories and bare weights files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from mitaswap.errors import MitaswapError, unknown
from mitaswap.models._base import CONFIG_KEYS, SOURCES, WRAPPERS, Network, Request
from mitaswap.models._weights import is_weights_file, read_weights
from mitaswap.spec import Spec

FORMS = (
    "Names are timm:NAME, hf:NAME, hf-hub:ORG/NAME, embedded:NAME, a local directory of timm or "
    "transformers, or a weights file with --arch."
)


def open_model(
    name: str,
    *,
    arch: str | None = None,
    pretrained: bool | None = None,
    trust_remote_code: bool = False,
    img_size: tuple[int, int] | None = None,
) -> Network:
    """The network that a name means, on the CPU and in eval mode.

    Args:
        name: one of
            `timm:NAME(option=value, ...)`, options as in `timm.create_model` (img_size=32,
            num_classes=10) or as timm's data flags (mean, std, crop_pct, crop_mode, interpolation);
            a plain NAME of timm means the same;
            `hf:NAME_OR_DIR(option=value, ...)`, options override fields of the configuration;
            `hf-hub:ORG/NAME`, a timm model on the hub;
            `embedded:NAME`, one of the small networks that come with the package;
            a local directory that timm or transformers wrote;
            a bare `.safetensors`, `.pth`, `.pt` or `.bin` file, with `arch`.
        arch: the network that a bare weights file belongs to, in any of the other forms.
        pretrained: whether to load weights; None means yes, unless the name has the option
            `pretrained=false`.
        trust_remote_code: whether code that comes with the weights may run.
        img_size: height and width in pixels of the images that the network will be run on. timm
            builds it for them, with its position embeddings resampled; a network of transformers,
            or one of timm that is made for any size, stays as it is.

    Raises:
        MitaswapError: no such network; options it does not have; weights that are missing, broken
            or do not fit; the hub cannot be reached.
    """
    if img_size is not None and min(img_size) < 1:
        raise MitaswapError(
            f"the image size {img_size[0]} x {img_size[1]} is impossible: height and width must be "
            "at least 1 pixel"
        )
    request = Request(name, Spec(name), trust_remote_code=trust_remote_code, img_size=img_size)
    if is_weights_file(name) and not Path(name).is_dir():
        if arch is None and Path(name).is_file():
            raise MitaswapError(
                f"{name!r} holds weights but not which network they belong to: give --arch, for "
                "instance --arch 'timm:vit_tiny_patch16_224(num_classes=10)'"
            )
        request = replace(request, state=read_weights(Path(name)))
        return _open(arch or "", request)
    if arch is not None:
        raise MitaswapError(
            f"--arch {arch!r} is only for bare weights files (.safetensors, .pth, .pt, .bin); "
            f"{name!r} names its own network"
        )
    return _open(name, request, pretrained)


def wrap(module: nn.Module) -> Network:
    """What is known about a bare module of timm or transformers, as a `Network`.

    Raises:
        MitaswapError: it was made by neither.
    """
    SOURCES.names()  # imports the libraries' files
    for wrapper in WRAPPERS:
        network = wrapper(module)
        if network is not None:
            return network
    raise MitaswapError(
        f"a {type(module).__name__} is neither timm's nor transformers', so there is no "
        "configuration to keep with its weights; save its state_dict with safetensors instead"
    )


def open_directory(directory: Path, request: Request) -> Network:
    """The network in a local directory, by the library whose config.json it has.

    Raises:
        MitaswapError: no config.json, a broken one, or one of neither library.
    """
    SOURCES.names()  # fills CONFIG_KEYS
    config = read_config(directory)
    for key, source_name in CONFIG_KEYS.items():
        if key in config:
            spec = Spec(str(directory), request.spec.options)
            network = SOURCES.get(source_name)(replace(request, spec=spec, directory=directory))
            network.directory = directory
            return network
    keys = " nor ".join(f"{key!r} ({library})" for key, library in CONFIG_KEYS.items())
    raise MitaswapError(
        f"{str(directory / 'config.json')!r} has neither {keys}, so it is of no known library"
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a directory's config.json."""
    path = directory / "config.json"
    if not path.is_file():
        raise MitaswapError(
            f"the directory {str(directory)!r} has no config.json, so it is no saved network. A "
            "weights file inside it can be opened by itself, with --arch."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MitaswapError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(config, dict):
        raise MitaswapError(
            f"{str(path)!r} must hold a JSON object, it holds a {type(config).__name__}"
        )
    return config


def _open(text: str, request: Request, pretrained: bool | None = None) -> Network:
    sources = SOURCES.names()
    head, colon, tail = text.partition(":")
    prefix, rest = (head, tail) if colon and head in sources else ("", text)
    # A path may hold brackets; what exists is not parsed.
    spec = Spec(rest) if Path(rest).exists() else Spec.parse(rest)
    options = dict(spec.options)
    wanted = options.pop("pretrained", True)
    if not isinstance(wanted, bool):
        raise MitaswapError(
            f"the option pretrained of {text!r} must be true or false, not {wanted!r}"
        )
    request = replace(
        request,
        spec=Spec(spec.name, options),
        pretrained=wanted if pretrained is None else pretrained,
    )
    if prefix:
        return SOURCES.get(prefix)(request)
    if Path(spec.name).is_dir():
        return open_directory(Path(spec.name), request)
    if Path(spec.name).exists():
        raise MitaswapError(f"{spec.name!r} is a file, but not one of weights. {FORMS}")
    if colon and re.fullmatch(r"[\w-]+", head):
        raise unknown("model source", head, sources, FORMS)
    if "/" in spec.name or "\\" in spec.name:
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", spec.name)
        hint = f" On the hub it would be hf:{spec.name}." if hub else ""
        raise MitaswapError(f"there is no directory {spec.name!r}.{hint} {FORMS}")
    return SOURCES.get("timm")(request)
