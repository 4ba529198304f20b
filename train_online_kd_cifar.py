"""Train two networks that teach each other, without a teacher: online mutual distillation (HSSAKD).

    python train_online_kd_cifar.py --arch WRN_40_2_WRN_40_2 --manual_seed 0

Recipe: 240 epochs, batch 64 (times 4 views), lr 0.05 (0.01 for MobileNetV2 and the ShuffleNets), x0.1 at 150/180/210.
Published on CIFAR-100: WRN-40-2 82.58, ResNet-56 78.16, ResNet-32x4 84.91, VGG-13 80.44, MobileNetV2 78.85.
"""

import imagesets
import methods
import options
import utils
from training import Trainer, launch
from training.start import load_backbone


def parse_args(argv=None):
    return methods.finish_pair(options.training_parser(__file__, __doc__, arch="WRN_40_2_WRN_40_2"), argv)


def main(args, world):
    utils.seed_all(args.manual_seed)
    data = imagesets.load(**options.data_settings(args), world=world)
    pair = options.create(args, args.arch, data.num_classes, data.size)
    args.digests = load_backbone(pair, args.pretrained_backbone, data, args.weights_key)
    objective = methods.HSSAKD(**methods.constants_of(args, methods.HSSAKD), **options.loss_settings(args, data))
    Trainer(pair, objective, **data.batches(), **options.trainer_settings(args), world=world).fit()


if __name__ == "__main__":
    launch.run(parse_args, main)
