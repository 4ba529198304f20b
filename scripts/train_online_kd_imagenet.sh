#!/usr/bin/env bash
# Two ResNet-18 that teach each other on ImageNet: "HSSAKD (Online)".
# Set by environment: DATA, CHECKPOINTS, GPU (one id or several: 0,1,2,3), URL, PYTHON (PYTHON=echo shows the lines).
# Flags given go to every line: --resume takes up an interrupted series.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} DATA=${DATA:-./data/ImageNet/} CHECKPOINTS=${CHECKPOINTS:-./checkpoint/} GPU=${GPU:-0,1,2,3,4,5,6,7}
URL=${URL:-tcp://127.0.0.1:2222}

$PYTHON train_online_kd_imagenet.py --data "$DATA" --arch resnet18_resnet18 --checkpoint-dir "$CHECKPOINTS" \
    --dist-url "$URL" --dist-backend nccl --multiprocessing-distributed --gpu-id "$GPU" --world-size 1 --rank 0 "$@"
