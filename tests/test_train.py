"""Training: what is learned, what is left on disk, and that a stopped run goes on unharmed."""

from __future__ import annotations

import csv
import errno
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mitaswap.data import ImageSet, decode
from mitaswap.errors import MitaswapError
from mitaswap.models import Network, open_model
from mitaswap.placement import pick_device, wants_bf16
from mitaswap.train import TrainConfig, train, validate
from mitaswap.train.batches import open_batches
from mitaswap.train.optimisation import make_loss, make_optimizer, make_scheduler, undecayed
from mitaswap.train.resume import LAST, LOG, LOG_COLUMNS
from mitaswap.train.seeding import seed_of, seeded

CPU = torch.device("cpu")
CLASSES = 4
MODEL = (
    "timm:vit_tiny_patch16_224(pretrained=false,img_size=16,patch_size=8,embed_dim=16,depth=1,"
    "num_heads=2,num_classes={classes},drop_rate={drop})"
)
PLAIN = TrainConfig(
    epochs=3,
    batch_size=8,
    lr=3e-3,
    warmup_epochs=0.5,
    no_aug=True,
    device="cpu",
    workers=0,
    log_interval=2,
)
# Everything random that there is: crops, flips, RandAugment, erasing, mixing, dropout, shuffling.
RANDOM = replace(
    PLAIN, no_aug=False, aug="rand-m9-mstd0.5", reprob=0.5, mixup=0.4, cutmix=1.0, scale=(0.5, 1.0)
)


class Colours(ImageSet):
    """Images of one colour each; the brightest channel tells the class (3: none of them)."""

    shift = 0

    def __init__(self, size: int = 32, split: str = "train", num_classes: int = CLASSES) -> None:
        super().__init__(split, size, num_classes)
        self.name = "colours"

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        label = index % CLASSES
        colour = [40 + index + self.shift] * 3
        if label < 3:
            colour[label] += 120
        return Image.new("RGB", (20, 20), tuple(colour)), label

    def _where(self, index: int | None) -> str:
        return f"colours, image {index}"

    def _identity(self) -> Any:
        return self.shift


def network(classes: int = CLASSES, seed: int = 0, drop: float = 0.1) -> Network:
    with seeded(seed):
        return open_model(MODEL.format(classes=classes, drop=drop))


def keep_nothing(*_: Any) -> None:
    """A `save` for runs whose final directory does not matter."""


def run(
    directory: Path,
    config: TrainConfig = PLAIN,
    *,
    net: Network | None = None,
    progress: Callable[..., None] | None = None,
    save: Callable[..., None] = keep_nothing,
    **options: Any,
) -> tuple[Network, dict[str, Any]]:
    net = net or network()
    sets = Colours(), Colours(10, "test")
    return net, train(net, *sets, config, directory, save, progress, **options)


def weights(net: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_in(epoch: int, step: int = 2) -> Callable[..., None]:
    """A progress callback that is Ctrl-C in the middle of an epoch."""

    def progress(now: int, at: int, steps: int, stats: Any) -> None:
        if now == epoch and at == step:
            raise KeyboardInterrupt

    return progress


# --- what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize("no_aug", [True, False], ids=["decoded", "augmented"])
def test_learns_colours_and_does_not_without_a_learning_rate(tmp_path: Path, no_aug: bool) -> None:
    config = replace(PLAIN, no_aug=no_aug, color_jitter=0, epochs=25, lr=1e-2, eval_every=25)
    _, learned = run(tmp_path / "learns", config)
    _, still = run(tmp_path / "still", replace(config, lr=1e-9, min_lr=0))
    assert learned["top1"] == 100.0
    assert still["top1"] < 60.0


def test_the_summary_is_what_save_gets_and_the_final_weights_are_saved(tmp_path: Path) -> None:
    saved: list[Any] = []

    def save(net: Network, directory: Path, summary: dict[str, Any]) -> None:
        saved.append((weights(net), directory, summary, net.module.training))

    net, summary = run(tmp_path / "run", save=save)
    (final, directory, given, training), *more = saved
    assert not more and directory == tmp_path / "run" and given == summary and not training
    state = torch.load(directory / LAST, weights_only=True)
    assert same(final, weights(net)) and same(final, state["model"])
    assert summary["weights"] == "last"
    assert (summary["epochs"], summary["updates"], summary["continued_from"]) == (3, 12, 0)
    assert summary["val_set"] == "colours (test)" and summary["config"] == PLAIN.to_dict()
    assert 0 <= summary["top1"] <= summary["best_top1"] <= 100 and summary["top5"] == 100.0


def test_bf16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "none")
    mixed, _ = run(tmp_path / "bf16", replace(PLAIN, amp="bf16"))
    assert all(value.dtype == torch.float32 for value in mixed.module.parameters())
    assert not same(weights(plain), weights(mixed))


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    net = network()
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    run(tmp_path, replace(RANDOM, epochs=1, warmup_epochs=0), net=net)
    assert (random.getstate(), str(np.random.get_state())) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_progress_tells_epochs_steps_and_validation(tmp_path: Path) -> None:
    calls: list[tuple[int, int, int, set[str]]] = []
    config = replace(PLAIN, eval_every=2)
    run(tmp_path, config, progress=lambda e, s, n, stats: calls.append((e, s, n, set(stats))))
    assert [(e, s, n) for e, s, n, stats in calls if "top1" not in stats] == [
        (e, s, 4) for e in (1, 2, 3) for s in (2, 4)
    ]
    assert [e for e, _, _, stats in calls if {"top1", "top5", "val_loss"} <= stats] == [2, 3]


