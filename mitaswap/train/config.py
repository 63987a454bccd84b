"""What a training run is made of, as one value that is checked before any work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from mitaswap.errors import MitaswapError, unknown

SCHEDULES = ("constant", "cosine")
PRECISIONS = ("auto", "bf16", "none")

# Where and how fast a run goes, not what it computes: these may change between a run and its
# continuation.
PLACE_FIELDS = frozenset({"device", "workers", "log_interval"})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Args:
        epochs: passes over the training set.
        batch_size: images per update. The rest of an epoch that fills no batch is left out.
        lr: peak learning rate as it reaches the optimizer (absolute, not scaled by the batch size).
        min_lr: learning rate at the end of the cosine.
        warmup_epochs: epochs (may be fractional) of linear rise from 1e-6, or from `lr` if that is
            lower; they count as part of `epochs`.
        weight_decay: decoupled weight decay of matrices; norms, biases, position embeddings and
            special tokens have none.
        opt: name of a timm optimizer.
        sched: "cosine" or "constant", per update, after the warm-up.
        clip_grad: largest global gradient norm, or None.
        smoothing: label smoothing, the probability mass spread over all classes.
        amp: "bf16" (autocast; weights stay float32), "none", or "auto": bf16 on a GPU that has it,
            else none.
        seed: of shuffling, augmentation, dropout and mixing. Weights are drawn before, when the
            model is opened.
        no_aug: train on the very pixels that evaluation sees. They are decoded once and kept on the
            device.
        aug: timm auto-augment string ("rand-m9-mstd0.5-inc1", "augmix-m3", ...), or None. Replaces
            colour jitter.
        scale: smallest and largest crop, as fractions of the image's area.
        ratio: smallest and largest aspect ratio (width / height) of the crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength of brightness, contrast and saturation jitter; 0 for none.
        reprob: probability that a rectangle of the image is erased (filled with noise).
        mixup: alpha of mixup, 0 for none. Works with `no_aug` too, as do all that mix whole
            batches.
        cutmix: alpha of CutMix, 0 for none. With mixup too, each batch takes one of the two by the
            toss of a coin.
        eval_every: epochs between two validations; the last epoch is always validated.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        workers: processes that decode and augment images. Their number changes no result.
        log_interval: updates between two calls of `progress`, which also look for a non-finite
            loss.

    Raises:
        MitaswapError: a value outside its range; all such values are named.
    """

    epochs: int = 30
    batch_size: int = 256
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_epochs: float = 2
    weight_decay: float = 0.05
    opt: str = "adamw"
    sched: str = "cosine"
    clip_grad: float | None = 1.0
    smoothing: float = 0.1
    amp: str = "auto"
    seed: int = 0
    no_aug: bool = False
    aug: str | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.4
    reprob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    eval_every: int = 1
    device: str = "auto"
    workers: int = 4
    log_interval: int = 50

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.sched not in SCHEDULES:
            raise unknown("schedule", self.sched, SCHEDULES)
        if self.amp not in PRECISIONS:
            raise unknown("precision (amp)", self.amp, PRECISIONS)
        broken = [
            f"{name}={getattr(self, name)!r} ({rule})"
            for name, rule, kept in self._rules()
            if not kept
        ]
        if broken:
            raise MitaswapError(f"impossible training settings: {'; '.join(broken)}.")

    def _rules(self) -> list[tuple[str, str, bool]]:
        """(field, what it must be, whether it is so); comparisons that NaN fails."""
        return [
            ("epochs", "must be at least 1", self.epochs >= 1),
            ("batch_size", "must be at least 1", self.batch_size >= 1),
            (
                "batch_size",
                "must be even when mixup or cutmix pair the images of a batch",
                not self.mixes or self.batch_size % 2 == 0,
            ),
            ("lr", "must be above 0", 0 < self.lr < math.inf),
            ("min_lr", f"must be from 0 to lr={self.lr}", 0 <= self.min_lr <= self.lr),
            (
                "warmup_epochs",
                f"must be at least 0 and fewer than epochs={self.epochs}",
                0 <= self.warmup_epochs < self.epochs,
            ),
            ("weight_decay", "must be at least 0", 0 <= self.weight_decay < math.inf),
            ("clip_grad", "must be above 0, or none", self.clip_grad is None or self.clip_grad > 0),
            ("smoothing", "must be at least 0 and below 1", 0 <= self.smoothing < 1),
            ("seed", "must be at least 0", self.seed >= 0),
            ("aug", "contradicts no_aug=True", not (self.aug and self.no_aug)),
            ("reprob", "contradicts no_aug=True", not (self.reprob and self.no_aug)),
            (
                "scale",
                "must be two fractions, 0 < smallest <= largest <= 1",
                _ordered(self.scale, 1.0),
            ),
            (
                "ratio",
                "must be two numbers, 0 < smallest <= largest",
                _ordered(self.ratio, math.inf),
            ),
            ("hflip", "must be a probability", 0 <= self.hflip <= 1),
            ("reprob", "must be a probability", 0 <= self.reprob <= 1),
            ("color_jitter", "must be at least 0", 0 <= self.color_jitter < math.inf),
            ("mixup", "must be at least 0", 0 <= self.mixup < math.inf),
            ("cutmix", "must be at least 0", 0 <= self.cutmix < math.inf),
            ("eval_every", "must be at least 1", self.eval_every >= 1),
            ("workers", "must be at least 0", self.workers >= 0),
            ("log_interval", "must be at least 1", self.log_interval >= 1),
        ]

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed (mixup or CutMix), so that targets are distributions."""
        return self.mixup > 0 or self.cutmix > 0

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as plain values."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is computed: those which a continued run must share."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in PLACE_FIELDS}


def _ordered(pair: tuple[float, ...], largest: float) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1] <= largest and math.isfinite(pair[1])
