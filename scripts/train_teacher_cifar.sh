#!/usr/bin/env bash
# Jointly trained teachers on CIFAR-100: row "Teacher*" with four views for HSAKD, then with one view for DPCD.
source "$(dirname "$0")/common.sh"

for arch in $teachers; do
    train train_teacher_cifar.py --arch "${arch}_aux"
done
# DPCD uses the teacher's class logits only, so any teacher will do. Its authors' teachers saw un-rotated images.
for arch in $teachers; do
    train train_teacher_cifar.py --arch "${arch}_aux" --rotations 1 --tag one_view
done