# --- what is left on disk ------------------------------------------------------------------------


def test_log_csv_has_a_row_per_epoch_and_blanks_where_nothing_was_validated(tmp_path: Path) -> None:
    _, summary = run(tmp_path, replace(PLAIN, eval_every=2))
    with open(tmp_path / LOG, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == LOG_COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [bool(row["top1"]) for row in rows] == [False, True, True]
    assert float(rows[-1]["top1"]) == summary["top1"]
    assert sum(float(row["seconds"]) for row in rows) == pytest.approx(summary["seconds"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([LAST, LOG])


@pytest.mark.parametrize("config", [PLAIN, RANDOM], ids=["decoded", "augmented"])
def test_a_stopped_run_goes_on_to_the_very_same_weights(
    tmp_path: Path, config: TrainConfig
) -> None:
    whole, expected = run(tmp_path / "whole", config)
    for epoch in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", config, progress=stop_in(epoch))
    # Other places: they change no result.
    place = replace(config, workers=2, log_interval=3)
    resumed, found = run(tmp_path / "stopped", place)
    assert found["continued_from"] == 2
    assert same(weights(resumed), weights(whole))
    timing = {"seconds", "continued_from", "config"}
    assert {k: v for k, v in found.items() if k not in timing} == {
        k: v for k, v in expected.items() if k not in timing
    }
    other, _ = run(tmp_path / "other", replace(config, seed=1))
    assert not same(weights(other), weights(whole))


def test_a_finished_run_is_saved_again_and_not_trained_again(tmp_path: Path) -> None:
    first, summary = run(tmp_path)
    saved: list[dict[str, Any]] = []
    again, repeated = run(tmp_path, progress=stop_in(1), save=lambda n, d, s: saved.append(s))
    assert same(weights(first), weights(again)) and saved == [repeated]
    assert repeated == {**summary, "continued_from": 3}


def test_another_command_in_the_same_directory_lists_what_differs(tmp_path: Path) -> None:
    run(tmp_path, identity={"recipe": "mita(m=4,k=4)"})
    before = (tmp_path / LAST).read_bytes()
    with pytest.raises(MitaswapError) as caught:
        run(tmp_path, replace(PLAIN, lr=1e-4, epochs=5), identity={"recipe": "linear"})
    text = str(caught.value)
    assert f"{tmp_path} holds a training run of another command" in text
    assert "config.epochs was 3, is now 5; config.lr was 0.003, is now 0.0001;" in text
    assert "recipe was 'mita(m=4,k=4)', is now 'linear'" in text
    assert "Choose another directory" in text and "config.seed" not in text
    assert (tmp_path / LAST).read_bytes() == before


def test_a_model_of_another_structure_is_another_run(tmp_path: Path) -> None:
    run(tmp_path)
    changed = network()
    changed.module.get_submodule("blocks.0.mlp").act = nn.SiLU()
    with pytest.raises(
        MitaswapError, match=r"model.structure \(from line \d+ on\) was .*GELU.* is now .*SiLU"
    ):
        run(tmp_path, net=changed)


def test_other_weights_to_start_from_are_another_run(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(MitaswapError, match=r"command: model\.weights was '\w+', is now '\w+'\. "):
        run(tmp_path, net=network(seed=9))


def test_another_preprocessing_is_another_run(tmp_path: Path) -> None:
    run(tmp_path)
    changed = network()
    changed.preprocess.mean = (0.1, 0.1, 0.1)
    with pytest.raises(MitaswapError, match=r"command: model\.preprocess was "):
        run(tmp_path, net=changed)


@pytest.mark.parametrize("role", ["train", "val"])
def test_other_images_of_the_same_number_are_another_run(tmp_path: Path, role: str) -> None:
    sets = {"train": Colours(), "val": Colours(10, "test")}
    train(network(), sets["train"], sets["val"], PLAIN, tmp_path, keep_nothing)
    sets[role].shift = 1
    with pytest.raises(
        MitaswapError, match=rf"command: {role}\.content was '\w+', is now '\w+'\. "
    ):
        train(network(), sets["train"], sets["val"], PLAIN, tmp_path, keep_nothing)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "tensor"], ids=str)
def test_a_broken_checkpoint_is_named(tmp_path: Path, content: bytes | str) -> None:
    if isinstance(content, str):
        torch.save({"weights": torch.zeros(2)}, tmp_path / LAST)
    else:
        (tmp_path / LAST).write_bytes(content)
    with pytest.raises(MitaswapError, match=r"cannot read .*last.pt: .*Delete it to start"):
        run(tmp_path)


def test_a_directory_with_somebody_elses_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(MitaswapError, match=r"holds a model \(model.safetensors\)"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_directory_with_somebody_elses_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("precious")
    (tmp_path / "src").mkdir()
    with pytest.raises(MitaswapError, match=r"no training run left there \(README.md and 1 more\)"):
        run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "src"]


def test_what_a_run_killed_in_its_first_epoch_left_is_no_obstacle(tmp_path: Path) -> None:
    for name in (LOG, f"{LOG}.partial", f"{LAST}.partial"):
        (tmp_path / name).write_text("half")
    run(tmp_path)
    assert (tmp_path / LAST).exists()


def test_a_full_disk_leaves_the_last_epoch_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=stop_in(2))
    before = (tmp_path / "run" / LAST).read_bytes()

    # as PyTorch reports it: of its own file, and of one that it was handed
    full = OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")
    for error, said in zip(full, ("No space", "disk is full, it seems .unexp"), strict=True):

        def save(state: Any, file: Any, error: Exception = error) -> None:
            file.write(b"half of it")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", save)
            with pytest.raises(MitaswapError, match=rf"cannot write .*last.pt.*{said}.*is intact"):
                run(tmp_path / "run")
    assert (tmp_path / "run" / LAST).read_bytes() == before
    assert not list((tmp_path / "run").glob("*.partial"))
    resumed, found = run(tmp_path / "run")
    assert found["continued_from"] == 1 and same(weights(resumed), weights(whole))


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2], ids=["first epoch", "third epoch"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, after: int
) -> None:
    net = network()

    def spoil(epoch: int, step: int, steps: int, stats: Any) -> None:
        if epoch == after + 1 and step == 2:
            net.module.get_parameter("head.bias").data.fill_(float("nan"))

    kept = f"The state after epoch {after} is kept in" if after else "Nothing was written"
    expected = f"diverged in epoch {after + 1}: the loss is nan at update 3 of 4.*{kept}.*lower lr"
    with pytest.raises(MitaswapError, match=expected):
        run(tmp_path, net=net, progress=spoil)
    assert (tmp_path / LAST).exists() == bool(after)
    if after:
        assert torch.load(tmp_path / LAST, weights_only=True)["epoch"] == after


