"""The training loop: epochs of batches, a checkpoint after each, the final weights at the end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mitaswap.data import decode
from mitaswap.errors import MitaswapError
from mitaswap.placement import pick_device, wants_bf16
from mitaswap.train.batches import Batches, open_batches
from mitaswap.train.config import TrainConfig
from mitaswap.train.optimisation import make_loss, make_optimizer, make_scheduler
from mitaswap.train.resume import LAST, check_same_run, describe, read_last, write_state
from mitaswap.train.seeding import seed_of, seeded
from mitaswap.train.validation import validate

if TYPE_CHECKING:
    from mitaswap.data import ImageSet
    from mitaswap.models import Network

logger = logging.getLogger(__name__)

Save = Callable[["Network", Path, dict[str, Any]], None]
Progress = Callable[[int, int, int, Mapping[str, float]], None]


def train(
    network: Network,
    train_set: ImageSet,
    val_set: ImageSet,
    config: TrainConfig,
    directory: str | Path,
    save: Save,
    progress: Progress | None = None,
    *,
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a network and write it to a directory; the same call again goes on where it stopped.

    Continued runs give the very weights of uninterrupted ones on the CPU (on a GPU up to the
    rounding of its non-deterministic kernels). The weights that are saved are those after the last
    epoch, never the ones that did best on `val_set`: no model selection on data that results are
    reported on.

    The network's module is moved to the device, made float32, trained in place and left in
    evaluation mode.

    Args:
        network: an opened network, swapped or not, with the weights to start from. Each call wants
            it as it was opened: other weights are another run.
        train_set: images to learn from; a transform they have is not used.
        val_set: images to validate on after each `config.eval_every` epochs; they are decoded once.
        config: the settings.
        directory: gets `last.pt` (the state to go on from) and `log.csv` after each epoch.
        save: writes the final network to the directory, which is not empty then, given (network,
            directory, summary), without removing files.
        progress: called as (epoch from 1, step from 1, steps, statistics so far) every
            `config.log_interval` updates and at the end of an epoch; then once more with top1, top5
            and val_loss if the epoch is validated.
        identity: plain values that a continued run must share besides settings, model and data (the
            recipe, say).

    Returns:
        The summary that `save` gets: epochs, updates, weights ("last"), top1, top5 (percent),
        val_loss, train_loss, best_top1 and best_epoch (for information), seconds, the names of the
        sets, config, and `continued_from`, the number of epochs that earlier calls had finished.

    Raises:
        MitaswapError: classes of model and data differ, the directory holds another run, a loss or
            weight is not finite, the disk is full. `last.pt` of the last finished epoch stays as it
            is; so it does on Ctrl-C.
    """
    directory = Path(directory)
    device = pick_device(config.device)
    bf16 = wants_bf16(config.amp, device)
    for images in (train_set, val_set):
        _check_classes(network, images)
    described = describe(network, config, (train_set, val_set), identity or {})
    state = read_last(directory)
    if state is not None:
        check_same_run(directory, state["identity"], described)

    module = network.module.to(device=device, dtype=torch.float32)
    optimizer = make_optimizer(module, config)
    history: list[dict[str, float]] = []
    if state is not None:
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
        logger.info("%s: going on after epoch %d of %d", directory, len(history), config.epochs)
    done = len(history)
    if done < config.epochs:
        with seeded(seed_of(config.seed)):  # a DataLoader draws from the caller's generator
            batches = open_batches(network, train_set, config, device)
            validation = decode(val_set, network.preprocess.to_uint8, workers=config.workers)
        run = _Run(network, batches, optimizer, config, device, bf16)
    for epoch in range(done + 1, config.epochs + 1):
        try:
            row = run.epoch(epoch, progress)
            if epoch % config.eval_every == 0 or epoch == config.epochs:
                row |= validate(network, validation, device, config.batch_size, bf16)
            _check_finite(module, row)
        except _NotFinite as found:
            raise _diverged(found, epoch, directory) from None
        history.append(row)
        write_state(
            directory,
            {
                "identity": described,
                "epoch": epoch,
                "model": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "history": history,
            },
        )
        logger.info("%s: epoch %d of %d: %s", directory, epoch, config.epochs, row)
        if progress is not None and "top1" in row:
            progress(epoch, run.steps, run.steps, row)
    module.eval()
    summary = _summary(
        history, config, train_set, val_set, len(train_set) // config.batch_size, done
    )
    save(network, directory, summary)
    return summary


class _NotFinite(Exception):
    """A loss or weight that is NaN or infinite; the message says which and where."""


