r"""Train two networks that teach each other on ImageNet: online mutual distillation (HSSAKD).

    python train_online_kd_imagenet.py --arch resnet18_resnet18 --data ./data/ImageNet/ \
        --multiprocessing-distributed --gpu-id 0,1,2,3,4,5,6,7

Recipe: 100 epochs, batch 256 over all GPUs (times 4 views), lr 0.1, no Nesterov, x0.1 at 30/60/90.
Published: ResNet-18 71.49 (69.75 alone).
"""

import methods
import options
from train_online_kd_cifar import main
from training import launch


def parse_args(argv=None):
    return methods.finish_pair(options.imagenet_parser(__file__, __doc__, arch="resnet18_resnet18"), argv)


if __name__ == "__main__":
    launch.run(parse_args, main)