def test_weights_that_the_last_update_spoiled_are_never_written(tmp_path: Path) -> None:
    net = network()

    def spoil(epoch: int, step: int, steps: int, stats: Any) -> None:
        if step == steps:
            net.module.get_parameter("head.bias").data[0] = float("inf")

    with pytest.raises(MitaswapError, match=r"parameter head.bias is not finite at the end"):
        run(tmp_path, replace(PLAIN, eval_every=3), net=net, progress=spoil)
    assert not (tmp_path / LAST).exists()


def test_other_classes_than_the_data_has_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(
        MitaswapError, match=r"has 7 classes, but colours \(train\) has 4.*head of 4"
    ):
        run(tmp_path / "run", net=network(classes=7))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size": 64}, r"colours \(train\) has 32 images, fewer than one batch of 64"),
        ({"aug": "rand-x9-q7", "no_aug": False}, "cannot make the augmentation 'rand-x9-q7'"),
        ({"aug": "nothing", "no_aug": False}, "cannot make the augmentation 'nothing'"),
        ({"opt": "adamv"}, "unknown optimizer 'adamv'. Did you mean 'adam"),
        ({"opt": "adahessian"}, "'adahessian' needs second derivatives"),
        ({"device": "gpu"}, "unknown device 'gpu'. Allowed: auto, cpu, cuda"),
        ({"device": "meta"}, "cannot compute on device 'meta'"),
        ({"device": "cuda:99"}, r"'cuda:99' is not there: torch sees \d+ GPUs"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_here(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(MitaswapError, match=text):
        run(tmp_path / "run", replace(PLAIN, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epochs": 0}, "epochs=0 (must be at least 1)"),
        ({"lr": float("nan")}, "lr=nan (must be above 0)"),
        ({"min_lr": 1.0}, "min_lr=1.0 (must be from 0 to lr=0.001)"),
        ({"epochs": 2}, "warmup_epochs=2 (must be at least 0 and fewer than epochs=2)"),
        ({"mixup": 0.2, "batch_size": 7}, "batch_size=7 (must be even"),
        ({"aug": "3a", "no_aug": True}, "aug='3a' (contradicts no_aug=True)"),
        ({"scale": (0.9, 0.2)}, "scale=(0.9, 0.2) (must be two fractions"),
        ({"clip_grad": 0.0}, "clip_grad=0.0 (must be above 0, or none)"),
        ({"smoothing": 1.0}, "smoothing=1.0 (must be at least 0 and below 1)"),
        ({"hflip": 1.5, "workers": -1}, "hflip=1.5 (must be a probability); workers=-1"),
        ({"sched": "cosin"}, "unknown schedule 'cosin'. Did you mean 'cosine'?"),
        ({"amp": "fp16"}, "unknown precision (amp) 'fp16'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(MitaswapError) as caught:
        TrainConfig(**changes)
    assert text in str(caught.value)


def test_a_stream_cannot_be_augmented_but_decoded() -> None:
    class Stream(Colours):
        random_access = False

        def samples(self) -> Any:
            return (self._sample(index) for index in range(len(self)))

    with pytest.raises(MitaswapError, match="is a stream"):
        open_batches(network(), Stream(), RANDOM, CPU)
    assert len(open_batches(network(), Stream(), PLAIN, CPU)) == 4


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    net = network()
    net.module.requires_grad_(False)
    with pytest.raises(MitaswapError, match="nothing to train"):
        run(tmp_path, net=net)


# --- batches -------------------------------------------------------------------------------------


def batches_of(config: TrainConfig, epoch: int, images: ImageSet | None = None) -> Tensor:
    """All images of an epoch in the order of their batches, [n, 3, H, W]."""
    opened = open_batches(network(), images or Colours(), config, CPU)
    with seeded(seed_of(config.seed, epoch)):
        return torch.cat([batch for batch, _ in opened.epoch(epoch)])


def test_batches_agree_with_and_without_the_loader() -> None:
    """Images of one colour look alike under crops and flips: both ways give equal numbers."""
    quiet = replace(PLAIN, no_aug=False, color_jitter=0)
    loaded, decoded = batches_of(quiet, 1), batches_of(PLAIN, 1)
    assert loaded.shape == decoded.shape == (32, 3, 16, 16)
    assert loaded.dtype == decoded.dtype == torch.float32

    def ordered(images: Tensor) -> Tensor:
        return images[images.sum(dim=(1, 2, 3)).argsort()]

    torch.testing.assert_close(ordered(loaded), ordered(decoded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [PLAIN, RANDOM], ids=["decoded", "augmented"])
def test_batches_depend_on_seed_and_epoch_only(config: TrainConfig) -> None:
    first = batches_of(config, 1)
    assert torch.equal(first, batches_of(replace(config, workers=2), 1))
    assert not torch.equal(first, batches_of(config, 2))
    assert not torch.equal(first, batches_of(replace(config, seed=1), 1))


def test_an_image_is_augmented_anew_in_each_epoch_and_unlike_its_twins() -> None:
    def shades(config: TrainConfig, epoch: int, images: ImageSet | None = None) -> list[float]:
        return sorted(batches_of(config, epoch, images).mean(dim=(1, 2, 3)).tolist())

    class Twins(Colours):
        def _sample(self, index: int) -> tuple[Image.Image, int]:
            return super()._sample(0)

    jittered = replace(PLAIN, no_aug=False, color_jitter=0.4)
    assert shades(jittered, 1) != shades(jittered, 2)
    assert shades(PLAIN, 1) == shades(PLAIN, 2)
    assert len(set(shades(jittered, 1, Twins()))) > 16 > len(set(shades(PLAIN, 1, Twins())))


def test_an_epoch_shows_each_image_once_with_its_label() -> None:
    opened = open_batches(network(), Colours(30), PLAIN, CPU)
    pairs = [
        (float(x.sum()), int(y))
        for images, ys in opened.epoch(1)
        for x, y in zip(images, ys, strict=True)
    ]
    decoded = decode(Colours(30), network().preprocess.to_uint8)
    known = {
        (float(x.sum()), int(y))
        for x, y in zip(network().preprocess.normalise(decoded.images), decoded.labels, strict=True)
    }
    assert len(pairs) == len(set(pairs)) == 24  # 30 images are 3 batches of 8, 6 are left out
    assert set(pairs) <= known


def test_the_callers_images_keep_their_transform() -> None:
    images = Colours()
    images.transform = str
    assert batches_of(RANDOM, 1, images).shape == (32, 3, 16, 16)
    assert images.transform is str


def test_a_damaged_image_is_one_error_also_from_a_worker(tmp_path: Path) -> None:
    from mitaswap.data import open_set

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.new("RGB", (20, 20), (50 * number, 0, 0)).save(tmp_path / name / f"{number}.png")
    broken = tmp_path / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    config = replace(RANDOM, batch_size=2, workers=1)
    with pytest.raises(MitaswapError) as caught:
        batches_of(config, 1, open_set(str(tmp_path)))
    assert str(broken) in str(caught.value) and "Traceback" not in str(caught.value)


# --- optimizer, schedule, loss -------------------------------------------------------------------


class Named(nn.Module):
    """A module with the parameter names that Hugging Face gives special tokens and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.register_tokens = nn.Parameter(torch.zeros(1, 2, 4))
        self.position_embedding = nn.Embedding(5, 4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.extra = Declaring()


class Declaring(nn.Module):
    """A submodule that declares its own, as timm's models do at the top."""

    def __init__(self) -> None:
        super().__init__()
        self.landmarks = nn.Parameter(torch.zeros(2, 4))
        self.mix = nn.Parameter(torch.zeros(4, 4))

    def no_weight_decay(self) -> set[str]:
        return {"landmarks"}


def decayed(module: nn.Module) -> set[str]:
    optimizer = make_optimizer(module, PLAIN)
    rates = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(rates.values()) == {0.0, PLAIN.weight_decay}
    assert len(rates) == len(list(module.parameters()))
    return {name for name, p in module.named_parameters() if rates[id(p)]}


def test_only_matrices_are_decayed() -> None:
    assert decayed(Named()) == {"proj.weight", "extra.mix"}
    assert "extra.landmarks" in undecayed(Named())
    vit = decayed(network().module)
    assert "blocks.0.attn.qkv.weight" in vit and "patch_embed.proj.weight" in vit
    assert not vit & {"pos_embed", "cls_token", "blocks.0.norm1.weight", "head.bias"}


def rates(config: TrainConfig, updates: int = 10) -> list[float]:
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    scheduler = make_scheduler(optimizer, config, updates)
    found = []
    for update in range(config.epochs * updates):
        scheduler.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_cosine_rises_linearly_per_update_and_falls_to_the_minimum() -> None:
    found = rates(TrainConfig(epochs=10, lr=1e-2, min_lr=1e-4, warmup_epochs=2))
    assert found[0] == pytest.approx(1e-6) and max(found) <= 1e-2
    assert np.allclose(np.diff(found[:20]), (1e-2 - 1e-6) / 20)
    assert found[60] == pytest.approx(1e-4 + (1e-2 - 1e-4) * (1 + np.cos(0.6 * np.pi)) / 2)
    assert all(np.diff(found[21:]) < 0) and 1e-4 < found[-1] < 1.1e-4


def test_a_run_steps_through_its_schedule_and_its_losses_are_the_models(tmp_path: Path) -> None:
    seen: dict[tuple[int, int], float] = {}
    config = replace(PLAIN, log_interval=1)
    run(
        tmp_path / "steps",
        config,
        progress=lambda e, s, n, stats: seen.update({(e, s): stats["lr"]}),
    )
    assert list(seen.values()) == pytest.approx(rates(config, updates=4))

    net, summary = run(tmp_path / "still", replace(PLAIN, lr=1e-12, min_lr=0), net=network(drop=0))
    images = decode(Colours(), net.preprocess.to_uint8)
    with torch.no_grad():
        logits = net.logits(net.preprocess.normalise(images.images))
    expected = nn.functional.cross_entropy(logits, images.labels, label_smoothing=PLAIN.smoothing)
    assert summary["train_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_constant_holds_after_the_warmup() -> None:
    found = rates(TrainConfig(epochs=4, lr=1e-2, warmup_epochs=1.5, sched="constant"))
    assert all(np.diff(found[:15]) > 0) and found[15:] == [1e-2] * 25


def test_mixing_smooths_once() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    loss, mixer = make_loss(replace(PLAIN, mixup=0.8), CLASSES)
    assert mixer is not None and loss.label_smoothing == 0.0
    with seeded(0):
        _, targets = mixer(torch.rand(4, 3, 8, 8), labels)
    assert torch.allclose(targets.sum(1), torch.ones(4)) and targets.min() == pytest.approx(0.025)
    plain, none = make_loss(PLAIN, CLASSES)
    assert none is None and plain.label_smoothing == PLAIN.smoothing


# --- validation, precision, seeds ----------------------------------------------------------------


def test_validation_counts_an_uneven_last_batch_by_its_size() -> None:
    net = network()
    images = decode(Colours(10, "test"), net.preprocess.to_uint8)
    net.module.train()
    found = validate(net, images, CPU, batch_size=4)
    assert not net.module.training
    with torch.no_grad():
        logits = net.logits(net.preprocess.normalise(images.images))
    right = (logits.argmax(1) == images.labels).double().mean() * 100
    assert found["top1"] == pytest.approx(float(right)) and found["top5"] == 100.0
    expected = nn.functional.cross_entropy(logits, images.labels)
    assert found["val_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found == pytest.approx(validate(net, images, CPU, batch_size=10), rel=1e-5)


def test_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU and not wants_bf16("auto", CPU) and wants_bf16("bf16", CPU)
    with pytest.raises(MitaswapError, match=r"torch sees 0 GPUs. Use 'auto' or 'cpu'"):
        pick_device("cuda")


def test_seeds_are_repeatable_distinct_and_put_back_after_an_error() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        with seeded(seed):
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(1) == draw(1) and all(a != b for a, b in zip(draw(1), draw(2), strict=True))
    assert len({seed_of(0, 1), seed_of(1, 0), seed_of(0, 1, 0), seed_of(0, 0, 1)}) == 4
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), seeded(1):
        torch.rand(3)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [PLAIN, RANDOM], ids=["decoded", "augmented"])
def test_trains_and_goes_on_on_a_gpu(tmp_path: Path, config: TrainConfig) -> None:
    config = replace(config, device="cuda", epochs=25, lr=1e-2, workers=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config, progress=stop_in(3))
    before = torch.cuda.get_rng_state()
    net, summary = run(tmp_path, config)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert summary["continued_from"] == 2 and next(net.module.parameters()).is_cuda
    assert summary["train_loss"] < 1.3 and summary["top1"] > 50.0
