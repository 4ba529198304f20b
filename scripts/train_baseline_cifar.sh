#!/usr/bin/env bash
# Baselines on CIFAR-100: rows "Teacher" and "Student" of the tables.
source "$(dirname "$0")/common.sh"

for arch in $teachers $students; do
    train train_baseline_cifar.py --arch "$arch"
done
