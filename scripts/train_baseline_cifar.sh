#!/usr/bin/env bash
# Baselines on CIFAR-100: rows "Teacher" and "Student" of the tables. The light networks' learning rate is 0.01 by default.
# Set by environment: DATA, CHECKPOINTS, GPU, SEED (three seeds were published: 0, 1, 2), PYTHON (PYTHON=echo shows the lines).
# Flags given go to every line: --resume takes up an interrupted series.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} DATA=${DATA:-./data} CHECKPOINTS=${CHECKPOINTS:-./checkpoint} GPU=${GPU:-0} SEED=${SEED:-0}

teachers="wrn_40_2 resnet56 resnet32x4 vgg13_bn ResNet50"
students="wrn_16_2 wrn_40_1 resnet20 resnet8x4 vgg8_bn mobilenetV2 mobilenetV2_s2 ShuffleV1 ShuffleV2"

for arch in $teachers $students; do
    $PYTHON train_baseline_cifar.py --arch "$arch" \
        --data "$DATA" --checkpoint-dir "$CHECKPOINTS" --gpu-id "$GPU" --manual_seed "$SEED" "$@"
done
