"""Networks of timm: registry names, the hub, and directories that timm wrote."""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from mitaswap.errors import MitaswapError, unknown
from mitaswap.models import _weights
from mitaswap.models._base import WRAPPERS, Network, Preprocess, Request, source
from mitaswap.models._open import read_config
from mitaswap.spec import Spec

if TYPE_CHECKING:
    from PIL.Image import Image

# timm keeps these with the weights, not with the architecture: no arguments of `create_model`.
DATA_OPTIONS = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
# timm takes an unknown crop mode for "center".
WORDS = {
    "crop_mode": ("center", "squash", "border"),
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
}


class TimmPreprocess(Preprocess):
    """timm's evaluation transform, without its normalisation.

    Args:
        data: what `timm.data.resolve_input_data_config` gives.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        from timm.data import create_transform

        self.data = dict(data)
        self.channels, *size = data["input_size"]
        if self.channels not in (1, 3):
            raise MitaswapError(f"images have 1 or 3 channels; the network takes {self.channels}")
        self.size = (size[0], size[1])
        self.mean = tuple(float(v) for v in data["mean"])
        self.std = tuple(float(v) for v in data["std"])
        self.crop_pct = float(data["crop_pct"])
        self.interpolation = str(data["interpolation"])
        self._transform = create_transform(**self.data, use_prefetcher=True)

    @property
    def key(self) -> str:
        fields = ["input_size", "crop_pct", "crop_mode", "interpolation"]
        if self.data["crop_mode"] == "border":
            fields.append("mean")  # the border has the mean's colour
        return "timm:" + json.dumps({name: self.data[name] for name in fields})

    def to_uint8(self, image: Image) -> Tensor:
        return self._transform(image.convert("L" if self.channels == 1 else "RGB"))


@dataclass(eq=False)
class TimmNetwork(Network):
    """A network of timm."""

    source: ClassVar[str] = "timm"

    def inputs(self, x: Tensor) -> Tensor:
        return x

    def _head(self, output: Any) -> Any:
        return output

    def _replace_head(self, classes: int) -> None:
        module: Any = self.module
        if not hasattr(module, "reset_classifier"):
            raise MitaswapError(
                f"{self.name!r} ({self.arch}) has no classification head to replace; the option "
                f"num_classes={classes} may add one"
            )
        module.reset_classifier(classes)

    def _write(self, folder: Path, state: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        # safetensors takes neither strided tensors nor two names for one storage
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
        _export_config(self.module, folder / "config.json", self.class_names)


@source("timm", config_key="architecture")
def open_timm(request: Request) -> Network:
    """`timm:NAME(option=value, ...)`, or a directory that timm wrote."""
    if request.directory is not None:
        config = read_config(request.directory)
        _check_name(str(config["architecture"]), f"in {str(request.directory / 'config.json')!r}")
        return _network(request, _create(request, f"local-dir:{request.directory}"), config)
    _check_name(request.spec.name)
    return _network(request, _create(request, request.spec.name))


@source("hf-hub")
def open_timm_hub(request: Request) -> Network:
    """`hf-hub:ORG/NAME`: a repository on the hub in timm's format."""
    from timm.models import load_model_config_from_hf

    try:
        load_model_config_from_hf(request.spec.name)
    except KeyError as error:
        raise MitaswapError(
            f"{request.given!r} is no timm repository (its config.json has no {error}); those of "
            "transformers are hf:NAME"
        ) from error
    except Exception as error:
        raise _explain(request, error, "config.json") from error
    return _network(request, _create(request, f"hf-hub:{request.spec.name}"))


def _wrap(module: nn.Module) -> Network | None:
    cfg = getattr(module, "pretrained_cfg", None)
    if not cfg or "architecture" not in cfg:
        return None
    name = str(cfg["architecture"])
    return _network(Request(name, Spec(name)), module)


WRAPPERS.append(_wrap)


def _check_name(name: str, where: str = "") -> None:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        kind = f"timm model {where}" if where else "model"
        raise unknown(
            kind.strip(),
            name,
            timm.list_models(),
            "`timm.list_models()` lists timm's; others: hf:NAME.",
        )
    tags = timm.list_models(f"{architecture}.*", pretrained=True) if tag else []
    if tag and name not in tags:
        raise unknown(
            f"pretrained tag of {architecture}",
            name,
            tags,
            "Without a tag, timm's default is taken.",
        )


