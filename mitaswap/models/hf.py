"""Networks of Hugging Face transformers: names on the hub and directories of `save_pretrained`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mitaswap.errors import MitaswapError, unknown
from mitaswap.models import _weights
from mitaswap.models._base import WRAPPERS, Network, Preprocess, Request, source
from mitaswap.models._open import read_config
from mitaswap.models._processor import HfPreprocess, load_processor, native_size

logger = logging.getLogger(__name__)

# Keys that other parts of the program add to config.json. transformers would take them for fields
# of its own and write them back, so that a network that has been reverted would still claim them.
FOREIGN_KEYS = ("mitaswap",)


@dataclass(eq=False)
class HfNetwork(Network):
    """A network of transformers; a classification head that its weights lack counts as none."""

    source: ClassVar[str] = "hf"

    def inputs(self, x: Tensor) -> dict[str, Any]:
        options: dict[str, Any] = {}
        size = native_size(self.module.config)
        # Families with learned positions refuse other sizes unless told to interpolate them.
        if size is not None and tuple(x.shape[-2:]) != size:
            parameters = inspect.signature(type(self.module).forward).parameters
            if "interpolate_pos_encoding" in parameters or "kwargs" in parameters:
                options["interpolate_pos_encoding"] = True
        return {"pixel_values": x, **options}

    def _head(self, output: Any) -> Any:
        return getattr(output, "logits", output)

    def _replace_head(self, classes: int) -> None:
        module: Any = self.module
        heads = _head_names(module)
        if not heads:
            raise MitaswapError(
                f"{self.name!r} ({type(module).__name__}) has no classification head to replace: "
                "transformers has no image classifier of this architecture"
            )
        for name in heads:
            old = module.get_submodule(name)
            like = {"device": old.weight.device, "dtype": old.weight.dtype}
            new = nn.Linear(old.in_features, classes, bias=old.bias is not None, **like)
            # as transformers draws the head of a new network
            nn.init.normal_(new.weight, std=getattr(module.config, "initializer_range", 0.02))
            if new.bias is not None:
                nn.init.zeros_(new.bias)
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, new)
        module.config.num_labels = classes  # with it the names of the classes
        if hasattr(module, "num_labels"):
            module.num_labels = classes

    def _write(self, folder: Path, state: dict[str, Tensor]) -> None:
        if not self.num_classes:
            # The class of the module has a head, but a random one; as it came, so it goes.
            state = {
                k: v for k, v in state.items() if k.split(".")[0] not in _head_names(self.module)
            }
        config: Any = self.module.config
        if self.class_names:
            config.id2label = dict(enumerate(self.class_names))
            config.label2id = {label: i for i, label in enumerate(self.class_names)}
        with _no_bars():
            self.module.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
        assert isinstance(self.preprocess, HfPreprocess)
        self.preprocess.processor.save_pretrained(folder)


@source("hf", config_key="model_type")
def open_hf(request: Request) -> Network:
    """`hf:NAME_OR_DIR(option=value, ...)`, or a directory that transformers wrote."""
    name = request.spec.name
    directory = request.directory or (Path(name) if Path(name).is_dir() else None)
    options = dict(request.spec.options)
    config = _config(request, name, options)
    # For a directory the file itself, because transformers adds its defaults to what it reads.
    raw = read_config(directory) if directory is not None else config.to_dict()
    for key in FOREIGN_KEYS:
        if hasattr(config, key):
            delattr(config, key)
    with _no_bars():
        module, headless = _module(request, name, config, new_head="num_labels" in options)
    network = _network(
        request.given,
        module.eval(),
        load_processor(
            name, directory, config, options.get("image_size"), request.trust_remote_code
        ),
        raw,
        headless,
    )
    network.directory = directory
    return network


def _network(
    name: str, module: Any, preprocess: Preprocess, raw: dict[str, Any], headless: bool
) -> HfNetwork:
    config = module.config
    labels = getattr(config, "id2label", None) or {}
    names = tuple(str(labels[i]) for i in sorted(labels))
    if headless or all(label == f"LABEL_{i}" for i, label in enumerate(names)):
        names = ()
    return HfNetwork(
        module=module,
        name=name,
        arch=str(config.model_type),
        preprocess=preprocess,
        num_classes=0 if headless else int(config.num_labels),
        class_names=names or None,
        config=raw,
    )


def _wrap(module: nn.Module) -> Network | None:
    config: Any = getattr(module, "config", None)
    if not hasattr(module, "save_pretrained") or not getattr(config, "model_type", None):
        return None
    name = str(getattr(config, "name_or_path", ""))
    directory = Path(name) if Path(name).is_dir() else None
    headless = "ForImageClassification" not in type(module).__name__
    preprocess = load_processor(name, directory, config, None, False)
    return _network(name or config.model_type, module, preprocess, config.to_dict(), headless)


WRAPPERS.append(_wrap)


def _config(request: Request, name: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=request.trust_remote_code)
    except Exception as error:
        raise _explain(request, error, "config.json") from error
    if config.model_type == "timm_wrapper":
        raise MitaswapError(
            f"{request.given!r} is a timm network: open it as hf-hub:{name}, or by its directory"
        )
    parts: list[Any] = [
        part for part in (config, getattr(config, "vision_config", None)) if part is not None
    ]
    for key, value in options.items():
        owner = next((part for part in parts if key == "num_labels" or key in part.to_dict()), None)
        if owner is None:
            allowed = {field for part in parts for field in part.to_dict()} | {"num_labels"}
            raise unknown(f"option of {request.given!r}:", key, allowed - set(FOREIGN_KEYS))
        try:
            setattr(owner, key, list(value) if isinstance(value, tuple) else value)
        except Exception as error:  # transformers validates fields with an exception of its own
            raise MitaswapError(f"{request.given!r}: {_weights.brief(error)}") from error
    return config


def _module(request: Request, name: str, config: Any, new_head: bool) -> tuple[nn.Module, bool]:
    """The module, and whether it has no classification head worth the name."""
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        AutoModel,
        AutoModelForImageClassification,
    )

    remote = getattr(config, "auto_map", None) if request.trust_remote_code else None
    classifies = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if remote:
        classifies = "AutoModelForImageClassification" in remote
    if getattr(config, "architectures", None) is None:
        config.architectures = []  # the auto classes iterate over it where a family has two classes
    auto = AutoModelForImageClassification if classifies else AutoModel
    # Only through the sdpa interface does attention pass the one call that can be exchanged.
    try:
        return _load(request, name, config, auto, new_head, "sdpa")
    except ValueError as error:
        if isinstance(error, MitaswapError):
            raise
        if "attention implementation" not in str(error):
            raise _explain(request, error, "the weights") from error
        logger.warning("%s has no sdpa attention: %s", request.given, _weights.brief(error))
        return _load(request, name, config, auto, new_head, None)


def _load(
    request: Request, name: str, config: Any, auto: Any, new_head: bool, attention: str | None
) -> tuple[nn.Module, bool]:
    wishes: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    wishes["trust_remote_code"] = request.trust_remote_code
    headless = not auto.__name__.endswith("ImageClassification")
    try:
        if request.state is None and not request.pretrained:
            return auto.from_config(config, dtype=torch.float32, **wishes), headless
        if request.state is not None:
            # The class that the configuration means, so that the state dict needs no directory.
            cls = type(auto.from_config(config, **wishes))
            wishes.pop("trust_remote_code")
            load, wishes["state_dict"] = cls.from_pretrained, dict(request.state)
            source_name = None
        else:
            load, source_name = auto.from_pretrained, name
        # Mismatches are collected instead of raised: the message below names the keys.
        module, info = load(
            source_name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **wishes,
        )
    except ValueError as error:
        if "attention implementation" in str(error):
            raise
        raise _explain(request, error, "the weights") from error
    except Exception as error:
        raise _explain(request, error, "the weights") from error
    lost_head = _check(request, module, info, new_head)
    return module, headless or lost_head


def _check(request: Request, module: nn.Module, info: dict[str, Any], new_head: bool) -> bool:
    """Refuse weights that leave a part of the network random; tell whether only the head is."""
    # A weights file belongs to this very network, head included.
    heads = set() if request.state is not None else _head_names(module)
    missing = {str(key) for key in info["missing_keys"]}
    shapes = {
        entry[0] if isinstance(entry, tuple) else str(entry) for entry in info["mismatched_keys"]
    }
    head = {key for key in missing | shapes if key.split(".")[0] in heads}
    wrong_head = set() if new_head else head & shapes
    # A weights file must match in every key. What else a published checkpoint holds (text towers,
    # decoders) is left out, as transformers does.
    unexpected = sorted(info["unexpected_keys"]) if request.state is not None else []
    bad_missing, bad_shapes = sorted(missing - head), sorted((shapes - head) | wrong_head)
    if bad_missing or bad_shapes or unexpected:
        what = _weights.misfit(bad_missing, unexpected, bad_shapes)
        raise _weights.unfit(request.given, request.spec, what)
    if head:
        logger.warning(
            "%s: the classification head is new and random (%s)",
            request.given,
            ", ".join(sorted(head)),
        )
    return bool(head) and not new_head


def _head_names(module: nn.Module) -> set[str]:
    """The heads of a transformers classifier: linear layers beside the backbone."""
    return {name for name, child in module.named_children() if isinstance(child, nn.Linear)}


def _explain(request: Request, error: Exception, what: str) -> MitaswapError:
    given = request.given
    if request.spec.name.startswith(("/", ".", "~")):  # no name on the hub begins so
        place = Path(request.spec.name)
        if not place.exists():
            return MitaswapError(f"{given!r}: there is no directory {str(place)!r}")
    if _weights.is_unreachable(error):
        return _weights.unreachable(given, what, error)
    if "trust_remote_code" in str(error):
        return MitaswapError(
            f"{given!r} comes with code of its own, which is not run. If you trust its author, ask "
            "for it with --trust-remote-code (trust_remote_code=True)."
        )
    if _weights.is_unreadable(error):
        return _weights.unreadable(given, Path(request.spec.name), error)
    hint = " The option pretrained=false gives random weights." if request.pretrained else ""
    return MitaswapError(f"transformers cannot open {given!r}: {_weights.brief(error)}{hint}")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars that transformers draws even for a file of kilobytes."""
    from transformers.utils import logging as upstream

    shown = upstream.is_progress_bar_enabled()
    upstream.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            upstream.enable_progress_bar()
