#!/usr/bin/env bash
# Two networks that teach each other on CIFAR-100: column "HSSAKD (Online)".
# Set by environment: DATA, CHECKPOINTS, GPU, SEED (three seeds were published: 0, 1, 2), PYTHON (PYTHON=echo shows the lines).
# Flags given go to every line: --resume takes up an interrupted series.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} DATA=${DATA:-./data} CHECKPOINTS=${CHECKPOINTS:-./checkpoint} GPU=${GPU:-0} SEED=${SEED:-0}

pairs="WRN_40_2_WRN_40_2 WRN_40_1_WRN_40_1 resnet56_resnet56 resnet32x4_resnet32x4
    vgg13_vgg13 mbv2_mbv2 shufflev1_shufflev1 shufflev2_shufflev2"

for pair in $pairs; do
    $PYTHON train_online_kd_cifar.py --arch "$pair" \
        --data "$DATA" --checkpoint-dir "$CHECKPOINTS" --gpu-id "$GPU" --manual_seed "$SEED" "$@"
done
