#!/usr/bin/env bash
# Linear classifiers on frozen MobileNetV2 features, CIFAR-100 -> STL-10 and TinyImageNet: alone, KD and HSAKD from VGG-13.
# Reads $DATA/stl10_binary and $DATA/tiny-imagenet-200 (sorted by data/preprocess_tinyimagenet.py).
source "$(dirname "$0")/common.sh"

# probe TAG WEIGHTS
probe() {
    train eval_rep.py --arch mobilenetV2 --tag "$1" --s-path "$CHECKPOINTS/$2" --dataset STL-10
    DATA="$DATA/tiny-imagenet-200" \
        train eval_rep.py --arch mobilenetV2 --tag "$1" --s-path "$CHECKPOINTS/$2" --dataset TinyImageNet
}

student=train_student_cifar_tarch_vgg13_bn
probe baseline "train_baseline_cifar_arch_mobilenetV2_dataset_cifar100_seed$SEED/mobilenetV2.pth.tar"
probe kd "${student}_arch_mobilenetV2_dataset_cifar100_seed${SEED}_kd/mobilenetV2.pth.tar"
probe hsakd "${student}_aux_arch_mobilenetV2_aux_dataset_cifar100_seed$SEED/mobilenetV2_aux.pth.tar"
