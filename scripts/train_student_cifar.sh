#!/usr/bin/env bash
# Distilled students on CIFAR-100: rows "HSAKD*", "HSAKD" and "KD" of the eight pairs, then DPCD's nine pairs.
# The teachers are those of seed 0, from train_teacher_cifar.sh, train_teacher_freezed.sh and train_baseline_cifar.sh.
# Set by environment: DATA, CHECKPOINTS, GPU, SEED (three seeds were published: 0, 1, 2), PYTHON (PYTHON=echo shows the lines).
# Flags given go to every line: --resume takes up an interrupted series.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python} DATA=${DATA:-./data} CHECKPOINTS=${CHECKPOINTS:-./checkpoint} GPU=${GPU:-0} SEED=${SEED:-0}
flags=("$@")

pairs="wrn_40_2:wrn_16_2 wrn_40_2:wrn_40_1 resnet56:resnet20 resnet32x4:resnet8x4
    vgg13_bn:mobilenetV2 ResNet50:mobilenetV2 wrn_40_2:ShuffleV1 resnet32x4:ShuffleV2"
dpcd_pairs="wrn_40_2:wrn_16_2 resnet32x4:resnet8x4 resnet56:resnet20 wrn_40_2:wrn_40_1 vgg13_bn:vgg8_bn
    resnet32x4:ShuffleV2 ResNet50:mobilenetV2_s2 resnet32x4:ShuffleV1 wrn_40_2:ShuffleV1"

# student TEACHER_SCRIPT TEACHER TEACHER_TAG STUDENT [flags]
student() {
    $PYTHON train_student_cifar.py --tarch "$2" --arch "$4" \
        --tcheckpoint "$CHECKPOINTS/$1_arch_$2_dataset_cifar100_seed0$3/$2.pth.tar" "${@:5}" \
        --data "$DATA" --checkpoint-dir "$CHECKPOINTS" --gpu-id "$GPU" --manual_seed "$SEED" ${flags[@]+"${flags[@]}"}
}

for pair in $pairs; do
    student train_teacher_cifar "${pair%:*}_aux" "" "${pair#*:}_aux"
    student train_teacher_cifar "${pair%:*}_aux" _freezed "${pair#*:}_aux" --tag freezed
    student train_baseline_cifar "${pair%:*}" "" "${pair#*:}" --method kd --tag kd
done
for pair in $dpcd_pairs; do
    student train_teacher_cifar "${pair%:*}_aux" _one_view "${pair#*:}_aux" --method dpcd --tag dpcd
done