class _Run:
    """One epoch after another of the same network, batches and optimizer."""

    def __init__(
        self,
        network: Network,
        batches: Batches,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        device: torch.device,
        bf16: bool,
    ) -> None:
        self.network = network
        self.batches = batches
        self.optimizer = optimizer
        self.config = config
        self.device = device
        self.bf16 = bf16
        self.steps = len(batches)
        self.scheduler = make_scheduler(optimizer, config, self.steps)
        self.loss, self.mixer = make_loss(config, network.num_classes)

    def epoch(self, epoch: int, progress: Progress | None) -> dict[str, float]:
        """Train for one epoch (counted from 1); returns its row of the log, without validation."""
        with seeded(seed_of(self.config.seed, epoch), self.device):
            return self._epoch(epoch, progress)

    def _epoch(self, epoch: int, progress: Progress | None) -> dict[str, float]:
        self.network.module.train()
        updates = (epoch - 1) * self.steps
        self.scheduler.step_update(updates)
        # Kept on the device and looked at now and then: reading each loss would make the GPU wait
        # for Python.
        losses = torch.zeros(self.steps, device=self.device)
        begin = time.perf_counter()
        row: dict[str, float] = {}
        for step, (images, labels) in enumerate(self.batches.epoch(epoch), start=1):
            lr = self.optimizer.param_groups[0]["lr"]
            losses[step - 1] = self._update(images, labels)
            self.scheduler.step_update(updates + step)
            if step % self.config.log_interval == 0 or step == self.steps:
                so_far = losses[:step].tolist()
                for number, loss in enumerate(so_far, start=1):
                    if not math.isfinite(loss):
                        raise _NotFinite(f"the loss is {loss} at update {number} of {self.steps}")
                seconds = time.perf_counter() - begin
                row = {
                    "epoch": epoch,
                    "lr": lr,
                    "train_loss": sum(so_far) / step,
                    "images_per_s": step * self.config.batch_size / seconds,
                    "seconds": seconds,
                }
                if progress is not None:
                    progress(epoch, step, self.steps, row)
        return row

    def _update(self, images: Tensor, labels: Tensor) -> Tensor:
        targets = labels
        if self.mixer is not None:
            images, targets = self.mixer(images, labels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.network.logits(images)
        loss = self.loss(logits.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.network.module.parameters(), self.config.clip_grad)
        self.optimizer.step()
        return loss.detach()


def _check_classes(network: Network, images: ImageSet) -> None:
    if network.num_classes != images.num_classes:
        raise MitaswapError(
            f"the model {network.name} has {network.num_classes} classes, but {images.name} "
            f"({images.split}) has {images.num_classes}. Open the model with a head of "
            f"{images.num_classes} classes (timm: num_classes={images.num_classes}, Hugging Face: "
            f"num_labels={images.num_classes}), or choose another data set."
        )


def _check_finite(module: nn.Module, row: Mapping[str, float]) -> None:
    """Raise `_NotFinite` for what the losses of an epoch don't show: what its last update did."""
    for name, parameter in module.named_parameters():
        if not bool(parameter.detach().isfinite().all()):
            raise _NotFinite(f"the parameter {name} is not finite at the end of the epoch")
    if not math.isfinite(row.get("val_loss", 0.0)):
        raise _NotFinite(f"the validation loss is {row['val_loss']}")


def _diverged(found: _NotFinite, epoch: int, directory: Path) -> MitaswapError:
    kept = (
        f"The state after epoch {epoch - 1} is kept in {directory / LAST}."
        if epoch > 1
        else "Nothing was written."
    )
    return MitaswapError(
        f"training diverged in epoch {epoch}: {found}. {kept} Start again in another directory "
        "with a lower lr, a longer warm-up, a smaller clip_grad or amp='none'."
    )


def _summary(
    history: list[dict[str, float]],
    config: TrainConfig,
    train_set: ImageSet,
    val_set: ImageSet,
    steps: int,
    continued_from: int,
) -> dict[str, Any]:
    last = history[-1]
    best = max((row for row in history if "top1" in row), key=lambda row: row["top1"])
    return {
        "epochs": config.epochs,
        "updates": config.epochs * steps,
        "weights": "last",
        **{name: last[name] for name in ("top1", "top5", "val_loss", "train_loss")},
        "best_top1": best["top1"],
        "best_epoch": int(best["epoch"]),
        "seconds": sum(row["seconds"] for row in history),
        "train_set": f"{train_set.name} ({train_set.split})",
        "val_set": f"{val_set.name} ({val_set.split})",
        "config": config.to_dict(),
        "continued_from": continued_from,
    }
