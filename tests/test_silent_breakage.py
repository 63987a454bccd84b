"""Situations in which a swap could go wrong without a word, each of them measured on real networks
(the numbers are those of the design's list): every one is a clear error or the right behaviour.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import transformers
from networks import (
    PADDED,
    Gated,
    Model,
    PlainAttention,
    PlainNetwork,
    Registers,
    Sharper,
    UnitScaleAttention,
    awaken,
    build,
    example_of,
    gradients,
    hf,
    hf_towers,
    images,
    one_thread,
    registered,
    run,
    same,
    snapshot,
    text_and_images,
    timm_vit,
)
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import mitaswap
from mitaswap import TokenLayout, mechanism
from mitaswap.errors import SwapError
from mitaswap.mechanisms import MECHANISMS
from mitaswap.surgery import Site, swap, swapped_sites, walk
from mitaswap.surgery.interface import INTERFACE

GRID = ["linear", "agent(n=4)", "mita(m=4,k=4)"]  # none of them takes a bias, a mask or dropout


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def mechanisms_of_the_tests() -> Iterator[None]:
    with registered(gated=Gated, sharper=Sharper):
        yield


def awake(model: nn.Module) -> Model:
    return awaken(model).eval()


def reasons(model: nn.Module, example: Any = None) -> dict[str, str | None]:
    return {site.path: site.reason for site in walk(model, example)}


def refused(model: nn.Module, example: Any, message: str) -> list[Site]:
    """No mechanism can be swapped in, the message says why, and the model stays as it was."""
    before = snapshot(model)
    with pytest.raises(SwapError, match=message):
        swap(model, "standard", example=example)
    assert snapshot(model) == before
    return walk(model, example)


def test_01_padding_masks_arrive_at_swapped_layers() -> None:
    """transformers drops padding masks for an attention function whose masks it does not know."""
    model = awake(hf("ViT", "Model"))
    keep = torch.tensor([[1] * 17, [1] * 9 + [0] * 8])
    with torch.no_grad():
        untouched = model(images(), attention_mask=keep)[0]
        assert not torch.equal(untouched, model(images())[0]), "the mask must matter"
        with swap(model, "standard"):
            assert torch.equal(model(images(), attention_mask=keep)[0], untouched)
        with swap(model, "linear"), pytest.raises(SwapError, match=r"an attention mask or bias"):
            model(images(), attention_mask=keep)
    ours = [name for name in AttentionInterface._global_mapping if name.startswith(INTERFACE)]
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    assert ours and all(masks[name] is masks["sdpa"] for name in ours)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_02_causal_text_towers_are_left_alone(padded: bool) -> None:
    """Its 20 tokens could be taken for 4 + 4 x 4: they have a class in common with the images."""
    model, example = build("hf-clip"), text_and_images(20)
    if padded:
        example["attention_mask"] = torch.tensor([[1] * 20, [1] * 12 + [0] * 8])
    text = [site for site in walk(model, example) if site.path.startswith("text_model")]
    assert [site.reason for site in text] == [
        "causal attention: a text tower, whose tokens have no grid"
    ] * 2
    with torch.no_grad():
        untouched = model(**example)
        with swap(model, "linear", example=example):
            assert all(path.startswith("vision_model.") for path in swapped_sites(model))
            swapped = model(**example)
    assert torch.equal(swapped.text_embeds, untouched.text_embeds)
    assert not torch.allclose(swapped.image_embeds, untouched.image_embeds, atol=1e-2)
    with pytest.raises(SwapError, match=r"text_model.* cannot be swapped: causal attention"):
        swap(model, "linear", "text_model.*", example=example)


def test_02_text_towers_that_are_not_causal_are_left_alone() -> None:
    """SigLIP's text tower is bidirectional, here as long as the image has patches."""
    model, example = awake(hf_towers("Siglip", "Model")), text_and_images(16)
    sites = {site.path: site for site in walk(model, example) if "self_attn" in site.path}
    assert {site.tokens for site in sites.values()} == {16}
    for path, site in sites.items():
        if path.startswith("text_model"):
            assert (
                site.reason is not None and "no feature map explains its 16 tokens" in site.reason
            )
        else:
            assert site.layout == TokenLayout(0, (4, 4))


