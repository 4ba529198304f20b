#!/usr/bin/env bash
# HSAKD on 25, 50, 75 and 100 % of CIFAR-100's training images, ResNet-56 -> ResNet-20, jointly trained teacher of seed 0.
source "$(dirname "$0")/common.sh"

for ratio in $few_ratios; do
    train train_student_few_shot.py --tarch resnet56_aux --arch resnet20_aux --few-ratio "$ratio" \
        --tcheckpoint "$CHECKPOINTS/train_teacher_cifar_arch_resnet56_aux_dataset_cifar100_seed0/resnet56_aux.pth.tar"
done
