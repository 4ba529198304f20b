r"""Distil a trained teacher into a student on a stratified share of the training set.

    python train_student_few_shot.py --tarch resnet56_aux --arch resnet20_aux --few-ratio 0.25 --manual_seed 0 \
        --tcheckpoint ./checkpoint/train_teacher_cifar_arch_resnet56_aux_dataset_cifar100_seed0/resnet56_aux.pth.tar

The student's recipe of train_student_cifar.py; the share is scikit-learn's StratifiedShuffleSplit with random_state 0.
Published on CIFAR-100, ResNet-56 -> ResNet-20: 68.50 at 25 %, 72.18 at 50 %, 73.26 at 75 %, 73.73 at 100 %.
"""

import methods
import options
from train_student_cifar import main
from training import launch


def parse_args(argv=None):
    parser = options.training_parser(__file__, __doc__, arch="wrn_16_2_aux")
    options.add_few_ratio(parser, default=0.25)
    return methods.finish_student(parser, argv)


if __name__ == "__main__":
    launch.run(parse_args, main)