def test_03_models_outside_the_interface_are_swapped_or_refused_never_ignored() -> None:
    for name in ("hf-data2vec", "hf-timm-wrapper"):  # their set_attn_implementation does nothing
        model, example = build(name), example_of(name)
        with torch.no_grad():
            untouched = run(model, example)
            with swap(model, "linear", example=example):
                assert len(swapped_sites(model)) == 2
                assert not torch.allclose(run(model, example), untouched, atol=1e-2)
    refused(build("hf-vitdet"), None, r"VitDetModel has no site .*layer.0.attention: .*an adapter")


def test_03_segment_anything_is_judged_layer_by_layer() -> None:
    config = transformers.SamVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=16,
        mlp_dim=64,
        output_channels=8,
        global_attn_indexes=[1],
        window_size=2,
        num_pos_feats=8,
    )
    model = awake(transformers.SamVisionModel(config))
    windows, whole = walk(model)
    assert windows.reason == "attention inside windows (4 sequences of 4 per image)"
    assert (whole.reason, whole.bias, str(whole.layout)) == (None, "bias", "0 + 4x4")
    with swap(model, "standard"):
        assert list(swapped_sites(model)) == [whole.path]
    with pytest.raises(SwapError, match=rf"{whole.path} .* uses an additive attention bias"):
        swap(model, "mita(m=4,k=4)")


def test_04_timm_hand_written_softmax_is_switched_off_while_swapped() -> None:
    model = build("timm-vit")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with torch.no_grad():
        untouched = run(model, images())
        before = snapshot(model)
        with swap(model, "standard"):
            torch.testing.assert_close(run(model, images()), untouched)
        with swap(model, "linear"):
            assert not torch.allclose(run(model, images()), untouched, atol=1e-2)
            attention: Any = model.get_submodule("blocks.1.attn")
            with pytest.raises(
                SwapError,
                match=r"blocks.1.attn is swapped to linear: fused_attn=False would byp.*"
                "Call mitaswap.revert",
            ):
                attention.fused_attn = False
            attention.fused_attn = True
            assert attention.fused_attn
        assert snapshot(model) == before
        assert attention.fused_attn is False
        assert torch.equal(run(model, images()), untouched)


def test_04_hugging_face_eager_is_refused_with_the_remedy() -> None:
    model = build("hf-vit-eager")
    sites = refused(model, None, r"vit.layers.0.attention: computes attention by 'eager', past sc")
    assert all("call model.set_attn_implementation('sdpa')" in str(site.reason) for site in sites)
    model.set_attn_implementation("sdpa")
    with swap(model, "linear"):
        assert len(swapped_sites(model)) == 2
    chosen_at_build = awake(hf("Data2VecVision", attn_implementation="eager"))
    refused(chosen_at_build, None, r"by hand.*; load the model with attn_implementation='sdpa'")