def _create(request: Request, target: str) -> nn.Module:
    import timm

    options: dict[str, Any] = dict(request.spec.options)
    overlay: dict[str, Any] = {key: options.pop(key) for key in DATA_OPTIONS if key in options}
    for key, allowed in WORDS.items():
        if overlay.get(key, allowed[0]) not in allowed:
            raise unknown(f"{key} of {request.given!r}:", str(overlay[key]), allowed)
    if request.state is not None:
        # Handed to timm as the weights of the architecture, so that its own filter (other names of
        # the same parameters, another image size) applies. The class count must be the file's, or
        # timm would silently leave the head random.
        overlay.update(
            state_dict=dict(request.state), source=None, custom_load=False, label_offset=None
        )
        if "num_classes" in options:
            overlay["num_classes"] = options["num_classes"]
    pretrained = request.pretrained or request.state is not None
    if request.img_size is not None:
        options["img_size"] = request.img_size

    def create() -> nn.Module:
        return timm.create_model(
            target, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options
        )

    try:
        try:
            module = create()
        except TypeError as error:
            if request.img_size is None or "argument 'img_size'" not in str(error):
                raise
            del options["img_size"]  # convolutional at heart: it takes any size as it is
            module = create()
    except Exception as error:
        raise _explain(request, error) from error
    cfg: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]
    cfg.pop("state_dict", None)
    return module.eval()


def _network(
    request: Request, module: nn.Module, config: dict[str, Any] | None = None
) -> TimmNetwork:
    from timm.data import resolve_input_data_config
    from timm.models import get_model_input_config

    cfg: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]
    # The size the module was built for; for flexible models timm would take the published weights'.
    size = get_model_input_config(module)["input_size"]
    names = cfg.get("label_names")
    classes = int(getattr(module, "num_classes", 0))
    names = tuple(names.values() if isinstance(names, dict) else names) if names else None
    if names is not None and len(names) != classes:
        names = None  # another head than that of the published weights
    try:
        preprocess = TimmPreprocess(resolve_input_data_config(module, args={"input_size": size}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, MitaswapError):
            raise
        raise MitaswapError(
            f"timm does not take the preprocessing options of {request.given!r}: "
            f"{_weights.brief(error)}"
        ) from error
    network = TimmNetwork(
        module=module,
        name=request.given,
        arch=str(cfg["architecture"]),
        preprocess=preprocess,
        num_classes=classes,
        class_names=names,
        config=config or {},
    )
    if config is None:
        with tempfile.TemporaryDirectory() as folder:
            _export_config(module, Path(folder) / "config.json", names)
            network.config = read_config(Path(folder))
    return network


def _export_config(module: nn.Module, path: Path, class_names: tuple[str, ...] | None) -> None:
    from timm.models import get_model_input_config
    from timm.models._hub import save_config_for_hf

    data = {"input_size": get_model_input_config(module)["input_size"]}
    labels = {"label_names": list(class_names)} if class_names else None
    save_config_for_hf(module, str(path), model_config=labels, data_config=data)


def _explain(request: Request, error: Exception, what: str = "the weights") -> MitaswapError:
    """One message for whatever timm raised while it built a network or loaded its weights."""
    given = request.given
    argument = re.search(
        r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)
    )
    if argument:
        return unknown(f"option of {given!r}:", argument[2], _options_of(argument[1]))
    misfit = _weights.fits_badly(error)
    if misfit:
        return _weights.unfit(given, request.spec, misfit)
    if _weights.is_unreachable(error):
        return _weights.unreachable(given, what, error)
    if _weights.is_unreadable(error):
        return _weights.unreadable(given, request.directory or Path(request.spec.name), error)
    hint = " The option pretrained=false gives random weights." if request.pretrained else ""
    return MitaswapError(f"timm cannot open {given!r}: {_weights.brief(error)}{hint}")


def _options_of(class_name: str) -> set[str]:
    """What can be an option of a timm model, given the name of its class."""
    import timm

    allowed = {*inspect.signature(timm.create_model).parameters, *DATA_OPTIONS}
    allowed -= {
        "model_name",
        "kwargs",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
    }
    cls = getattr(timm.models, class_name, None)
    if cls is not None:
        allowed |= set(inspect.signature(cls.__init__).parameters) - {"self", "args", "kwargs"}
    return allowed
