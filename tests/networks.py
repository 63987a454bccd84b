"""Small random networks for the tests of the surgery: every family that it promises to serve, and
the ones that it must refuse. Built once, handed out as copies; nothing is downloaded.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
import transformers
from timm.models import vision_transformer
from timm.models.hiera import Hiera
from timm.models.maxxvit import MaxxVit, MaxxVitCfg
from timm.models.nest import Nest
from timm.models.volo import VOLO
from torch import Tensor, nn

from mitaswap.mechanisms import MECHANISMS, Card, Mechanism, SiteShape

Example = Any  # what `walk` and `swap` take: a batch, or keyword arguments
Model = Any  # an nn.Module; type checkers know too little of the attributes of one


@dataclass(frozen=True)
class Network:
    """One network of the tests.

    Args:
        make: builds it, with whatever weights the library gives.
        route: how the seam takes its attention call: "source", "interface" or "mode".
        example: its input; None where `walk` and `swap` find one by themselves.
        moves: a mechanism that must change the output, the negative control of the identity.
    """

    make: Callable[[], nn.Module]
    route: str = "source"
    example: Callable[[], Example] | None = None
    moves: str = "mita(m=4,k=4)"


def images(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    """Random images; the same for the same size."""
    generator = torch.Generator().manual_seed(height * width)
    return torch.randn(batch, 3, height, width, generator=generator)


def run(model: Any, example: Example) -> Tensor:
    """The network's output for an example, as one tensor."""
    output = model(**example) if isinstance(example, dict) else model(example)
    if isinstance(output, Tensor):
        return output
    found = (getattr(output, name, None) for name in ("logits", "image_embeds", "pooler_output"))
    return next((t for t in found if t is not None), output[0])


# ------------------------------------------------------------------------------------------- timm

_SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 5}


def timm_vit(name: str = "vit_tiny_patch16_224", img_size: int | None = 64, **kwargs: Any) -> Model:
    """A timm network with two layers of width 32."""
    return timm.create_model(name, **{**_SMALL, "img_size": img_size, **kwargs})


def _volo() -> nn.Module:
    return VOLO(
        layers=[1, 1],
        img_size=64,
        num_classes=5,
        patch_size=8,
        stem_hidden_dim=8,
        embed_dims=[16, 32],
        num_heads=[2, 4],
        downsamples=(True, False),
        outlook_attention=(True, False),
        mlp_ratio=2.0,
        post_layers=("ca",),
        use_mix_token=False,
    )


def _coatnet() -> nn.Module:
    layers = MaxxVitCfg(embed_dim=(32, 32), depths=(1, 1), block_type=("C", "T"), stem_width=8)
    return MaxxVit(layers, img_size=64, num_classes=5)


def _hiera() -> nn.Module:
    return Hiera(
        img_size=(64, 64), embed_dim=8, num_heads=1, stages=(1, 1, 1), q_pool=2, num_classes=5
    )


def _nest() -> nn.Module:
    return Nest(
        img_size=32,
        patch_size=4,
        num_levels=2,
        embed_dims=(16, 16),
        num_heads=(2, 2),
        depths=(1, 1),
        num_classes=5,
    )


# ----------------------------------------------------------------------------------- Hugging Face

