#!/usr/bin/env bash
# ImageNet's ResNet-18 students: seed 0 of the frozen teacher ("HSAKD"), seed 1 of the joint one ("HSAKD*"), then DPCD's.
DATA=${DATA:-./data/ImageNet} GPU=${GPU:-0,1,2,3,4,5,6,7}
source "$(dirname "$0")/common.sh"

for SEED in 0 1; do
    train train_student_imagenet.py "${several[@]}" --tarch resnet34_imagenet_aux --arch resnet18_imagenet_aux \
        --tcheckpoint "$CHECKPOINTS/train_teacher_imagenet_arch_resnet34_aux_dataset_imagenet_seed$SEED/resnet34_imagenet_aux_best.pth.tar"
done
SEED=0 train train_student_imagenet.py "${several[@]}" --method dpcd --tag dpcd \
    --tarch resnet34_imagenet --arch resnet18_imagenet_aux --tcheckpoint ./pretrained_backbones/resnet34-333f7ec4.pth
