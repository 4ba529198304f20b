#!/usr/bin/env bash
# Teachers with a frozen backbone on CIFAR-100, row "Teacher": only the auxiliary classifiers train, 100 epochs.
# The backbones come from train_baseline_cifar.sh; the files of RepDistiller's teacher zoo load as well.
# Set by environment: DATA, CHECKPOINTS, GPU, SEED (three seeds were published: 0, 1, 2), PYTHON (PYTHON=echo shows the lines).
# Flags given go to every line: --resume takes up an interrupted series.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} DATA=${DATA:-./data} CHECKPOINTS=${CHECKPOINTS:-./checkpoint} GPU=${GPU:-0} SEED=${SEED:-0}

for backbone in wrn_40_2 resnet56 resnet32x4 vgg13_bn ResNet50; do
    $PYTHON train_teacher_cifar.py --arch "${backbone}_aux" --freezed --tag freezed \
        --pretrained-backbone "$CHECKPOINTS/train_baseline_cifar_arch_${backbone}_dataset_cifar100_seed$SEED/$backbone.pth.tar" \
        --data "$DATA" --checkpoint-dir "$CHECKPOINTS" --gpu-id "$GPU" --manual_seed "$SEED" "$@"
done