_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_IMAGE: dict[str, Any] = {**_TINY, "image_size": 64, "patch_size": 16, "num_labels": 5}
_TEXT: dict[str, Any] = {
    **_TINY,
    "vocab_size": 99,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def hf(family: str, model: str = "ForImageClassification", **kwargs: Any) -> Model:
    """A Hugging Face network with two layers of width 32: `hf("ViT")`, `hf("Yolos", "Model")`."""
    config = getattr(transformers, f"{family}Config")(**{**_IMAGE, **kwargs})
    return getattr(transformers, f"{family}{model}")(config)


def hf_towers(family: str, model: str = "ForImageClassification", **vision: Any) -> Model:
    """The same for families with a vision and a text tower."""
    towers = {"vision_config": {**_IMAGE, **vision}, "text_config": _TEXT}
    config = getattr(transformers, f"{family}Config")(**towers, projection_dim=16, num_labels=5)
    return getattr(transformers, f"{family}{model}")(config)


def text_and_images(tokens: int = 20) -> dict[str, Tensor]:
    """An example for both towers."""
    generator = torch.Generator().manual_seed(tokens)
    words = torch.randint(3, 90, (2, tokens), generator=generator)
    return {"input_ids": words, "pixel_values": images()}


# -------------------------------------------------------------------------------------- hand-made


def attend_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention call in a function that the module's own source does not show."""
    return F.scaled_dot_product_attention(q, k, v)


class PlainAttention(nn.Module):
    """Multi-head self-attention whose attention call is a function that it is given."""

    def __init__(self, attend: Callable[..., Tensor] = attend_elsewhere) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(32, 32)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, 32))


class UnitScaleAttention(PlainAttention):
    """Attention with its own scale, as Gemma 4's: logits are q k^T."""

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, 32))


