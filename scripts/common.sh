# Sourced by the other files. They take these settings from the environment, and pass their own flags, such as --resume,
# to every command:
#   DATA, CHECKPOINTS  folders of the images and of the runs
#   GPU                one id, or several for ImageNet: 0,1,2,3
#   SEED               the published figures are means over three seeds: 0, 1, 2
#   URL                address of the processes of an ImageNet run
#   PYTHON             PYTHON=echo prints the commands
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python} DATA=${DATA:-./data} CHECKPOINTS=${CHECKPOINTS:-./checkpoint} GPU=${GPU:-0} SEED=${SEED:-0}
flags=("$@")

teachers="wrn_40_2 resnet56 resnet32x4 vgg13_bn ResNet50"
students="wrn_16_2 wrn_40_1 resnet20 resnet8x4 vgg8_bn mobilenetV2 mobilenetV2_s2 ShuffleV1 ShuffleV2"
pairs="wrn_40_2:wrn_16_2 wrn_40_2:wrn_40_1 resnet56:resnet20 resnet32x4:resnet8x4
    vgg13_bn:mobilenetV2 ResNet50:mobilenetV2 wrn_40_2:ShuffleV1 resnet32x4:ShuffleV2"
dpcd_pairs="wrn_40_2:wrn_16_2 resnet32x4:resnet8x4 resnet56:resnet20 wrn_40_2:wrn_40_1 vgg13_bn:vgg8_bn
    resnet32x4:ShuffleV2 ResNet50:mobilenetV2_s2 resnet32x4:ShuffleV1 wrn_40_2:ShuffleV1 vgg13_bn:mobilenetV2_s2"
online_pairs="WRN_40_2_WRN_40_2 WRN_40_1_WRN_40_1 resnet56_resnet56 resnet32x4_resnet32x4
    vgg13_vgg13 mbv2_mbv2 shufflev1_shufflev1 shufflev2_shufflev2"
few_ratios="0.25 0.5 0.75 1"
several=(--multiprocessing-distributed --dist-backend nccl --dist-url "${URL:-tcp://127.0.0.1:2222}" --world-size 1 --rank 0)

# train SCRIPT [flags]
train() {
    $PYTHON "$@" --data "$DATA" --checkpoint-dir "$CHECKPOINTS" --gpu-id "$GPU" --manual_seed "$SEED" \
        ${flags[@]+"${flags[@]}"} # bash 4.3 and older calls an empty array unbound
}
