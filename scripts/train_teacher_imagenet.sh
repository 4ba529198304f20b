#!/usr/bin/env bash
# ImageNet's ResNet-34 teachers: seed 0 on torchvision's frozen backbone ("Teacher"), seed 1 jointly ("Teacher*").
# Set by environment: DATA, CHECKPOINTS, GPU (one id or several: 0,1,2,3), URL, PYTHON (PYTHON=echo shows the lines).
# Flags given go to every line: --resume takes up an interrupted series.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} DATA=${DATA:-./data/ImageNet/} CHECKPOINTS=${CHECKPOINTS:-./checkpoint/} GPU=${GPU:-0,1,2,3,4,5,6,7}
URL=${URL:-tcp://127.0.0.1:55515}

common=(--dist-url "$URL" --data "$DATA" --dist-backend nccl --multiprocessing-distributed --checkpoint-dir "$CHECKPOINTS"
    --gpu "$GPU" --world-size 1 --rank 0 "$@")
$PYTHON train_teacher_imagenet.py "${common[@]}" \
    --pretrained-backbone ./pretrained_backbones/resnet34-333f7ec4.pth --freezed --manual_seed 0
$PYTHON train_teacher_imagenet.py "${common[@]}" --manual_seed 1