class PlainNetwork(nn.Module):
    """Patches, attention layers, mean, classifier: for attention modules that no library has."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))


class Registers(PlainNetwork):
    """Special tokens on both sides of the patches, joined as told; behind them as in ViT-5.

    Args:
        join: "cat", "cat-twice", "assign", "pad", or, out of sight, "copy" and "hstack".
    """

    def __init__(self, before: int = 0, after: int = 4, join: str = "cat") -> None:
        super().__init__(PlainAttention(), PlainAttention())
        self.before, self.after, self.join = before, after, join
        self.registers = nn.Parameter(torch.zeros(1, before + after, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        special = self.registers.expand(len(x), -1, -1)
        front, behind = special[:, : self.before], special[:, self.before :]
        tokens = x.shape[1]
        if self.join == "cat":
            x = torch.cat([front, x, behind], 1)
        elif self.join == "cat-twice":  # taken apart again, as by RoPE that spares special tokens
            x = torch.cat((torch.cat((front, x), dim=1), behind), dim=1)
            x = torch.cat([x[:, : self.before + 3], x[:, self.before + 3 :] + 1.0], dim=-2)
        elif self.join == "hstack":
            x = torch.hstack([front, x, behind])
        elif self.join == "pad":
            x = F.pad(x, (0, 0, self.before, self.after))
        else:
            whole = x.new_zeros(len(x), self.before + tokens + self.after, 32)
            if self.join == "assign":
                whole[:, self.before : self.before + tokens] = x
            else:
                whole[:, self.before : self.before + tokens].copy_(x)
            x = whole
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x.mean(1))


# -------------------------------------------------------------------------------------- the table

#: networks that can be swapped
SERVED: dict[str, Network] = {
    "timm-vit": Network(timm_vit),
    "timm-deit-distilled": Network(lambda: timm_vit("deit_tiny_distilled_patch16_224")),
    "timm-deit3": Network(lambda: timm_vit("deit3_small_patch16_224")),
    "timm-dinov2-registers": Network(lambda: timm_vit("vit_small_patch14_reg4_dinov2", 56)),
    "timm-eva02": Network(lambda: timm_vit("eva02_tiny_patch14_224", 56)),
    "timm-dinov3": Network(lambda: timm_vit("vit_small_patch16_dinov3")),
    "timm-siglip": Network(lambda: timm_vit("vit_base_patch16_siglip_224")),
    "timm-beit": Network(lambda: timm_vit("beit_base_patch16_224"), moves="sharper"),
    "timm-relpos": Network(lambda: timm_vit("vit_relpos_small_patch16_224"), moves="sharper"),
    "timm-parallel": Network(
        lambda: timm_vit(
            "vit_base_patch16_224", block_fn=vision_transformer.ParallelScalingBlock, qk_norm=True
        )
    ),
    "timm-pit": Network(
        lambda: timm.create_model(
            "pit_ti_224", img_size=64, base_dims=(8, 8, 8), depth=(1, 1, 1), num_classes=5
        )
    ),
    "timm-volo": Network(_volo, example=images),
    "timm-coatnet": Network(_coatnet, example=images, moves="sharper"),
    "hf-vit": Network(lambda: hf("ViT"), "interface"),
    "hf-deit": Network(lambda: hf("DeiT"), "interface"),
    "hf-dinov2": Network(lambda: hf("Dinov2"), "interface"),
    "hf-dinov2-registers": Network(lambda: hf("Dinov2WithRegisters"), "interface"),
    "hf-dinov3": Network(lambda: hf("DINOv3ViT", "Model", num_register_tokens=4), "interface"),
    "hf-siglip": Network(lambda: hf_towers("Siglip"), "interface"),
    "hf-clip-vision": Network(lambda: hf_towers("CLIP"), "interface"),
    "hf-clip": Network(lambda: hf_towers("CLIP", "Model"), "interface", text_and_images),
    "hf-beit": Network(lambda: hf("Beit"), "interface"),
    "hf-beit-relative": Network(
        lambda: hf("Beit", use_relative_position_bias=True), "interface", moves="sharper"
    ),
    "hf-yolos": Network(
        lambda: hf("Yolos", "Model", image_size=[64, 64], num_detection_tokens=7), "interface"
    ),
    "hf-data2vec": Network(lambda: hf("Data2VecVision")),
    "hf-data2vec-relative": Network(
        lambda: hf("Data2VecVision", use_relative_position_bias=True), moves="sharper"
    ),
    "hf-timm-wrapper": Network(
        lambda: transformers.TimmWrapperForImageClassification(
            transformers.TimmWrapperConfig(
                architecture="vit_tiny_patch16_224",
                model_args={"depth": 2, "embed_dim": 32, "num_heads": 4, "img_size": 64},
            )
        ),
        example=images,
    ),
    "hand-made": Network(
        lambda: PlainNetwork(PlainAttention(), PlainAttention()), "mode", example=images
    ),
    "registers-behind": Network(Registers, "mode", example=images),
}

#: networks without a site, or with sites that must be refused
REFUSED: dict[str, Network] = {
    "hf-vit-eager": Network(lambda: hf("ViT", attn_implementation="eager")),
    "hf-vitdet": Network(lambda: hf("VitDet", "Model", pretrain_image_size=64)),
    "hf-pixtral": Network(lambda: hf("PixtralVision", "Model")),
    "hf-siglip2": Network(
        lambda: hf("Siglip2Vision", "Model", num_patches=16),
    ),
    "hf-vit-mae": Network(lambda: hf("ViTMAE", "Model", mask_ratio=0.0)),
    "hf-llama4": Network(
        lambda: hf(
            "Llama4Vision",
            "Model",
            intermediate_size=128,
            projector_input_dim=32,
            projector_output_dim=32,
            vision_output_dim=32,
        )
    ),
    "timm-cait": Network(lambda: timm_vit("cait_xxs24_224", depth=1)),
    "timm-xcit": Network(lambda: timm_vit("xcit_nano_12_p16_224", depth=1)),
    "timm-hiera": Network(_hiera, example=images),
    "timm-nest": Network(_nest, example=lambda: images(32, 32)),
    "timm-swin": Network(
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            embed_dim=8,
            depths=(1, 1),
            num_heads=(1, 2),
            img_size=56,
            num_classes=5,
        )
    ),
    "timm-sam": Network(
        lambda: timm_vit("samvit_base_patch16", global_attn_indexes=(1,)), example=images
    ),
    "timm-diff": Network(lambda: timm_vit("vit_base_patch16_224", attn_layer="diff")),
    "timm-naflex": Network(lambda: timm_vit("naflexvit_base_patch16_gap", img_size=None)),
}

PADDED = {
    "pixel_values": torch.zeros(2, 16, 768),
    "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 9 + [0] * 7]),
    "spatial_shapes": torch.tensor([[4, 4], [3, 3]]),
}


@functools.cache
def _pristine(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = SERVED.get(name) or REFUSED[name]
    return awaken(network.make()).eval()


def build(name: str) -> Model:
    """A fresh copy of a network of the table, in eval mode."""
    return copy.deepcopy(_pristine(name))


def example_of(name: str) -> Example:
    """The network's input: its own example, or images of its size."""
    network = SERVED.get(name) or REFUSED[name]
    if network.example is not None:
        return network.example()
    small = name in ("timm-dinov2-registers", "timm-eva02", "timm-swin")
    return images(56, 56) if small else images()


