"""The seam's Hugging Face side: transformers' registry of attention functions, and our entry."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from mitaswap.errors import SwapError
from mitaswap.surgery.divert import divert

#: what the names of our functions in transformers' attention and mask registries begin with
INTERFACE = "mitaswap"
_numbers = itertools.count()
#: keywords that change what attention means and that the library's sdpa function passes over
_IGNORED = frozenset({"softcap", "s_aux", "sinks", "indices", "block_indices", "cu_seq_lens_q"})


def no_map(module: Any) -> SwapError:
    """The error for a swapped module that is asked for its attention map."""
    return SwapError(
        f"{module._mitaswap.site.path} is swapped to {module.mitaswap.spec}: there is no attention "
        "map to return; call without output_attentions=True, or mitaswap.revert(model) first."
    )


def has_interface(module: nn.Module) -> bool:
    """Whether `module` is a Hugging Face module that looks its attention function up in its
    config.
    """
    return uses_interface(type(module)) and getattr(module, "config", None) is not None


def uses_interface(cls: type[nn.Module]) -> bool:
    """The same of a class."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def shadow_config(config: Any, name: str) -> Any:
    """A copy of a Hugging Face config that names an attention function of ours; the model's own
    stays as it is.
    """
    shadow = copy.copy(config)
    name_in(shadow, name)
    return shadow


def name_in(shadow: Any, name: str) -> None:
    """Name an attention function in a shadow config."""
    # not through the property: its setter would also change the sub-configs, which the copy shares
    shadow._attn_implementation_internal = name


def is_shadow(config: Any) -> bool:
    """Whether this is a shadow config."""
    return str(getattr(config, "_attn_implementation", "")).startswith(INTERFACE)


@functools.cache
def _collector() -> Any:
    """What transformers collects outputs in when output_attentions=True was asked of the model and
    stays there: some models do not hand it down to their layers, transformers collects the maps by
    hooks. None in versions that hand it down.
    """
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return None
    return getattr(output_capturing, "_active_collector", None)


@functools.cache
def interface(attend: Callable[..., Tensor]) -> str:
    """The name of our function in transformers' registry of attention functions that goes to
    `attend`; entered there when it is first asked for, and sdpa's masks beside it.

    Without the second, transformers drops padding masks for a name it does not know. A function of
    one name for all would have to read `attend` from each module.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    diverted = divert(sdpa_attention_forward, attend)
    if diverted is None:
        raise SwapError(
            "this version of transformers computes sdpa attention in a way mitaswap does not know; "
            "install the version that mitaswap's README names"
        )

    collector = _collector()

    def attention(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        # a compiled forward would be guarded on the answers, in each layer; and context variables
        # cannot be traced
        compiling = is_compiling()
        if not compiling:
            if not hasattr(type(module), "_mitaswap_way"):
                raise SwapError(
                    f"a {type(module).__name__} that is not swapped was built from the config of "
                    "one that is; build it from the model's own config"
                )
            collected = None if collector is None else collector.get()
            if collected is not None and any("attentions" in key for key in collected):
                raise no_map(module)
        if kwargs.get("output_attentions"):
            raise no_map(module)
        if compiling or not _IGNORED.isdisjoint(kwargs):
            for name in kwargs:
                if name in _IGNORED and kwargs[name] is not None:
                    raise SwapError(
                        f"{module._mitaswap.site.path}: this forward brings {name}, which "
                        f"{module.mitaswap.spec} cannot honour; leave this layer out with "
                        "layers=..., or mitaswap.revert(model) first."
                    )
        return diverted(module, *args, **kwargs)

    name = f"{INTERFACE}-{next(_numbers)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
