"""Train a teacher with auxiliary classifiers: jointly from scratch, or on top of a frozen pre-trained backbone.

    python train_teacher_cifar.py --arch wrn_40_2_aux --manual_seed 0
    python train_teacher_cifar.py --arch wrn_40_2_aux --freezed --pretrained-backbone ./wrn_40_2.pth --tag freezed

Recipe: jointly 240 epochs, x0.1 at 150/180/210; frozen 100 epochs, x0.1 at 30/60/90.
Published on CIFAR-100 (joint): WRN-40-2 80.70, ResNet-56 77.20, ResNet32x4 83.73, VGG-13 78.48, ResNet-50 83.85.
"""

import imagesets
import methods
import options
import utils
from training import Trainer, launch
from training.start import load_backbone


def parse_args(argv=None):
    return options.finish_teacher(options.training_parser(__file__, __doc__, arch="wrn_40_2_aux"), argv)


def main(args, world):
    utils.seed_all(args.manual_seed)
    data = imagesets.load(**options.data_settings(args), world=world)
    model = options.create(args, args.arch, data.num_classes, data.size, args.rotations)
    args.digests = load_backbone(model, args.pretrained_backbone, data, args.weights_key, renew=not args.freezed)
    if args.freezed:
        model.freeze_backbone()
    objective = methods.Teacher(**options.loss_settings(args, data))
    Trainer(model, objective, **data.batches(), **options.trainer_settings(args), world=world).fit()


if __name__ == "__main__":
    launch.run(parse_args, main)
