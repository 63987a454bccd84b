"""Modules whose attention call must not be taken at face value, by class name, with the reason.

Everything else is judged by what the dry forward shows. A name is the class of the module or of a
base class, with the last part of its Python module in front where the bare name is ambiguous.
"""

from __future__ import annotations

from torch import nn

#: classes never to swap -> why
REFUSED: dict[str, str] = {
    "davit.ChannelAttention": "channel attention",
    "davit.ChannelAttentionV2": "channel attention",
    "edgenext.CrossCovarianceAttn": "channel attention",
    "xcit.XCA": "channel attention: its map is head dim x head dim, not token x token",
    "modeling_florence2.Florence2VisionChannelAttention": "channel attention",
    "cait.ClassAttn": "class attention: one query, already linear in the number of tokens",
    "volo.ClassAttention": "class attention: one query, already linear in the number of tokens",
    "crossvit.CrossAttention": "class attention: one query, already linear in the number of tokens",
    "hiera.MaskUnitAttention": "its tokens are in unroll order, not in raster order",
    "csatv2.SpatialTransformerBlock": "attention over the batch axis",
    "diff_attention.DiffAttention": "differential attention: two softmax maps are subtracted",
    "vision_transformer.DiffParallelScalingBlock": "differential attention: two softmax maps are "
    "subtracted",
    "modeling_pixtral.PixtralAttention": "several images packed in one sequence",
    "modeling_vit_mae.ViTMAEAttention": "its tokens are shuffled and partly dropped",
}

#: Hugging Face configs with special tokens behind the patches: model_type -> attribute with their
#: number, or a number
SUFFIX: dict[str, str | int] = {"yolos": "num_detection_tokens", "llama4_vision_model": 1}


def refusal(module: nn.Module) -> str | None:
    """Why this module must not be swapped, or None."""
    for cls in type(module).__mro__:
        reason = REFUSED.get(f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}")
        if reason:
            return reason
    return None


def suffix_tokens(model: nn.Module, site: nn.Module) -> int | None:
    """Number of special tokens behind the patches of `site`, by its own config or the model's;
    None for networks that are not in the table.
    """
    config = getattr(site, "config", None) or getattr(model, "config", None)
    entry = SUFFIX.get(getattr(config, "model_type", ""))
    return int(getattr(config, entry)) if isinstance(entry, str) else entry
