#!/usr/bin/env bash
# ImageNet's ResNet-34 teachers: seed 0 on torchvision's frozen backbone ("Teacher"), seed 1 jointly ("Teacher*").
DATA=${DATA:-./data/ImageNet} GPU=${GPU:-0,1,2,3,4,5,6,7}
source "$(dirname "$0")/common.sh"

SEED=0 train train_teacher_imagenet.py "${several[@]}" --freezed \
    --pretrained-backbone ./pretrained_backbones/resnet34-333f7ec4.pth
SEED=1 train train_teacher_imagenet.py "${several[@]}"
