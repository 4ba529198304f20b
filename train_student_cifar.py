r"""Distil a trained teacher into a student, by HSAKD or another method (`--method`).

    python train_student_cifar.py --tarch wrn_40_2_aux --arch wrn_16_2_aux --manual_seed 0 \
        --tcheckpoint ./checkpoint/train_teacher_cifar_arch_wrn_40_2_aux_dataset_cifar100_seed0/wrn_40_2_aux.pth.tar

Recipe: 240 epochs, batch 64 (times 4 views), lr 0.05 (0.01 for MobileNetV2 and the ShuffleNets), x0.1 at 150/180/210.
Published on CIFAR-100, WRN-40-2 -> WRN-16-2: HSAKD 78.67 with a joint teacher, 77.20 with a frozen one.
"""

import imagesets
import methods
import options
import utils
from training import Trainer, launch
from training.start import load_backbone, suited


def parse_args(argv=None):
    return methods.finish_student(options.training_parser(__file__, __doc__, arch="wrn_16_2_aux"), argv)


def main(args, world):
    utils.seed_all(args.manual_seed)
    method, checkpoint = methods.find(args.method), utils.Checkpoint(args.tcheckpoint, args.weights_key, args.tarch)
    data = imagesets.load(**options.data_settings(args), world=world)
    teacher = methods.load_teacher(args, checkpoint, data.num_classes, data.size)
    student = options.create(args, args.arch, data.num_classes, data.size, method.rotations)
    teacher = suited(teacher, checkpoint, data.test, args.teacher_mean, args.teacher_std)
    args.digests = {args.tcheckpoint: checkpoint.digest, **load_backbone(student, args.pretrained_backbone, data)}
    objective = method(teacher, **methods.constants_of(args, method), **options.loss_settings(args, data))
    Trainer(student, objective, **data.batches(), **options.trainer_settings(args), world=world).fit()


if __name__ == "__main__":
    launch.run(parse_args, main)
