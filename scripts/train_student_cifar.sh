#!/usr/bin/env bash
# Distilled students on CIFAR-100: rows "HSAKD*", "HSAKD" and "KD" of the eight pairs, then DPCD's ten pairs.
# The teachers are those of seed 0, from train_teacher_cifar.sh, train_teacher_freezed.sh and train_baseline_cifar.sh.
source "$(dirname "$0")/common.sh"

# student TEACHER_SCRIPT TEACHER RUN_TAG_AND_FILE STUDENT [flags]
student() {
    train train_student_cifar.py --tarch "$2" --arch "$4" "${@:5}" \
        --tcheckpoint "$CHECKPOINTS/$1_arch_$2_dataset_cifar100_seed0$3.pth.tar"
}

for pair in $pairs; do
    teacher=${pair%:*} student=${pair#*:}
    student train_teacher_cifar "${teacher}_aux" "/${teacher}_aux" "${student}_aux"
    student train_teacher_cifar "${teacher}_aux" "_freezed/${teacher}_aux" "${student}_aux" --tag freezed
    student train_baseline_cifar "$teacher" "/$teacher" "$student" --method kd --tag kd
done
# DPCD's published commands read the teacher's best epoch.
for pair in $dpcd_pairs; do
    teacher=${pair%:*} student=${pair#*:}
    student train_teacher_cifar "${teacher}_aux" "_one_view/${teacher}_aux_best" "${student}_aux" --method dpcd --tag dpcd
done
