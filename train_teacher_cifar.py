"""Train a teacher with auxiliary classifiers: jointly from scratch, or on top of a frozen pre-trained backbone.

    python train_teacher_cifar.py --arch wrn_40_2_aux --manual_seed 0
    python train_teacher_cifar.py --arch wrn_40_2_aux --freezed --pretrained-backbone ./wrn_40_2.pth --tag freezed

Recipe: jointly 240 epochs, x0.1 at 150/180/210; frozen 100 epochs, x0.1 at 30/60/90.
Published on CIFAR-100 (joint): WRN-40-2 80.70, ResNet-56 77.20, ResNet32x4 83.73, VGG-13 78.48, ResNet-50 83.85.
"""

import imagesets
import methods
import models
import options
import utils
from training import Trainer, launch


def parse_args(argv=None):
    """Parse the command line."""
    parser = options.training_parser(__file__, __doc__, arch="wrn_40_2_aux")
    options.add_freezing(parser)
    options.frozen_recipe(parser, argv)
    args = options.finish(parser, argv)
    options.require_aux(parser, args, "arch")
    options.check_freezing(parser, args)
    return args


def main(args, world):
    """Train the teacher."""
    utils.seed_all(args.manual_seed)
    data = imagesets.load(**options.data_settings(args), world=world)
    model = models.create(args.arch, data.num_classes, args.rotations)
    if args.pretrained_backbone:
        checkpoint = utils.load_weights(model.backbone, args.pretrained_backbone)
        imagesets.warn_of_other_data(checkpoint.info, data.test, checkpoint.path)
        args.digests = {args.pretrained_backbone: checkpoint.digest}
    if args.freezed:
        model.freeze_backbone()
    Trainer(model, methods.Teacher(), **data.batches(), **options.trainer_settings(args), world=world).fit()


if __name__ == "__main__":
    launch.run(parse_args, main)