def awaken(model: Model) -> Model:
    """Random weights under which attention matters.

    Libraries start with nearly uniform attention, layer scales of 1e-5 and zero biases: there every
    mechanism gives the same output, and a test that compares them proves nothing.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("gamma", "gamma_1", "gamma_2", "lambda1", "lambda_1", "lambda_2")):
                weight.fill_(1.0)
            elif weight.ndim >= 2:
                fan_in = max(math.prod(weight.shape[1:]), 1)
                if "pos" in name or "token" in name or "bias" in name:
                    fan_in = 1
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 / fan_in**0.5)
            elif name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


# ----------------------------------------------------------------------------- mechanisms of tests


class Sharper(Mechanism):
    """Softmax attention at twice the scale; takes a bias, so it can move networks that have one."""

    card = Card(
        "none", "MLP", "1", "all pairs", "all-to-one", "a test", "N^2 d", untrained="usable"
    )
    supports = frozenset({"bias", "dropout"})

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        extra.pop("layout")
        return F.scaled_dot_product_attention(q, k, v, scale=2 * extra.pop("scale"), **extra)


class Gated(Mechanism):
    """Softmax attention times a learned gate per head, which `build` creates: a learned extra."""

    card = Sharper.card
    gate: nn.Parameter

    def build(self, site: SiteShape) -> None:
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, site.heads))

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, scale=extra["scale"])
        return out * self.gate.to(out.dtype)[:, None, None]


class FromInput(Mechanism):
    """Softmax attention times one plus the mean of the module's input: it needs x."""

    card = Sharper.card
    needs = frozenset({"x"})

    def build(self, site: SiteShape) -> None:
        self.weight = nn.Parameter(torch.ones(site.width))

    def reference(self, q: Tensor, k: Tensor, v: Tensor, **extra: Any) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, scale=extra["scale"])
        return out * (1 + (extra["x"] @ self.weight.to(out.dtype)))[:, None, :, None]


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small are computed faster by one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def registered(**mechanisms: type[Mechanism]) -> Iterator[None]:
    """Enter mechanisms under these names for the length of the block."""
    MECHANISMS.names()  # the real ones come first
    for name, mechanism in mechanisms.items():
        MECHANISMS.register(name)(mechanism)
    try:
        yield
    finally:
        for name in mechanisms:
            del MECHANISMS._entries[name]


# ------------------------------------------------------------------------------------- comparisons


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a swap could leave behind: classes, attributes, hooks, children, storages, modes.

    Compare two of the same model with ==. Attributes are held by identity, in order.
    """

    def state(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, id(entry)) for key, entry in value.items()]
        return id(value)

    modules = {
        path: (type(module), [(key, state(value)) for key, value in vars(module).items()])
        for path, module in model.named_modules()
    }
    storages = {name: t.data_ptr() for name, t in model.state_dict(keep_vars=True).items()}
    return {"modules": modules, "storages": storages}


def gradients(model: nn.Module, example: Example) -> dict[str, Any]:
    """Gradient of every parameter for one fixed loss; random layers draw the same each time."""
    torch.manual_seed(0)
    model.zero_grad()
    output = run(model, example)
    output.pow(2).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two sets of gradients are equal to the bit, missing ones included."""
    return a.keys() == b.keys() and all(
        (x is None and b[name] is None)
        or (x is not None and b[name] is not None and torch.equal(x, b[name]))
        for name, x in a.items()
    )
