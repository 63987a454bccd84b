#!/bin/sh
# The numbers of reports/h100-kernels, on a machine with one CUDA device and nothing else on it:
#   sh benchmarks/gpu.sh [core|models|length ...]      all three by default
# MITASWAP: the command; OUT: where runs go (the same command continues them); REPORT: the report.
set -e
MITASWAP=${MITASWAP:-mitaswap}
OUT=${OUT:-runs/gpu}
REPORT=${REPORT:-$OUT/report}
SECONDS_EACH=${SECONDS_EACH:-0.5}
[ $# -gt 0 ] || set -- core models length

core() {  # attention alone; as many images as have 65,536 tokens together, 6 heads of 64
    $MITASWAP bench --run "mita(m=25,k=25),agent,linear" --tokens 196,1024,4096,16384,65536 \
        --total-tokens 65536 --dtype float16 --bench both --cuda-graph \
        --seconds "$SECONDS_EACH" -o "$OUT/core"
    $MITASWAP bench --run "mita(m=49,k=49),mita(m=128,k=128)" --tokens 1024,4096,16384,65536 \
        --total-tokens 65536 --dtype float16 --cuda-graph --seconds "$SECONDS_EACH" -o "$OUT/wide"
}

models() {  # whole networks, each at its fastest batch
    for model in deit_small_patch16_224 vit_base_patch16_224; do
        $MITASWAP bench "timm:$model" --run "mita(m=25,k=25)" --img-size 224,512,1024,2048 \
            -b auto --dtype bfloat16 --channels-last --compile \
            --seconds "$SECONDS_EACH" -o "$OUT/$model"
    done
}

length() {  # the paper's Fig. 6: three layers of width 128, m k = N / 4
    shape="embed_dim=128,depth=3,num_heads=2,patch_size=1,class_token=False,global_pool=avg"
    for side in 32 64 128 256 512 1024; do
        half=$((side / 2))
        batch=auto
        [ "$side" -lt 1024 ] || batch=1  # full attention takes seconds there
        $MITASWAP bench "timm:vit_tiny_patch16_224(img_size=$side,$shape)" \
            --run "mita(m=$half,k=$half)" --img-size "$side" -b $batch --dtype float16 \
            --channels-last --compile --seconds "$SECONDS_EACH" -o "$OUT/length-$side"
    done
}

for part in "$@"; do
    "$part"
done
$MITASWAP report "$OUT"/*/ -o "$REPORT"