def test_04_other_attention_functions_are_refused_with_the_remedy() -> None:
    """Also one that calls sdpa: what it does around that call would be lost."""

    def averaging(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> Any:
        return value.mean(2, keepdim=True).expand_as(value).transpose(1, 2), None

    def sharper(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return sdpa(query * 2, key, value).transpose(1, 2), None

    for function in (averaging, sharper):
        AttentionInterface.register("of_the_user", function)
        try:
            model = build("hf-vit")
            model.set_attn_implementation("of_the_user")
            refused(model, None, r"attention by 'of_the_user', past .*attn_implementation='sdpa'")
        finally:
            del AttentionInterface._global_mapping["of_the_user"]


class Choosy(PlainAttention):
    """Attention that looks at its own class, and so notices that it was swapped."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        if type(self) is Choosy:
            out = sdpa(q, k, v)
        else:
            out = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, 32))


def test_04_a_module_that_bypasses_the_seam_is_found_by_the_verification() -> None:
    model = awake(PlainNetwork(UnitScaleAttention(), Choosy()))
    assert all(site.swappable for site in walk(model, images()))
    before = snapshot(model)
    with pytest.raises(
        SwapError,
        match=r"layers.1: 0 attention calls arrived at the mechanism .* expected 1; the "
        "module bypasses the seam, nothing was changed",
    ):
        swap(model, "linear", example=images())
    assert snapshot(model) == before


@pytest.mark.parametrize("spec", GRID)
@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("timm-beit", "blocks.0.attn"),
        ("timm-relpos", "blocks.0.attn"),
        ("timm-coatnet", "stages.1.blocks.0.attn"),
        ("hf-beit-relative", "beit.layers.0.attention"),
        ("hf-data2vec-relative", "data2vec_vision.encoder.layer.0.attention.attention"),
    ],
)
def test_05_a_relative_position_bias_is_never_dropped(name: str, site: str, spec: str) -> None:
    model, example = build(name), example_of(name)
    before = snapshot(model)
    with pytest.raises(SwapError) as error:
        swap(model, spec, example=example)
    assert str(error.value).startswith(f"{site} (")
    assert "uses an additive attention bias, which" in str(error.value)
    assert str(mechanism(spec).spec) in str(error.value)
    assert "`mitaswap ls` shows which mechanisms can" in str(error.value)
    assert snapshot(model) == before


def test_06_padded_batches_of_patches_are_refused() -> None:
    """NaFlex and SigLIP 2 cut images into sequences of patches: there is no grid of the batch."""
    sites = refused(build("hf-siglip2"), PADDED, r"no feature map explains its 16 tokens")
    assert sites[0].bias == "mask"
    refused(build("timm-naflex"), images(), r"blocks.0.attn: no feature map explains its")


@pytest.mark.parametrize("name", ["timm-vit", "timm-eva02", "timm-parallel"])
def test_07_masks_given_to_a_timm_forward_are_honoured_or_refused(name: str) -> None:
    model, example = build(name), example_of(name)
    mask = torch.ones(17, 17, dtype=torch.bool).tril(3)
    for extra, what in (
        ({"attn_mask": mask}, "an attention mask"),
        ({"is_causal": True}, "is_cau"),
    ):
        with torch.no_grad():
            untouched = model.forward_features(example, **extra)
            assert not torch.allclose(untouched, model.forward_features(example), atol=1e-2)
            with swap(model, "standard"):
                assert torch.equal(model.forward_features(example, **extra), untouched)
            for spec in GRID:
                with (
                    swap(model, spec),
                    pytest.raises(SwapError, match=rf"blocks.0.*{what}.*cannot honour.*layers="),
                ):
                    model.forward_features(example, **extra)


def test_08_the_scale_of_the_network_is_honoured() -> None:
    model = awake(PlainNetwork(UnitScaleAttention()))
    assert walk(model, images())[0].scale == 1.0
    seen: list[float] = []
    with torch.no_grad():
        untouched = run(model, images())
        handle = swap(model, "standard", example=images())
        with handle.observe(lambda path, part, q, k, layout, scale: seen.append(scale)):
            assert torch.equal(run(model, images()), untouched)
        handle.undo()
        for spec in ("mita(m=4,k=16,variant=route-only)", "mita(m=1,k=16,variant=route-only)"):
            with swap(model, spec, example=images()):  # every key in every expert: softmax again
                torch.testing.assert_close(run(model, images()), untouched, atol=1e-4, rtol=1e-4)
    assert seen == [1.0]
    q, k, v = torch.randn(3, 1, 2, 16, 8).unbind(0)
    for spec in GRID:
        part, layout = mechanism(spec), TokenLayout(0, (4, 4))
        assert not torch.allclose(part(q, k, v, layout, 1.0), part(q, k, v, layout), atol=1e-3), (
            spec
        )


@pytest.mark.parametrize("name", ["timm", "hf"])
def test_09_attention_dropout_in_training_is_honoured_or_refused(name: str) -> None:
    if name == "timm":
        model = awake(timm_vit(attn_drop_rate=0.5))
    else:
        model = awake(hf("ViT", attention_probs_dropout_prob=0.5))
    with torch.no_grad():
        torch.manual_seed(0)
        untouched = run(model.train(), images())
        assert not torch.equal(untouched, run(model.eval(), images())), "dropout must matter"
        with swap(model, "standard"):
            torch.manual_seed(0)
            assert torch.equal(run(model.train(), images()), untouched)
        for spec in GRID:
            with swap(model.train(), spec):  # its dry run is in eval mode, as any evaluation
                run(model.eval(), images())
                with pytest.raises(
                    SwapError, match=r"0.att.*: .*attention dropout p=0.5, which .* cannot honour"
                ):
                    run(model.train(), images())


def test_10_the_grid_is_read_never_computed_from_the_number_of_tokens() -> None:
    model = awake(timm_vit(dynamic_img_size=True, class_token=False, global_pool="avg"))
    handle = swap(model, "mita(m=4,k=4)")
    grids: list[tuple[int, int]] = []
    with (
        torch.no_grad(),
        handle.observe(lambda path, part, q, k, layout, scale: grids.append(layout.grid)),
    ):
        for size in ((128, 288), (192, 192), (288, 128)):  # 144 tokens each
            run(model, images(*size))
    assert grids == [(8, 18)] * 2 + [(12, 12)] * 2 + [(18, 8)] * 2
    q, k, v = torch.randn(3, 1, 2, 144, 8).unbind(0)
    wide, square = (
        mechanism("mita(m=4,k=4)")(q, k, v, TokenLayout(0, g)) for g in ((8, 18), (12, 12))
    )
    assert not torch.allclose(wide, square), "the grid must matter"


def test_10_dropped_or_shuffled_patches_are_refused() -> None:
    model = awake(timm_vit(patch_drop_rate=0.5))
    with swap(model, "linear"):
        run(model.eval(), images())
        with pytest.raises(
            SwapError,
            match=r"blocks.0.attn: got 9 tokens, but the image was cut into 1 \+ 4x4 = 17.*"
            r"switch them off \(timm: patch_drop_rate=0\), or revert",
        ):
            run(model.train(), images())
    # with mask_ratio=0 every token is there, in random order: the number of tokens tells nothing
    refused(build("hf-vit-mae"), None, r"layers.0.attention: its tokens are shuffled")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("timm-deit-distilled", TokenLayout(2, (4, 4))),
        ("hf-deit", TokenLayout(2, (4, 4))),
        ("timm-dinov3", TokenLayout(5, (4, 4))),
        ("hf-yolos", TokenLayout(1, (4, 4), suffix=7)),
        ("timm-siglip", TokenLayout(0, (4, 4))),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value).replace(" ", ""),
)
def test_11_prefix_and_suffix_tokens_are_those_of_the_module(
    name: str, layout: TokenLayout
) -> None:
    sites = [site for site in walk(build(name)) if site.swappable]
    assert [site.layout for site in sites] == [layout] * 2


def test_11_special_tokens_that_come_and_go() -> None:
    """EoMT's queries stand in front in its last layers only; the class token of a wrapped YOLOS is
    found although the wrapper is none; Llama 4's patches leave no feature map at all.
    """
    eomt = awake(hf("Eomt", "ForUniversalSegmentation", num_queries=6, num_blocks=1))
    assert [str(site.layout) for site in walk(eomt)] == ["5 + 4x4", "11 + 4x4"]

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.yolos = build("hf-yolos")

        def forward(self, x: Tensor) -> Tensor:
            return self.yolos(x)[0]

    assert [str(site.layout) for site in walk(Wrapper(), images())] == ["1 + 4x4 + 7"] * 2
    refused(build("hf-llama4"), None, r"no feature map explains its 17 tokens")
    cait = walk(build("timm-cait"))  # the model says 1 prefix token, the module has none
    assert (cait[0].tokens, cait[0].swappable) == (16, False)


@pytest.mark.parametrize("join", ["cat", "cat-twice", "assign", "pad"])
@pytest.mark.parametrize(("before", "after"), [(0, 4), (1, 4), (3, 0), (0, 0)])
def test_11_special_tokens_behind_the_patches_are_not_taken_for_a_prefix(
    before: int, after: int, join: str
) -> None:
    layout = TokenLayout(before, (3, 5), after)
    sites = walk(Registers(before, after, join), images(48, 80))
    assert [site.layout for site in sites] == [layout] * 2


def test_11_registers_behind_give_the_landmarks_of_the_patches() -> None:
    model, seen = build("registers-behind"), []
    handle = swap(model, "mita(m=16,k=4)", example=images())
    with handle.observe(lambda path, part, q, k, layout, scale: seen.append(layout)):
        run(model, images())
    assert seen == [TokenLayout(0, (4, 4), suffix=4)] * 2


@pytest.mark.parametrize("join", ["copy", "hstack"])
def test_11_special_tokens_whose_place_cannot_be_seen_are_refused(join: str) -> None:
    """Unless the model itself says how many stand in front."""
    model: Any = Registers(1, 4, join)
    refused(model, images(), r"5 special tokens stand before or behind the patches cannot be seen")
    model.num_prefix_tokens = 1
    refused(model, images(), r"cannot be seen, and the model does not say")
    model = Registers(5, 0, join)
    model.num_prefix_tokens = 5
    assert [site.layout for site in walk(model, images())] == [TokenLayout(5, (4, 4))] * 2
    assert {site.layout for site in walk(Registers(0, 0, join), images())} == {
        TokenLayout(0, (4, 4))
    }


def test_11_patches_in_parts_or_in_another_order_are_not_taken_for_a_raster() -> None:
    class Moved(PlainNetwork):
        """A class token between or among patches that `move` puts elsewhere."""

        def __init__(self, move: Any) -> None:
            super().__init__(PlainAttention())
            self.move = move

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.layers[0](self.move(x, torch.zeros(len(x), 1, 32)))

    def swapped_halves(x: Tensor, token: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.cat([token, second, first], 1)

    moves: dict[str, Any] = {
        "in the middle": lambda x, token: torch.cat([x[:, :8], token, x[:, 8:]], 1),
        "swapped halves": swapped_halves,
        "rolled": lambda x, token: torch.cat([token, x], 1).roll(3, 1),
        "chosen": lambda x, token: torch.cat([token, x], 1)[:, torch.arange(16, -1, -1)],
        "overwritten": lambda x, token: torch.cat([token, x], 1).index_copy(
            1, torch.tensor([4]), token
        ),
    }
    for name, move in moves.items():
        (site,) = walk(Moved(move), images())
        assert not site.swappable, name
    narrowed = walk(
        Moved(lambda x, token: torch.cat([token, x, token], 1).narrow(1, 1, 17)), images()
    )
    assert [str(site.layout) for site in narrowed] == ["0 + 4x4 + 1"]


def test_12_tokens_that_are_not_in_raster_order_are_refused() -> None:
    refused(build("timm-hiera"), images(), r"blocks.0.attn: its tokens are in unroll order")


@pytest.mark.parametrize("fused", [False, True], ids=["by-hand", "fused"])
def test_13_channel_attention_is_refused(fused: bool) -> None:
    """XCiT's experimental fused path calls sdpa with features in the place of tokens."""
    model = build("timm-xcit")
    attention: Any = model.get_submodule("blocks.0.attn")
    attention.fused_attn = fused
    sites = refused(
        model, images(), r"blocks.0.attn: channel attention: its map is head dim x head"
    )
    assert attention.fused_attn is fused
    assert sites[0].path == "blocks.0.attn"


def test_14_class_attention_and_pooling_heads_are_refused() -> None:
    refused(build("timm-cait"), images(), r"blocks_token_only.0.attn: class attention: one query")
    siglip = build("timm-siglip")
    why = reasons(siglip)["attn_pool"]
    assert why == "1 queries but 16 keys: pooling, cross or class attention"
    volo = build("timm-volo")
    # by hand, with a map that is not square
    why = reasons(volo, images())["post_network.0.attn"]
    assert why == "class attention: one query, already linear in the number of tokens"
    (blocks,) = (site.path for site in walk(volo, images()) if site.swappable)
    for model, expected in ((siglip, ["blocks.0.attn", "blocks.1.attn"]), (volo, [blocks])):
        with swap(model, "linear", example=images()):
            assert list(swapped_sites(model)) == expected
    assert blocks.startswith("network."), "neither outlook nor class attention"


def test_15_other_shapes_than_one_sequence_per_head_are_refused() -> None:
    refused(
        build("timm-sam"), images(), r"attention call is 3-dimensional \[8, 16, 8\], not \[B, H"
    )
    refused(build("timm-nest"), images(32, 32), r"attention call is 5-dimensional \[2, 2, 4, 16, 8")
    mobilenet = timm.create_model("mobilenetv4_hybrid_medium", num_classes=5).eval()
    why = set(reasons(mobilenet, images(256, 256)).values())
    assert why == {
        "256 queries but 64 keys: pooling, cross or class attention",
        "4 query heads but 1 key heads",
    }


def test_15_values_of_another_width_are_served() -> None:
    class WideValues(PlainAttention):
        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, _ = x.shape
            q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).split(32, -1))
            v = torch.cat([v, v.square()], -1)
            out = sdpa(q, k, v).transpose(1, 2).reshape(batch, tokens, 64)
            return self.proj(out[..., :32] + out[..., 32:])

    model = awake(PlainNetwork(WideValues()))
    with torch.no_grad():
        untouched = run(model, images())
        with swap(model, "standard", example=images()):
            assert torch.equal(run(model, images()), untouched)
        for spec in GRID:
            with swap(model, spec, example=images()):
                assert not torch.allclose(run(model, images()), untouched, atol=1e-3)


