#!/usr/bin/env bash
# Test every network of the tables. Edit the variables, or set them by environment; delete the lines not wanted.
# Flags given go to every line, such as --amp auto.
set -uo pipefail # no -e: weights that are not there cost one line, not the rest
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
DATA=${DATA:-./data}
CHECKPOINTS=${CHECKPOINTS:-./checkpoint}
GPU=${GPU:-0}
SEED=${SEED:-0}
flags=("$@")
WEIGHTS=${WEIGHTS-_best} # _best: epoch selected on the test set, as published; empty: the last epoch

# check ARCH RUN [flags]: the weights of ARCH in the run folder RUN
check() {
    $PYTHON test_model.py --arch "$1" --student-weights "$CHECKPOINTS/$2/$1$WEIGHTS.pth.tar" "${@:3}" \
        --data "$DATA" --gpu-id "$GPU" ${flags[@]+"${flags[@]}"} # as older bash needs it where there are none
}
end=dataset_cifar100_seed$SEED

# Baselines
for arch in wrn_40_2 resnet56 resnet32x4 vgg13_bn ResNet50 wrn_16_2 wrn_40_1 resnet20 resnet8x4 vgg8_bn \
    mobilenetV2 mobilenetV2_s2 ShuffleV1 ShuffleV2; do
    check $arch train_baseline_cifar_arch_${arch}_$end
done

# Teachers: trained jointly, with a frozen backbone, and with one view for DPCD
for arch in wrn_40_2_aux resnet56_aux resnet32x4_aux vgg13_bn_aux ResNet50_aux; do
    check $arch train_teacher_cifar_arch_${arch}_$end
    WEIGHTS='' check $arch train_teacher_cifar_arch_${arch}_${end}_freezed # its backbone is as good in every epoch
    check $arch train_teacher_cifar_arch_${arch}_${end}_one_view
done

# HSAKD students, of jointly trained and of frozen teachers, and KD's
for pair in wrn_40_2:wrn_16_2 wrn_40_2:wrn_40_1 resnet56:resnet20 resnet32x4:resnet8x4 \
    vgg13_bn:mobilenetV2 ResNet50:mobilenetV2 wrn_40_2:ShuffleV1 resnet32x4:ShuffleV2; do
    teacher=${pair%:*} student=${pair#*:}
    check ${student}_aux train_student_cifar_tarch_${teacher}_aux_arch_${student}_aux_$end
    check ${student}_aux train_student_cifar_tarch_${teacher}_aux_arch_${student}_aux_${end}_freezed
    check $student train_student_cifar_tarch_${teacher}_arch_${student}_${end}_kd
done

# DPCD students
for pair in wrn_40_2:wrn_16_2 resnet32x4:resnet8x4 resnet56:resnet20 wrn_40_2:wrn_40_1 vgg13_bn:vgg8_bn \
    resnet32x4:ShuffleV2 ResNet50:mobilenetV2_s2 resnet32x4:ShuffleV1 wrn_40_2:ShuffleV1; do
    teacher=${pair%:*} student=${pair#*:}
    check ${student}_aux train_student_cifar_tarch_${teacher}_aux_arch_${student}_aux_${end}_dpcd
done

# Few-shot students
for ratio in 0.25 0.5 0.75 1; do
    check resnet20_aux train_student_few_shot_tarch_resnet56_aux_arch_resnet20_aux_dataset_cifar100_few_ratio_${ratio}_seed$SEED
done

# Online mutual pairs, both networks
for pair in WRN_40_2_WRN_40_2 WRN_40_1_WRN_40_1 resnet56_resnet56 resnet32x4_resnet32x4 \
    vgg13_vgg13 mbv2_mbv2 shufflev1_shufflev1 shufflev2_shufflev2; do
    check $pair train_online_kd_cifar_arch_${pair}_$end --net 1
    check $pair train_online_kd_cifar_arch_${pair}_$end --net 2
done
