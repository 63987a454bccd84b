"""Networks of timm: options, preprocessing, directories and weights files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_input_data_config

from mitaswap.errors import MitaswapError
from mitaswap.models import Network, open_model, wrap

TINY = (
    "vit_tiny_patch16_224(pretrained=false,img_size=32,patch_size=8,depth=2,embed_dim=32,"
    "num_heads=2"
)
TINY_10 = f"timm:{TINY},num_classes=10)"


@pytest.fixture
def tiny() -> Network:
    torch.manual_seed(0)
    return open_model(TINY_10)


def photo(height: int = 50, width: int = 70, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_call_string_builds_what_create_model_builds(tiny: Network) -> None:
    assert (tiny.source, tiny.arch, tiny.num_classes) == ("timm", "vit_tiny_patch16_224", 10)
    assert tiny.name == TINY_10
    assert len(tiny.module.blocks) == 2  # type: ignore[arg-type]
    assert not tiny.module.training
    assert tiny.preprocess.size == (32, 32)
    assert tiny.class_names is None
    assert tiny.config["architecture"] == "vit_tiny_patch16_224"
    assert tiny.config["model_args"]["depth"] == 2
    assert tiny.logits(tiny.example(3)).shape == (3, 10)


def test_plain_name_means_timm(tiny: Network) -> None:
    plain = open_model(f"{TINY},num_classes=10)")
    assert plain.source == "timm"
    assert plain.module.state_dict().keys() == tiny.module.state_dict().keys()


def test_pretrained_argument_wins_over_the_name() -> None:
    name = TINY_10.replace("pretrained=false,", "")
    assert open_model(name, pretrained=False).num_classes == 10


def test_example_is_the_same_noise_and_leaves_the_random_state_alone(tiny: Network) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = tiny.example(2), tiny.example(2, size=(16, 48))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.shape == (2, 3, 32, 32)
    assert second.shape == (2, 3, 16, 48)
    assert torch.equal(first, tiny.example(2))
    tiny.module.double()
    assert tiny.example().dtype == torch.float64


def test_dynamic_image_size_is_kept_by_preprocessing() -> None:
    network = open_model(
        f"{TINY.replace('img_size=32', 'img_size=(32,48)')},num_classes=4,dynamic_img_size=true)"
    )
    assert network.preprocess.size == (32, 48)
    assert network.logits(network.example(size=(64, 32))).shape == (1, 4)


# ---- preprocessing


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pixels_then_numbers_equal_timms_own_transform(crop_mode: str, mode: str) -> None:
    network = open_model(
        f"{TINY},crop_mode={crop_mode},crop_pct=0.8,mean=(0.4,0.5,0.6),std=(0.2,0.3,0.1))"
    )
    image = photo(mode=mode)
    pixels = network.preprocess.to_uint8(image)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 32, 32))
    data = resolve_input_data_config(network.module)
    assert (data["crop_mode"], data["mean"]) == (crop_mode, (0.4, 0.5, 0.6))
    expected = create_transform(**data)(image.convert("RGB"))
    got = network.preprocess.normalise(pixels[None])[0]
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-6
    assert (got - expected.flip(0)).abs().max() > 1e-2  # the comparison can fail


def test_key_follows_the_pixels_and_not_the_normalisation(tiny: Network) -> None:
    same = open_model(f"{TINY},mean=0.1)").preprocess
    other = open_model(f"{TINY},crop_pct=1.0)").preprocess
    assert tiny.preprocess.key == same.key
    assert tiny.preprocess.key != other.key
    assert not torch.equal(tiny.preprocess.to_uint8(photo()), other.to_uint8(photo()))


def test_preprocess_survives_a_pickle(tiny: Network) -> None:
    copy = pickle.loads(pickle.dumps(tiny.preprocess))
    assert copy.key == tiny.preprocess.key
    assert torch.equal(copy.to_uint8(photo()), tiny.preprocess.to_uint8(photo()))


def test_grey_images_for_one_channel() -> None:
    network = open_model(f"{TINY},in_chans=1,mean=(0.5,),std=(0.5,))")
    assert network.preprocess.to_uint8(photo()).shape == (1, 32, 32)
    assert network.example().shape == (1, 1, 32, 32)


def test_normalise_refuses_floats(tiny: Network) -> None:
    with pytest.raises(TypeError, match="uint8"):
        tiny.preprocess.normalise(torch.rand(1, 3, 32, 32))


# ---- directories


def test_saved_directory_loads_with_plain_timm_and_here(tiny: Network, tmp_path: Path) -> None:
    out = tiny.save(tmp_path / "new" / "net")
    plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = tiny.example(2)
    assert torch.equal(plain(x), tiny.logits(x))
    assert load_file(out / "model.safetensors").keys() == tiny.module.state_dict().keys()
    assert sorted(f.name for f in out.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in out.parent.iterdir()] == ["net"]  # no scratch left
    assert len({f.stat().st_mode for f in out.iterdir()}) == 1  # none private to its owner
    again = open_model(str(out))
    assert torch.equal(again.logits(x), tiny.logits(x))
    assert (again.preprocess.key, again.preprocess.mean) == (
        tiny.preprocess.key,
        tiny.preprocess.mean,
    )
    assert torch.equal(open_model(f"{out}(num_classes=10)").logits(x), tiny.logits(x))
    assert not torch.equal(open_model(f"{out}(pretrained=false)").logits(x), tiny.logits(x))


def test_preprocessing_options_and_class_names_are_saved(tmp_path: Path) -> None:
    network = open_model(f"{TINY},num_classes=2,crop_pct=1.0,mean=(0.1,0.2,0.3))")
    network.class_names = ("cat", "dog")
    again = open_model(str(network.save(tmp_path / "net")))
    assert again.preprocess.crop_pct == 1.0
    assert again.preprocess.mean == (0.1, 0.2, 0.3)
    assert again.class_names == ("cat", "dog")
    assert open_model(f"{tmp_path / 'net'}(num_classes=5)").class_names is None


def test_extra_keys_are_kept_beside_upstreams(tiny: Network, tmp_path: Path) -> None:
    out = tiny.save(tmp_path / "net", extra_config={"mitaswap": {"recipe": {"*": "mita(m=4,k=4)"}}})
    again = open_model(str(out))
    assert again.config["mitaswap"] == {"recipe": {"*": "mita(m=4,k=4)"}}
    assert torch.equal(again.logits(again.example()), tiny.logits(tiny.example()))
    timm.create_model(f"local-dir:{out}", pretrained=True)
    plain = open_model(str(again.save(tmp_path / "plain")))
    assert "mitaswap" not in plain.config
    with pytest.raises(ValueError, match="architecture"):
        tiny.save(tmp_path / "bad", extra_config={"architecture": "other"})
    assert not (tmp_path / "bad").exists()


def test_given_state_dict_is_written_instead_of_the_modules(tiny: Network, tmp_path: Path) -> None:
    upstream = {k: torch.zeros_like(v) for k, v in tiny.module.state_dict().items()}
    tiny.module.add_module("mita_extra", torch.nn.Linear(2, 2))
    out = tiny.save(tmp_path / "net", state_dict=upstream)
    assert load_file(out / "model.safetensors").keys() == upstream.keys()
    again = open_model(str(out))
    assert again.logits(again.example()).abs().max() == 0


def test_saving_again_replaces_files_and_keeps_others(tiny: Network, tmp_path: Path) -> None:
    out = tiny.save(tmp_path / "net")
    (out / "README.md").write_text("card")
    with torch.no_grad():
        tiny.module.head.bias.add_(1)  # type: ignore[operator, union-attr]
    tiny.save(out)
    assert (out / "README.md").read_text() == "card"
    assert torch.equal(open_model(str(out)).logits(tiny.example()), tiny.logits(tiny.example()))


def test_failed_save_leaves_the_old_directory_untouched(
    tiny: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tiny.save(tmp_path / "net")
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    tiny.module.head.bias.data.add_(1)  # type: ignore[operator, union-attr]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mitaswap.models.timm._export_config", full)
    with pytest.raises(MitaswapError, match=r"cannot save to .*No space left"):
        tiny.save(out)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_file_in_the_way_of_a_directory(tiny: Network, tmp_path: Path) -> None:
    (tmp_path / "net").write_text("")
    with pytest.raises(MitaswapError, match="it is a file"):
        tiny.save(tmp_path / "net")
    with pytest.raises(MitaswapError, match="cannot save to"):
        tiny.save(tmp_path / "net" / "below")


# ---- weights files

ARCH = f"timm:{TINY},num_classes=10)"


@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "module."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pth.tar"])
def test_bare_file_with_usual_wrappers(
    tiny: Network, tmp_path: Path, wrap: str, suffix: str
) -> None:
    state = tiny.module.state_dict()
    wrapped = {
        "plain": state,
        "model": {"model": state, "model_ema": {"other": torch.zeros(1)}, "epoch": 3},
        "state_dict": {"state_dict": state, "optimizer": {}},
        "module.": {f"module.{k}": v for k, v in state.items()},
    }[wrap]
    file = tmp_path / f"best{suffix}"
    torch.save(wrapped, file)
    network = open_model(str(file), arch=ARCH)
    assert torch.equal(network.logits(tiny.example()), tiny.logits(tiny.example()))
    assert network.name == str(file)
    assert "state_dict" not in network.module.pretrained_cfg  # type: ignore[operator]


def test_bare_safetensors_and_directory_as_arch(tiny: Network, tmp_path: Path) -> None:
    save_file(tiny.module.state_dict(), tmp_path / "w.safetensors")
    out = open_model(ARCH).save(tmp_path / "other")
    x = tiny.example()
    for arch in (ARCH, str(out)):
        assert torch.equal(
            open_model(str(tmp_path / "w.safetensors"), arch=arch).logits(x), tiny.logits(x)
        )
    assert not torch.equal(open_model(str(out)).logits(x), tiny.logits(x))


def test_bare_file_of_another_image_size_is_resampled_by_timm(
    tiny: Network, tmp_path: Path
) -> None:
    save_file(tiny.module.state_dict(), tmp_path / "w.safetensors")
    arch = ARCH.replace("img_size=32", "img_size=64")
    network = open_model(str(tmp_path / "w.safetensors"), arch=arch)
    assert network.module.pos_embed.shape[1] == 65  # type: ignore[union-attr]
    assert torch.equal(network.module.head.weight, tiny.module.head.weight)  # type: ignore[union-attr]


class _Code:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("pwned"),))


def broken_files(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, tuple[Path, str]]:
    """Files that must be refused, with what the message must say."""
    whole = folder / "whole.safetensors"
    save_file(state, whole)
    torch.save(state, folder / "whole.pth")
    cases = {
        "empty": ("empty.pth", b"", "empty"),
        "truncated safetensors": ("cut.safetensors", whole.read_bytes()[:-100], "cannot read"),
        "truncated pth": ("cut.pth", (folder / "whole.pth").read_bytes()[:2000], "truncated"),
        "cut near its end": ("end.pth", (folder / "whole.pth").read_bytes()[:-10], "truncated"),
        "no weights": ("text.bin", b"hello", "cannot read"),
    }
    found = {}
    for name, (file, content, text) in cases.items():
        (folder / file).write_bytes(content)
        found[name] = (folder / file, text)
    torch.save(_Code(), folder / "code.pth")
    found["code"] = (folder / "code.pth", "besides tensors it holds objects (")
    torch.save({"lr": 0.1, "name": "x"}, folder / "numbers.pth")
    found["numbers"] = (folder / "numbers.pth", "must map parameter names to tensors")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    found["one tensor"] = (folder / "tensor.pth", "cannot read")
    return found


def test_broken_files_are_named_and_run_no_code(
    tiny: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, (file, text) in broken_files(tmp_path, tiny.module.state_dict()).items():
        with pytest.raises(MitaswapError) as caught:
            open_model(str(file), arch=ARCH)
        assert text in str(caught.value), name
        assert file.name in str(caught.value), name
        for odd in ("weights_only", "Errno", "miniz"):  # advice that cannot be followed here
            assert odd not in str(caught.value), name
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("arch", "says"),
    [
        (
            ARCH.replace("num_classes=10", "num_classes=7"),
            r"of another shape head\.bias \[10\] for \[7\]",
        ),
        (ARCH.replace("depth=2", "depth=3"), r"missing blocks\.2\.\S+, .* and 9 more"),
        (ARCH.replace("depth=2", "depth=1"), r"unexpected blocks\.1\.\S+, .* and 9 more"),
    ],
    ids=["classes", "missing", "unexpected"],
)
def test_weights_that_do_not_fit(tiny: Network, tmp_path: Path, arch: str, says: str) -> None:
    save_file(tiny.module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(MitaswapError, match=says) as caught:
        open_model(str(tmp_path / "w.safetensors"), arch=arch)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_directory_with_damaged_weights(tiny: Network, tmp_path: Path, damage: str) -> None:
    out = tiny.save(tmp_path / "net")
    weights = out / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        weights.unlink()
    with pytest.raises(
        MitaswapError, match=r"model\.safetensors|No suitable checkpoints"
    ) as caught:
        open_model(str(out))
    assert str(out) in str(caught.value)
    assert open_model(str(out), pretrained=False).num_classes == 10


# ---- heads and image sizes


def test_reset_head_replaces_the_head_alone_and_is_saved(tiny: Network, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in tiny.module.state_dict().items()}
    tiny.class_names = tuple("abcdefghij")
    torch.manual_seed(3)
    tiny.reset_head(4)
    after = tiny.module.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {
        "head.weight",
        "head.bias",
    }
    assert (tiny.num_classes, tiny.class_names, tiny.module.training) == (4, None, False)
    again = open_model(str(tiny.save(tmp_path / "net")))
    assert again.num_classes == 4
    assert torch.equal(again.logits(again.example()), tiny.logits(tiny.example()))
    torch.manual_seed(3)
    again.reset_head(4)
    assert torch.equal(again.module.state_dict()["head.weight"], after["head.weight"])
    with pytest.raises(MitaswapError, match="at least 1 class, got 0"):
        tiny.reset_head(0)


def test_a_network_without_a_head_gets_one() -> None:
    network = open_model(f"{TINY},num_classes=0)")
    network.reset_head(3)
    assert network.logits(network.example()).shape == (1, 3)


def test_image_size_resamples_the_weights(tiny: Network, tmp_path: Path) -> None:
    out = tiny.save(tmp_path / "net")
    for name in (str(out), f"{out}(img_size=64)"):
        network = open_model(name, img_size=(16, 48))
        assert network.preprocess.size == (16, 48)
        assert network.module.pos_embed.shape[1] == 1 + 2 * 6  # type: ignore[union-attr]
        assert torch.equal(network.module.head.weight, tiny.module.head.weight)  # type: ignore[union-attr]
        assert network.logits(network.example()).shape == (1, 10)


def test_image_size_of_a_network_for_any_size() -> None:
    network = open_model("timm:test_resnet(pretrained=false,num_classes=3)", img_size=(32, 64))
    assert network.logits(network.example(size=(32, 64))).shape == (1, 3)


@pytest.mark.parametrize("size", [(0, 32), (32, -1)], ids=str)
def test_impossible_image_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(MitaswapError, match=rf"{size[0]} x {size[1]} is impossible"):
        open_model(TINY_10, img_size=size)


# ---- errors


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm:vit_tiny_patch16_225", "Did you mean 'vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_224.augreg_in21", "Did you mean 'vit_tiny_patch16_224.augreg_in21k'"),
        ("vit_tiny_patch16_224(pretrained=false,dept=3)", "'dept'. Did you mean 'depth'"),
        ("vit_tiny_patch16_224(pretrained=false,img_size=abc)", "timm cannot open"),
        ("vit_tiny_patch16_224(pretrained=maybe)", "must be true or false, not 'maybe'"),
        ("vit_tiny_patch16_224(pretrained=false,crop_mode=centre)", "Did you mean 'center'"),
        ("vit_tiny_patch16_224(pretrained=false,interpolation=cubic)", "Did you mean 'bicubic'"),
        (
            "vit_tiny_patch16_224(pretrained=false,in_chans=5)",
            "1 or 3 channels; the network takes 5",
        ),
        ("test_vit99", "unknown model 'test_vit99'"),
    ],
)
def test_bad_names_and_options(name: str, says: str) -> None:
    with pytest.raises(MitaswapError) as caught:
        open_model(name)
    assert says in str(caught.value)


def test_no_published_weights_points_to_random_ones() -> None:
    with pytest.raises(MitaswapError, match=r"No pretrained weights.*pretrained=false"):
        open_model("test_vit4")


def test_no_head_no_logits() -> None:
    network = open_model(f"{TINY},num_classes=0)")
    assert network.num_classes == 0
    assert network.forward(network.example()).shape == (1, 32)
    with pytest.raises(MitaswapError, match=r"no classification head.*num_classes=N"):
        network.logits(network.example())


def test_features_are_no_logits() -> None:
    network = open_model(f"{TINY},num_classes=3,global_pool='',fc_norm=false)")
    with pytest.raises(MitaswapError, match="one row of class scores"):
        network.logits(network.example())


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_a_bare_module_changes_nothing_about_it(
    tiny: Network, training: bool, tmp_path: Path
) -> None:
    network = wrap(tiny.module.train(training))
    assert network.module is tiny.module
    assert tiny.module.training is training
    assert (network.arch, network.num_classes) == (tiny.arch, 10)
    assert network.preprocess.key == tiny.preprocess.key
    assert open_model(str(network.save(tmp_path / "net"))).num_classes == 10


def test_unknown_architecture_in_a_directory(tiny: Network, tmp_path: Path) -> None:
    out = tiny.save(tmp_path / "net")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "architecture": "vit_of_tomorrow"}))
    with pytest.raises(MitaswapError, match=r"unknown timm model in .*config\.json"):
        open_model(str(out))