def test_16_differential_attention_is_refused() -> None:
    refused(
        build("timm-diff"), images(), r"blocks.0.attn: differential attention: two softmax maps"
    )
    block = vision_transformer.DiffParallelScalingBlock
    parallel = awake(timm_vit("vit_base_patch16_224", block_fn=block))
    refused(parallel, images(), r"blocks.0: differential attention")

    class Twice(UnitScaleAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    twice = awake(PlainNetwork(Twice()))
    refused(twice, images(), r"layers.0: 2 attention calls in one forward")


@pytest.mark.parametrize("name", ["timm-beit", "timm-relpos", "hf-beit-relative"])
def test_17_recomputed_layers_are_swapped_too(name: str) -> None:
    """With the diversion around the whole model, checkpointing gave these wrong gradients."""
    model, example = build(name).train(), example_of(name)
    untouched = gradients(model, example)
    swap(model, "sharper", example=example)
    plain = gradients(model, example)
    if name.startswith("timm"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()
    assert same(gradients(model, example), plain)
    assert not same(plain, untouched)


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "hand-made"])
def test_18_copies_compute_with_their_own_weights(name: str) -> None:
    """A closure or a bound forward in a copy would go on using the original's weights."""
    model, example = build(name), example_of(name)
    swap(model, "gated", example=example)
    with torch.no_grad():
        output = run(model, example)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for weight in model.parameters():
                weight.add_(0.5)
            assert torch.equal(run(twin, example), output)
            for weight in model.parameters():
                weight.sub_(0.5)
        for weight in twin.parameters():
            weight.zero_()
        torch.testing.assert_close(run(model, example), output, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(run(twin, example), output, atol=1e-2)
    assert not any("forward" in vars(module) for module in model.modules())


FAMILIES = ["vit", "deit", "dinov2", "dinov2-registers", "dinov3", "siglip", "clip-vision", "clip"]


@pytest.mark.parametrize("name", [*FAMILIES, "beit", "beit-relative", "yolos", "data2vec"])
def test_19_attention_maps_that_do_not_exist_are_refused(name: str) -> None:
    """transformers would return an empty tuple."""
    model, example = build(f"hf-{name}"), example_of(f"hf-{name}")
    inputs = example if isinstance(example, dict) else {"pixel_values": example}
    with torch.no_grad():
        with swap(model, "standard", example=example):
            run(model, example)
            with pytest.raises(
                SwapError, match=r"no attention map to return; call without output_at"
            ):
                model(**inputs, output_attentions=True)
            run(model, example)
        model(**inputs, output_attentions=True)


def test_19_attention_maps_of_partly_swapped_models_and_single_layers_are_refused() -> None:
    model = build("hf-vit")
    with (
        swap(model, "linear", "1"),
        pytest.raises(SwapError, match=r"layers.1.attention is swapped"),
    ):
        model(images(), output_attentions=True)
    layer: Any = build("hf-data2vec")
    swap(layer, "linear")
    layer = layer.get_submodule("data2vec_vision.encoder.layer.0.attention.attention")
    layer(torch.randn(1, 17, 32), False)
    with pytest.raises(SwapError, match="no attention map"):
        layer(torch.randn(1, 17, 32), True)


def test_21_several_images_packed_in_one_sequence_are_refused() -> None:
    example = {"pixel_values": images(), "image_sizes": torch.tensor([[64, 64], [64, 64]])}
    refused(build("hf-pixtral"), example, r"transformer.layers.0.attention: several images packed")


def test_22_windows_are_refused() -> None:
    """A mechanism for a whole image would see 49 tokens, and windows in the place of images."""
    sites = refused(
        build("timm-swin"), images(56, 56), r"blocks.0.attn: attention inside windows \(4 sequences"
    )
    assert [site.tokens for site in sites] == [49, 49]  # the last stage is one window, without grid
    config = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=7, image_size=56, patch_size=4
    )
    refused(
        awake(transformers.SwinModel(config)),
        None,
        r"attention inside windows \(4 sequences of 49 per image\)",
    )


