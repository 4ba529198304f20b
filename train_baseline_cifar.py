"""Train a network alone, with cross-entropy: the baseline that a distilled student is measured against.

    python train_baseline_cifar.py --arch wrn_16_2 --manual_seed 0

Recipe: 240 epochs, batch 64, lr 0.05 (0.01 for MobileNetV2 and the ShuffleNets), x0.1 at 150/180/210.
Published on CIFAR-100: WRN-16-2 73.57, ResNet-20 69.62, ResNet8x4 72.95 (mean of three runs, best test epoch).
"""

import imagesets
import methods
import models
import options
import utils
from training import Trainer, launch
from training.start import load_backbone


def parse_args(argv=None):
    parser = options.training_parser(__file__, __doc__, arch="wrn_16_2")
    options.add_start(parser)
    options.add_few_ratio(parser)
    args = options.finish(parser, argv)
    if models.is_pair(args.arch):
        parser.error(f"--arch {args.arch} is a mutual pair: train it with train_online_kd_cifar.py")
    # Auxiliary classifiers have no part in this loss, so their names stand for the backbone.
    args.arch = models.backbone_name(args.arch)
    return args


def main(args, world):
    utils.seed_all(args.manual_seed)
    data = imagesets.load(**options.data_settings(args), world=world)
    model = options.create(args, args.arch, data.num_classes, data.size)
    args.digests = load_backbone(model, args.pretrained_backbone, data, args.weights_key)
    objective = methods.Supervised(**options.loss_settings(args, data))
    Trainer(model, objective, **data.batches(), **options.trainer_settings(args), world=world).fit()


if __name__ == "__main__":
    launch.run(parse_args, main)
