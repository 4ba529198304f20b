r"""Distil a trained ImageNet teacher into a student.

    python train_student_imagenet.py --tarch resnet34_imagenet_aux --arch resnet18_imagenet_aux --data ./data/ImageNet \
        --tcheckpoint ./checkpoint/train_teacher_imagenet_arch_resnet34_aux_dataset_imagenet_seed1/\
resnet34_imagenet_aux_best.pth.tar --multiprocessing-distributed --gpu-id 0,1,2,3,4,5,6,7 --manual_seed 1

Recipe: 100 epochs, batch 256 over all GPUs (times 4 views), lr 0.1, no Nesterov, x0.1 at 30/60/90.
Published, ResNet-34 -> ResNet-18: 72.16 with a frozen teacher, 72.39 with a joint one (69.75 alone).
"""

import methods
import options
from train_student_cifar import main
from training import launch


def parse_args(argv=None):
    parser = options.imagenet_parser(__file__, __doc__, arch="resnet18_imagenet_aux")
    return methods.finish_student(parser, argv, tarch="resnet34_imagenet_aux")


if __name__ == "__main__":
    launch.run(parse_args, main)
