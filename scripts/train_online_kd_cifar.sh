#!/usr/bin/env bash
# Two networks that teach each other on CIFAR-100: column "HSSAKD (online)".
source "$(dirname "$0")/common.sh"

for pair in $online_pairs; do
    train train_online_kd_cifar.py --arch "$pair"
done
