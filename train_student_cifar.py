r"""Distil a trained teacher into a student: HSAKD, or DPCD, KD and DKD in the same harness.

    python train_student_cifar.py --tarch wrn_40_2_aux --arch wrn_16_2_aux --manual_seed 0 \
        --tcheckpoint ./checkpoint/train_teacher_cifar_arch_wrn_40_2_aux_dataset_cifar100_seed0/wrn_40_2_aux.pth.tar

Recipe: 240 epochs, batch 64 (times 4 views), lr 0.05 (0.01 for MobileNetV2 and the ShuffleNets), x0.1 at 150/180/210.
Published on CIFAR-100, WRN-40-2 -> WRN-16-2: HSAKD 78.67 with a joint teacher, 77.20 with a frozen one.
"""

import distributed
import engine
import loading
import methods
import options
import utils


def parse_args(argv=None):
    """Parse the command line."""
    parser = options.training_parser(__file__, __doc__, arch="wrn_16_2_aux")
    methods.add_arguments(parser)
    return methods.finish(parser, argv)


def main(args, world):
    """Train the student."""
    utils.seed_all(args.manual_seed)
    utils.weights_layout(args.tcheckpoint)  # a wrong path shows before the data is read
    data = loading.load(args, world)
    student, objective = methods.create_pair(args, data.test)
    engine.fit(args, world, student, objective, data)


if __name__ == "__main__":
    distributed.run(parse_args, main)
