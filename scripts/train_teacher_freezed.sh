#!/usr/bin/env bash
# Teachers with a frozen backbone on CIFAR-100, row "Teacher": 100 epochs train the auxiliary classifiers only.
# The backbones come from train_baseline_cifar.sh. Files of RepDistiller's and mdistiller's teacher zoos load as well.
source "$(dirname "$0")/common.sh"

for arch in $teachers; do
    train train_teacher_cifar.py --arch "${arch}_aux" --freezed --tag freezed \
        --pretrained-backbone "$CHECKPOINTS/train_baseline_cifar_arch_${arch}_dataset_cifar100_seed$SEED/$arch.pth.tar"
done
