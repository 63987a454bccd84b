"""Networks of transformers: small random configurations, saved and opened as directories."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from mitaswap.errors import MitaswapError
from mitaswap.models import Network, open_model, wrap

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {k: v for k, v in SMALL.items() if k not in ("image_size", "patch_size")} | {
    "vocab_size": 99
}
FAMILIES: dict[str, Any] = {
    "vit": lambda: transformers.ViTConfig(**SMALL, num_labels=5),
    "deit": lambda: transformers.DeiTConfig(**SMALL, num_labels=5),
    "dinov2": lambda: transformers.Dinov2Config(**SMALL, num_labels=5),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersConfig(**SMALL, num_labels=5),
    "siglip": lambda: transformers.SiglipConfig(
        vision_config=SMALL, text_config=TEXT, num_labels=5
    ),
    "clip": lambda: transformers.CLIPConfig(vision_config=SMALL, text_config=TEXT, num_labels=5),
    "beit": lambda: transformers.BeitConfig(
        **SMALL, num_labels=5, use_relative_position_bias=True, out_indices=[1]
    ),
}


def save_config(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A directory as transformers writes it, with weights and an image processor."""
    torch.manual_seed(0)
    folder = tmp_path / "vit"
    AutoModelForImageClassification.from_config(FAMILIES["vit"]()).save_pretrained(folder)
    transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.1]
    ).save_pretrained(folder)
    return folder


def photo(height: int = 50, width: int = 70) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_families_round_trip_through_plain_transformers(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_config(FAMILIES[family](), tmp_path / "config-only")
    network = open_model(f"hf:{folder}(pretrained=false)")
    assert (network.source, network.arch, network.num_classes) == ("hf", family, 5)
    assert network.module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert network.preprocess.size == (32, 32)
    x = network.example(2)
    assert network.logits(x).shape == (2, 5)
    out = network.save(tmp_path / "saved")
    plain, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(plain.eval()(x).logits, network.logits(x))
    assert AutoImageProcessor.from_pretrained(out).size["height"] == 32
    assert torch.equal(open_model(str(out)).logits(x), network.logits(x))
    assert not torch.equal(open_model(f"{out}(pretrained=false)").logits(x), network.logits(x))
    assert sorted(f.name for f in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_dinov3_has_no_head_but_runs(tmp_path: Path) -> None:
    folder = save_config(transformers.DINOv3ViTConfig(**SMALL), tmp_path / "dinov3")
    network = open_model(f"hf:{folder}(pretrained=false)")
    assert network.num_classes == 0
    assert network.module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert network.forward(network.example()).last_hidden_state.shape == (1, 1 + 16, 32)
    other = network.forward(network.example(size=(64, 48)))
    assert other.last_hidden_state.shape == (1, 1 + 48, 32)
    with pytest.raises(MitaswapError, match=r"no classification head.*num_labels=N"):
        network.logits(network.example())
    out = network.save(tmp_path / "saved")
    plain = AutoModel.from_pretrained(out).eval()
    x = network.example()
    assert torch.equal(plain(x).last_hidden_state, network.forward(x).last_hidden_state)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_other_image_sizes_are_interpolated(family: str, tmp_path: Path) -> None:
    network = open_model(f"hf:{save_config(FAMILIES[family](), tmp_path)}(pretrained=false)")
    assert network.logits(network.example(size=(64, 48))).shape == (1, 5)


# ---- preprocessing


def test_pixels_then_numbers_equal_the_processor(vit: Path) -> None:
    network = open_model(str(vit))
    pixels = network.preprocess.to_uint8(photo())
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 32, 32))
    expected = AutoImageProcessor.from_pretrained(vit)(images=photo(), return_tensors="pt")[
        "pixel_values"
    ][0]
    got = network.preprocess.normalise(pixels[None])[0]
    assert (got - expected).abs().max() < 1e-5
    assert (got - expected.flip(0)).abs().max() > 1e-2  # the comparison can fail
    assert network.preprocess.mean == pytest.approx((0.4, 0.5, 0.6))
    assert (network.preprocess.interpolation, network.preprocess.crop_pct) == ("bilinear", None)


def test_crop_and_unusual_rescaling_follow_the_processor(vit: Path) -> None:
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        rescale_factor=1 / 127.5,
        image_mean=[1.0, 1.0, 1.0],
        image_std=[1.0, 1.0, 1.0],
    )
    processor.save_pretrained(vit)
    preprocess = open_model(str(vit)).preprocess
    assert preprocess.crop_pct == pytest.approx(0.8)
    expected = processor(images=photo(), return_tensors="pt")["pixel_values"][0]
    got = preprocess.normalise(preprocess.to_uint8(photo())[None])[0]
    assert (got - expected).abs().max() < 1e-5
    copy = pickle.loads(pickle.dumps(preprocess))
    assert copy.key == preprocess.key
    assert torch.equal(copy.to_uint8(photo()), preprocess.to_uint8(photo()))


