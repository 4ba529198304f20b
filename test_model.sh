#!/usr/bin/env bash
# Test every CIFAR-100 network of the tables. Delete the lines that you do not need. Flags given go to every line.
# The environment sets DATA, CHECKPOINTS, GPU, SEED, PYTHON as in scripts/common.sh, and
#   WEIGHTS   _best: the epoch selected on the test set, as published; empty: the last epoch
source "$(dirname "$0")/scripts/common.sh"
set +e # missing weights cost one line, not the rest
WEIGHTS=${WEIGHTS-_best}
end=dataset_cifar100_seed$SEED

# check ARCH RUN [flags]: the weights of ARCH in the run folder RUN
check() {
    $PYTHON test_model.py --arch "$1" --student-weights "$CHECKPOINTS/$2/$1$WEIGHTS.pth.tar" "${@:3}" \
        --data "$DATA" --gpu-id "$GPU" ${flags[@]+"${flags[@]}"}
}

for arch in $teachers $students; do
    check "$arch" "train_baseline_cifar_arch_${arch}_$end"
done

# Trained jointly, with a frozen backbone, and with one view for DPCD.
for arch in $teachers; do
    for tag in "" _freezed _one_view; do
        check "${arch}_aux" "train_teacher_cifar_arch_${arch}_aux_$end$tag"
    done
done

for pair in $pairs; do
    teacher=${pair%:*} student=${pair#*:}
    check "${student}_aux" "train_student_cifar_tarch_${teacher}_aux_arch_${student}_aux_$end"
    check "${student}_aux" "train_student_cifar_tarch_${teacher}_aux_arch_${student}_aux_${end}_freezed"
    check "$student" "train_student_cifar_tarch_${teacher}_arch_${student}_${end}_kd"
done
for pair in $dpcd_pairs; do
    teacher=${pair%:*} student=${pair#*:}
    check "${student}_aux" "train_student_cifar_tarch_${teacher}_aux_arch_${student}_aux_${end}_dpcd"
done
for ratio in $few_ratios; do
    check resnet20_aux "train_student_few_shot_tarch_resnet56_aux_arch_resnet20_aux_dataset_cifar100_few_ratio_${ratio}_seed$SEED"
done
for pair in $online_pairs; do
    check "$pair" "train_online_kd_cifar_arch_${pair}_$end" --net 1
    check "$pair" "train_online_kd_cifar_arch_${pair}_$end" --net 2
done
