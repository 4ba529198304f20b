#!/usr/bin/env bash
# ImageNet's ResNet-18 students: seed 0 of the frozen teacher ("HSAKD"), seed 1 of the joint one ("HSAKD*").
# Set by environment: DATA, CHECKPOINTS, GPU (one id or several: 0,1,2,3), URL, PYTHON (PYTHON=echo shows the lines).
# Flags given go to every line: --resume takes up an interrupted series.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} DATA=${DATA:-./data/ImageNet/} CHECKPOINTS=${CHECKPOINTS:-./checkpoint/} GPU=${GPU:-0,1,2,3,4,5,6,7}
URL=${URL:-tcp://127.0.0.1:2222}

for seed in 0 1; do
    $PYTHON train_student_imagenet.py --data "$DATA" --arch resnet18_imagenet_aux --tarch resnet34_imagenet_aux \
        --tcheckpoint "$CHECKPOINTS/train_teacher_imagenet_arch_resnet34_aux_dataset_imagenet_seed$seed/resnet34_imagenet_aux_best.pth.tar" \
        --checkpoint-dir "$CHECKPOINTS" --dist-url "$URL" --dist-backend nccl --multiprocessing-distributed \
        --gpu-id "$GPU" --world-size 1 --rank 0 --manual_seed "$seed" "$@"
done
