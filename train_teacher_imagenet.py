r"""Train an ImageNet teacher with auxiliary classifiers: on top of a frozen pre-trained backbone, or jointly.

    python train_teacher_imagenet.py --freezed --pretrained-backbone ./pretrained_backbones/resnet34-333f7ec4.pth \
        --data ./data/ImageNet/ --multiprocessing-distributed --gpu 0,1,2,3,4,5,6,7 --manual_seed 0
    python train_teacher_imagenet.py --data ./data/ImageNet/ --multiprocessing-distributed --gpu 0,1,2,3,4,5,6,7 \
        --manual_seed 1

Recipe: 100 epochs, batch 256 over all GPUs (times 4 views), lr 0.1, no Nesterov, x0.1 at 30/60/90.
Published: ResNet-34 73.31 (frozen, torchvision's), 75.48 (joint).
"""

import options
from train_teacher_cifar import main
from training import launch


def parse_args(argv=None):
    return options.finish_teacher(options.imagenet_parser(__file__, __doc__, arch="resnet34_imagenet_aux"), argv)


if __name__ == "__main__":
    launch.run(parse_args, main)
