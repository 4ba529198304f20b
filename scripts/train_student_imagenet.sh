#!/usr/bin/env bash
# ImageNet's ResNet-18 students: seed 0 of the frozen teacher ("HSAKD"), seed 1 of the joint one ("HSAKD*"), then DPCD's,
# whose published command reads the joint teacher as well. All read the teacher's best epoch.
DATA=${DATA:-./data/ImageNet} GPU=${GPU:-0,1,2,3,4,5,6,7}
source "$(dirname "$0")/common.sh"

# student SEED [flags]
student() {
    SEED=$1 train train_student_imagenet.py "${several[@]}" --tarch resnet34_imagenet_aux --arch resnet18_imagenet_aux "${@:2}" \
        --tcheckpoint "$CHECKPOINTS/train_teacher_imagenet_arch_resnet34_aux_dataset_imagenet_seed$1/resnet34_imagenet_aux_best.pth.tar"
}

student 0
student 1
student 1 --method dpcd --tag dpcd
