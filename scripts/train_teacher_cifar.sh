#!/usr/bin/env bash
# Jointly trained teachers on CIFAR-100: row "Teacher*" with four views for HSAKD, then with one view for DPCD.
# Set by environment: DATA, CHECKPOINTS, GPU, SEED (three seeds were published: 0, 1, 2), PYTHON (PYTHON=echo shows the lines).
# Flags given go to every line: --resume takes up an interrupted series.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} DATA=${DATA:-./data} CHECKPOINTS=${CHECKPOINTS:-./checkpoint} GPU=${GPU:-0} SEED=${SEED:-0}

teachers="wrn_40_2_aux resnet56_aux resnet32x4_aux vgg13_bn_aux ResNet50_aux"

for arch in $teachers; do
    $PYTHON train_teacher_cifar.py --arch "$arch" \
        --data "$DATA" --checkpoint-dir "$CHECKPOINTS" --gpu-id "$GPU" --manual_seed "$SEED" "$@"
done

# DPCD reads the teacher's class logits alone, so any teacher will do; the authors' saw un-rotated images, as these do.
for arch in $teachers; do
    $PYTHON train_teacher_cifar.py --arch "$arch" --rotations 1 --tag one_view \
        --data "$DATA" --checkpoint-dir "$CHECKPOINTS" --gpu-id "$GPU" --manual_seed "$SEED" "$@"
done
