#!/usr/bin/env bash
# HSAKD on 25, 50, 75 and 100 % of CIFAR-100's training images, ResNet-56 -> ResNet-20, jointly trained teacher of seed 0.
# Set by environment: DATA, CHECKPOINTS, GPU, SEED (three seeds were published: 0, 1, 2), PYTHON (PYTHON=echo shows the lines).
# Flags given go to every line: --resume takes up an interrupted series.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} DATA=${DATA:-./data} CHECKPOINTS=${CHECKPOINTS:-./checkpoint} GPU=${GPU:-0} SEED=${SEED:-0}

for ratio in 0.25 0.5 0.75 1.0; do
    $PYTHON train_student_few_shot.py --tarch resnet56_aux --arch resnet20_aux --few-ratio "$ratio" \
        --tcheckpoint "$CHECKPOINTS/train_teacher_cifar_arch_resnet56_aux_dataset_cifar100_seed0/resnet56_aux.pth.tar" \
        --data "$DATA" --checkpoint-dir "$CHECKPOINTS" --gpu-id "$GPU" --manual_seed "$SEED" "$@"
done
