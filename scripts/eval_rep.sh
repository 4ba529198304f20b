#!/usr/bin/env bash
# Linear classifiers on frozen MobileNetV2 features, CIFAR-100 -> STL-10 and TinyImageNet: alone, KD and HSAKD from VGG-13.
# Data: $DATA/stl10_binary and $DATA/tiny-imagenet-200 (sorted by data/preprocess_tinyimagenet.py).
# Set by environment: DATA, CHECKPOINTS, GPU, SEED (three seeds were published: 0, 1, 2), PYTHON (PYTHON=echo shows the lines).
# Flags given go to every line: --resume takes up an interrupted series.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} DATA=${DATA:-./data} CHECKPOINTS=${CHECKPOINTS:-./checkpoint} GPU=${GPU:-0} SEED=${SEED:-0}
flags=("$@")

# probe TAG WEIGHTS
probe() {
    $PYTHON eval_rep.py --arch mobilenetV2 --dataset STL-10 --data "$DATA/" --s-path "$CHECKPOINTS/$2" --tag "$1" \
        --checkpoint-dir "$CHECKPOINTS" --gpu-id "$GPU" --manual_seed "$SEED" ${flags[@]+"${flags[@]}"}
    $PYTHON eval_rep.py --arch mobilenetV2 --dataset TinyImageNet --data "$DATA/tiny-imagenet-200/" \
        --s-path "$CHECKPOINTS/$2" --tag "$1" --checkpoint-dir "$CHECKPOINTS" --gpu-id "$GPU" --manual_seed "$SEED" ${flags[@]+"${flags[@]}"}
}

student=train_student_cifar_tarch_vgg13_bn
probe baseline "train_baseline_cifar_arch_mobilenetV2_dataset_cifar100_seed$SEED/mobilenetV2.pth.tar"
probe kd "${student}_arch_mobilenetV2_dataset_cifar100_seed${SEED}_kd/mobilenetV2.pth.tar"
probe hsakd "${student}_aux_arch_mobilenetV2_aux_dataset_cifar100_seed$SEED/mobilenetV2_aux.pth.tar"
