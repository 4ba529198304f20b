#!/usr/bin/env bash
# Two ResNet-18 that teach each other on ImageNet: "HSSAKD (online)".
DATA=${DATA:-./data/ImageNet} GPU=${GPU:-0,1,2,3,4,5,6,7}
source "$(dirname "$0")/common.sh"

train train_online_kd_imagenet.py "${several[@]}" --arch resnet18_resnet18
