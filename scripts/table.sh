#!/usr/bin/env bash
# The table of methods on CIFAR-100, ResNet-20 -> ResNet-8, 15 epochs: runs what is missing, JOBS runs of one thread side
# by side. A run is done once RESULTS has its line, which is appended when it ends; commit that file. An interrupted run
# resumes.
#   scripts/table.sh                          every row and seed that is missing
#   scripts/table.sh row NAME SEED [flags]    one run
# Rows that ask how often a view may be repeated: few_V (100 images a class, 60 epochs) and all_V (12 epochs), HSAKD with
# V fixed views of an image or with V = fresh:
#   ROWS="few_fresh few_1 few_4 few_16 all_fresh all_4" SEEDS="0 1" RESULTS=results/repeats.jsonl scripts/table.sh
# Settings beside those of common.sh:
#   ROWS, SEEDS, JOBS    what is run, and how many runs at once (2)
#   RESULTS              results/table.jsonl; `python report.py results/table.jsonl` prints the table
#   TARCH, TEACHER       the teacher, resnet20_aux, and its weights
#   VIEWS, STORE         fixed views of an image (auto; fresh: none) and the folder of the teacher's stored outputs, for
#                        the methods that read logits or heads
source "$(dirname "$0")/common.sh"
export OMP_NUM_THREADS=1
ROWS=${ROWS:-alone kd dkd dist wttm crd reviewkd dpcd hssakd hsakd} SEEDS=${SEEDS:-0 1 2} JOBS=${JOBS:-2}
RESULTS=${RESULTS:-results/table.jsonl} TARCH=${TARCH:-resnet20_aux}
TEACHER=${TEACHER:-results/teacher_resnet20_cifar100.pth}
VIEWS=${VIEWS:-auto} STORE=${STORE:-$CHECKPOINTS/teacher_outputs}
networks=(--tarch "$TARCH" --arch resnet8_aux --tcheckpoint "$TEACHER")
stored=()

# student METHOD [flags]
student() {
    train train_student_cifar.py "${networks[@]}" --method "$@"
}

# row NAME SEED [flags]; schedules scale with the run: 150, 180 and 210 of 240 epochs are 9, 11 and 13 of 15, and a
# warm-up of 20 is one of 1.
row() {
    local length=(--epochs 15 --milestones 9 11 13)
    case $1 in
        few_*) length=(--epochs 60 --milestones 38 45 53) VIEWS=${1#few_} ;;
        all_*) length=(--epochs 12 --milestones 8 9 11) VIEWS=${1#all_} ;;
    esac
    if [ "$VIEWS" != fresh ]; then stored=(--views "$VIEWS" --teacher-cache "$STORE"); fi
    flags=(--dataset cifar100 "${length[@]}" --init-lr 0.05 --batch-size 64 --tag "$1" --resume "${@:3}")
    SEED=$2 CHECKPOINTS=$CHECKPOINTS/table
    case $1 in
        few_*) train train_student_few_shot.py --few-ratio 0.2 "${networks[@]}" ${stored[@]+"${stored[@]}"} ;;
        all_*) student hsakd ${stored[@]+"${stored[@]}"} ;;
        alone) train train_baseline_cifar.py --arch resnet8 ;;
        hssakd) train train_online_kd_cifar.py --arch resnet8_resnet8 ;;
        crd) student crd --negatives 4096 ;;
        reviewkd) student reviewkd --loss-warmup 1 ;;
        dkd | dpcd) student "$1" --loss-warmup 1 ${stored[@]+"${stored[@]}"} ;;
        kd | dist | wttm | hsakd | hsakd_dist) student "$1" ${stored[@]+"${stored[@]}"} ;;
        hsakd_standardized) student hsakd --standardize --kd_T 2 --kd-weight 9 ${stored[@]+"${stored[@]}"} ;;
        hsakd_strong) student hsakd --augment strong ${stored[@]+"${stored[@]}"} ;;
        *) echo "table.sh: no row $1" >&2 && exit 2 ;;
    esac
    $PYTHON -m tools.collect "$1" "$CHECKPOINTS"/train_*_seed"$SEED"_"$1" --into "$RESULTS"
}

if [ "${1-}" = row ]; then
    row "${@:2}"
    exit
fi
for SEED in $SEEDS; do
    for name in $ROWS; do
        if [ "$name" = hssakd ] && [ "$SEED" = 2 ]; then continue; fi # two networks a run: two seeds
        grep -qs "^{\"name\": \"$name\", \"seed\": $SEED," "$RESULTS" || echo "row $name $SEED"
    done
done | xargs -r -L 1 -P "$JOBS" scripts/table.sh