def test_key_follows_the_pixels_and_not_the_normalisation(vit: Path) -> None:
    first = open_model(str(vit)).preprocess
    config = vit / "preprocessor_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "image_mean": [0.0, 0.0, 0.0]}))
    assert open_model(str(vit)).preprocess.key == first.key
    config.write_text(json.dumps({**fields, "resample": 3}))
    assert open_model(str(vit)).preprocess.key != first.key


def test_images_that_stay_of_many_sizes_are_refused(vit: Path) -> None:
    transformers.BitImageProcessor(
        size={"shortest_edge": 32}, do_center_crop=False
    ).save_pretrained(vit)
    preprocess = open_model(str(vit)).preprocess
    with pytest.raises(MitaswapError, match="images of several sizes do not make a batch"):
        preprocess.to_uint8(photo())


def test_without_a_processor_the_usual_one_is_taken_and_said(
    vit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (vit / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING, logger="mitaswap"):
        network = open_model(str(vit))
    assert (
        "without an image processor: images are squashed to 32 x 32, mean and std are 0.5"
        in caplog.text
    )
    assert network.preprocess.mean == pytest.approx((0.5, 0.5, 0.5))


def test_broken_processor_is_named(vit: Path) -> None:
    (vit / "preprocessor_config.json").write_text("{")
    with pytest.raises(MitaswapError, match=r"cannot read the image processor of .*vit"):
        open_model(str(vit))


# ---- options, heads and extra keys


def test_options_override_the_configuration(vit: Path) -> None:
    network = open_model(
        f"hf:{vit}(pretrained=false,num_hidden_layers=1,image_size=48,num_labels=7)"
    )
    assert network.num_classes == 7
    assert len(network.module.vit.layers) == 1  # type: ignore[union-attr, arg-type]
    assert network.preprocess.size == (48, 48)
    assert network.preprocess.to_uint8(photo()).shape == (3, 48, 48)
    assert network.logits(network.example()).shape == (1, 7)


def test_vision_options_of_two_tower_configurations(tmp_path: Path) -> None:
    folder = save_config(FAMILIES["clip"](), tmp_path)
    network = open_model(f"{folder}(pretrained=false,image_size=64)")
    assert network.preprocess.size == (64, 64)
    assert network.module.config.vision_config.image_size == 64  # type: ignore[union-attr]


def test_backbone_weights_have_no_head_until_one_is_asked_for(
    vit: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    AutoModelForImageClassification.from_pretrained(vit).vit.save_pretrained(tmp_path / "backbone")
    with caplog.at_level(logging.WARNING, logger="mitaswap"):
        network = open_model(str(tmp_path / "backbone"))
    assert network.num_classes == 0
    assert "head is new and random (classifier.bias, classifier.weight)" in caplog.text
    with pytest.raises(MitaswapError, match="no classification head"):
        network.logits(network.example())
    again = network.save(tmp_path / "again")
    assert not any("classifier" in key for key in load_file(again / "model.safetensors"))
    assert open_model(str(again)).num_classes == 0
    headed = open_model(f"{tmp_path / 'backbone'}(num_labels=4)")
    assert headed.logits(headed.example()).shape == (1, 4)
    x, whole = headed.example(), open_model(str(vit))
    assert torch.equal(headed.module.vit(x)[0], whole.module.vit(x)[0])  # type: ignore[operator]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_reset_head_replaces_the_head_alone_and_is_saved(family: str, tmp_path: Path) -> None:
    network = open_model(f"hf:{save_config(FAMILIES[family](), tmp_path)}(pretrained=false)")
    network.class_names = tuple("abcde")
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    network.reset_head(3)
    after = network.module.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    # biases may be zero before and after, but not in shape
    assert changed == {"classifier.weight", "classifier.bias"}
    assert (network.num_classes, network.class_names) == (3, None)
    scores = network.logits(network.example(2))
    assert scores.shape == (2, 3) and not network.module.training
    labels = torch.tensor([0, 2])  # transformers' own loss knows the new number too
    assert network.module(network.example(2), labels=labels).loss.isfinite()
    again = open_model(str(network.save(tmp_path / "out")))
    assert again.num_classes == 3 and torch.equal(again.logits(again.example(2)), scores)


def test_no_head_to_replace(tmp_path: Path) -> None:
    folder = save_config(transformers.DINOv3ViTConfig(**SMALL), tmp_path / "dinov3")
    network = open_model(f"hf:{folder}(pretrained=false)")
    with pytest.raises(MitaswapError, match="has no classification head to replace"):
        network.reset_head(3)
    assert network.num_classes == 0


def test_a_random_head_that_counts_as_none_is_replaced(vit: Path, tmp_path: Path) -> None:
    AutoModelForImageClassification.from_pretrained(vit).vit.save_pretrained(tmp_path / "backbone")
    network = open_model(str(tmp_path / "backbone"))
    network.reset_head(4)
    assert open_model(str(network.save(tmp_path / "out"))).num_classes == 4


def test_another_number_of_labels_means_a_new_head(vit: Path) -> None:
    assert open_model(f"{vit}(num_labels=9)").logits(torch.zeros(1, 3, 32, 32)).shape == (1, 9)


def test_extra_keys_are_kept_beside_upstreams_and_do_not_stick(vit: Path, tmp_path: Path) -> None:
    network = open_model(str(vit))
    out = network.save(tmp_path / "out", extra_config={"mitaswap": {"trained_with": "agent(n=4)"}})
    again = open_model(str(out))
    assert again.config["mitaswap"] == {"trained_with": "agent(n=4)"}
    assert torch.equal(again.logits(again.example()), network.logits(network.example()))
    plain = again.save(tmp_path / "plain")
    assert "mitaswap" not in json.loads((plain / "config.json").read_text())


def test_class_names_come_and_go_with_the_configuration(vit: Path, tmp_path: Path) -> None:
    network: Network = open_model(str(vit))
    assert network.class_names is None  # LABEL_0, LABEL_1, ... name nothing
    network.class_names = ("a", "b", "c", "d", "e")
    assert open_model(str(network.save(tmp_path / "out"))).class_names == ("a", "b", "c", "d", "e")


def test_given_state_dict_is_written_instead_of_the_modules(vit: Path, tmp_path: Path) -> None:
    network = open_model(str(vit))
    state = {k: torch.zeros_like(v) for k, v in network.module.state_dict().items()}
    network.module.add_module("mita_extra", torch.nn.LayerNorm(2))
    out = network.save(tmp_path / "out", state_dict=state)
    assert (
        load_file(out / "model.safetensors").keys() == load_file(vit / "model.safetensors").keys()
    )
    again = open_model(str(out))
    assert again.logits(again.example()).abs().max() == 0


# ---- weights files and errors


def test_bare_weights_file_with_a_directory_as_arch(vit: Path, tmp_path: Path) -> None:
    whole = open_model(str(vit))
    weights = tmp_path / "w.safetensors"
    weights.write_bytes((vit / "model.safetensors").read_bytes())
    folder = save_config(FAMILIES["vit"](), tmp_path / "config-only")
    network = open_model(str(weights), arch=f"hf:{folder}")
    assert torch.equal(network.logits(network.example()), whole.logits(whole.example()))
    assert network.module.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    for option, says in (
        ("num_hidden_layers=3", r"missing vit\.\S+.* more"),
        ("num_hidden_layers=1", r"unexpected vit\.\S+.* more"),
        ("num_labels=3", r"of another shape classifier\.bias, classifier\.weight"),
    ):
        with pytest.raises(MitaswapError, match=f"do not fit .*{says}"):
            open_model(str(weights), arch=f"hf:{folder}({option})")
    headless = {k: v for k, v in load_file(weights).items() if "classifier" not in k}
    save_file(headless, weights, metadata={"format": "pt"})
    with pytest.raises(MitaswapError, match="missing classifier"):
        open_model(str(weights), arch=f"hf:{folder}")


def test_directory_weights_that_do_not_fit(vit: Path) -> None:
    with pytest.raises(MitaswapError, match=r"do not fit .*missing vit\.\S+"):
        open_model(f"{vit}(num_hidden_layers=3)")
    with pytest.raises(
        MitaswapError, match=r"of another shape vit\.embeddings\.position_embeddings"
    ):
        open_model(f"{vit}(image_size=64)")


def test_directory_with_damaged_weights(vit: Path) -> None:
    weights = vit / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(
        MitaswapError, match=r"cannot read the weights of .*model\.safetensors.*broken"
    ):
        open_model(str(vit))
    weights.unlink()
    with pytest.raises(MitaswapError, match=r"no file named model.safetensors"):
        open_model(str(vit))


def test_unknown_option_suggests_the_field(vit: Path) -> None:
    with pytest.raises(
        MitaswapError, match=r"'num_hiden_layers'. Did you mean 'num_hidden_layers'"
    ):
        open_model(f"{vit}(num_hiden_layers=3)")


def test_value_that_the_configuration_refuses(vit: Path) -> None:
    with pytest.raises(MitaswapError, match="num_hidden_layers"):
        open_model(f"{vit}(num_hidden_layers=many)")


def test_remote_code_is_not_run_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}})
    )
    with pytest.raises(
        MitaswapError, match=r"code of its own, which is not run.*--trust-remote-code"
    ):
        open_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_of_tomorrow"}))
    with pytest.raises(MitaswapError, match=r"transformers cannot open .*vit_of_tomorrow"):
        open_model(str(tmp_path))


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_a_bare_module_changes_nothing_about_it(vit: Path, training: bool) -> None:
    module = AutoModelForImageClassification.from_pretrained(vit).train(training)
    network = wrap(module)
    assert network.module is module
    assert module.training is training
    assert (network.source, network.num_classes) == ("hf", 5)
    assert network.preprocess.mean == pytest.approx((0.4, 0.5, 0.6))  # the directory's processor
    with pytest.raises(MitaswapError, match="neither timm's nor transformers'"):
        wrap(torch.nn.Linear(2, 2))