def test_23_attention_over_the_batch_is_no_site() -> None:
    """csatv2's spatial block takes a softmax over a map of images x images, then multiplies."""
    model = timm.create_model("csatv2", num_classes=5).eval()
    blocks = [
        path for path, m in model.named_modules() if type(m).__name__ == "SpatialTransformerBlock"
    ]
    sites = walk(model, images(128, 128))
    assert blocks and sites
    assert not {site.path for site in sites if site.swappable} & set(blocks)
    assert {site.module for site in sites if site.swappable} == {"Attention"}


def test_24_mechanisms_take_the_strides_that_networks_give() -> None:
    strided: list[bool] = []

    class Strides(Sharper):
        def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
            strided.extend(not t.is_contiguous() for t in (q, k, v))
            return super().reference(q, k, v, **extra)

    with registered(strides=Strides):
        for name in ("timm-vit", "timm-eva02"):
            swap(build(name), "strides")
    assert set(strided) == {True, False}, "contiguous after RoPE, strided without"
    layout = TokenLayout(1, (8, 8))
    q, k, v = torch.randn(2, 65, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    dense = [t.contiguous() for t in (q, k, v)]
    assert not v.is_contiguous()
    for name in ("standard", "linear", "agent", "mita"):
        for options in MECHANISMS.get(name).samples:
            part = mechanism(mitaswap.Spec(name, options))
            torch.testing.assert_close(part(q, k, v, layout), part(*dense, layout))


def test_25_a_class_that_somebody_changed_after_the_swap_is_not_reverted() -> None:
    """FSDP does this: putting the old class back would strip it."""
    model = build("timm-vit")
    handle = swap(model, "linear")
    module: Any = model.get_submodule("blocks.1.attn")
    ours = type(module)
    module.__class__ = type("FSDPSwappedAttention", (ours,), {})
    before = snapshot(model)
    for undo in (lambda: mitaswap.revert(model), handle.undo):
        with pytest.raises(
            SwapError, match=r"blocks.1.attn is a FSDPSwappedAttention now: .*Undo that first, then"
        ):
            undo()
        assert snapshot(model) == before, "all or nothing"
    module.__class__ = ours
    mitaswap.revert(model)
    assert not swapped_sites(model)


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "cu_seq_lens_q"])
def test_26_keywords_that_change_attention_are_refused(keyword: str) -> None:
    model = build("hf-vit")
    with swap(model, "standard"):
        run(model, images())
        with pytest.raises(
            SwapError, match=rf"vit.layers.0.attention: this forward brings {keyword}, which stand"
        ):
            model(images(), **{keyword: torch.ones(4)})
        model(images(), **{keyword: None})
