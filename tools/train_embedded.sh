#!/bin/sh
# Trains the four networks that come with the package, each with its own attention and nothing else different.
# Copy OUT/NAME/{model.safetensors,config.json,README.md} to mitaswap/embedded/NAME to ship them.
set -eu
MITASWAP=${MITASWAP:-.venv/bin/mitaswap} OUT=${OUT:-runs/embedded} DEVICE=${DEVICE:-auto} EPOCHS=${EPOCHS:-14} LR=${LR:-1.5e-3}
MODEL="timm:vit_tiny_patch16_224(img_size=32,patch_size=2,embed_dim=64,depth=4,num_heads=4,mlp_ratio=3,num_classes=10,crop_pct=1.0)"

train() { # name, mechanism
  $MITASWAP train "$MODEL" --to "$2" --data digit-scenes --no-aug --hflip 0 \
    --epochs "$EPOCHS" -b 256 --lr "$LR" --warmup-epochs 1 --smoothing 0 --eval-every 2 \
    --seed 0 --device "$DEVICE" -j "${WORKERS:-4}" -o "$OUT/$1"
}

train standard standard &
train linear linear &
train agent "agent(n=49)" &
train mita "mita(m=25,k=25)" &
wait
