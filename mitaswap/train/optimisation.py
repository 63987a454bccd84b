"""Optimizer, schedule and loss of a run, from timm and torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

from mitaswap.errors import MitaswapError, unknown
from mitaswap.train.config import TrainConfig

_WARMUP_FROM = 1e-6

# Position embeddings and special tokens by the names that Hugging Face and older timm models give
# them; timm's current models declare theirs themselves (`no_weight_decay`).
_UNDECAYED = (
    "cls_token",
    "class_embedding",
    "dist_token",
    "distillation_token",
    "mask_token",
    "pos_embed",
    "position_embedding",
    "reg_token",
    "register_tokens",
    "relative_position_bias_table",
)


def undecayed(module: nn.Module) -> set[str]:
    """Names of the parameters without weight decay, besides all vectors (norms, biases).

    Those are the ones that any submodule declares through timm's `no_weight_decay()`, and those
    with the usual names of position embeddings and special tokens.
    """
    declared = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if callable(getattr(part, "no_weight_decay", None))
        for name in part.no_weight_decay()
    }
    return declared | {
        name for name, _ in module.named_parameters() if any(part in name for part in _UNDECAYED)
    }


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """timm's optimizer over the trainable parameters.

    Raises:
        MitaswapError: a name timm does not know, or cannot make here, one that needs second
            derivatives, nothing to train.
    """
    names = [str(name) for name in list_optimizers()]
    if config.opt.removeprefix("lookahead_") not in names:
        raise unknown("optimizer", config.opt, names)
    if not any(p.requires_grad for p in module.parameters()):
        raise MitaswapError(
            "nothing to train: every parameter of the model is frozen (requires_grad=False)."
        )
    groups = partial(
        param_groups_weight_decay,
        weight_decay=config.weight_decay,
        no_weight_decay_list=undecayed(module),
    )
    try:
        optimizer = create_optimizer_v2(
            module,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            param_group_fn=groups,
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise MitaswapError(
            f"timm cannot make the optimizer {config.opt!r}: {error}. "
            "Use one without requirements, such as 'adamw'."
        ) from None
    if getattr(optimizer, "is_second_order", False):
        raise MitaswapError(
            f"the optimizer {config.opt!r} needs second derivatives, which this loop does not take."
        )
    return optimizer


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int
) -> Any:
    """timm's schedule, to be stepped with `step_update(number of updates made)`."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        # A step schedule that decays by the factor 1 is constant, with timm's warm-up.
        sched="cosine" if config.sched == "cosine" else "step",
        decay_rate=1.0,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
        warmup_lr=min(_WARMUP_FROM, config.lr),
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def make_loss(config: TrainConfig, classes: int) -> tuple[nn.Module, Mixup | None]:
    """Cross-entropy with label smoothing, and the mixer of batches if one is asked for.

    The mixer turns labels into distributions that are smoothed already, so that the loss does not
    smooth again.
    """
    if not config.mixes:
        return nn.CrossEntropyLoss(label_smoothing=config.smoothing), None
    mixer = Mixup(
        config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=classes
    )
    return nn.CrossEntropyLoss(), mixer
