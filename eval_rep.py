r"""Train a linear classifier on a frozen backbone's features of another data set: how well they transfer.

    python eval_rep.py --arch mobilenetV2 --dataset STL-10 --data ./data/ --s-path \
        ./checkpoint/train_student_cifar_tarch_vgg13_bn_aux_arch_mobilenetV2_aux_dataset_cifar100_seed0/mobilenetV2_aux.pth.tar

Recipe: 100 epochs, batch 64, lr 0.1, no weight decay, x0.1 at 30/60/90, random resized crops of 32 pixels and flips.
The weights may be those of a baseline, a teacher, a student or a mutual pair (`--net` chooses the network).
Published for MobileNetV2 taught by VGG-13 on CIFAR-100: 74.66 on STL-10, 42.57 on TinyImageNet.
"""

import torch
from torch import nn

import imagesets
import methods
import models
import options
import utils
from training import Trainer, launch

SIZE = 32  # pixels a side that the backbones were trained on


class LinearProbe(nn.Module):
    """A new linear classifier, `head`, on a frozen `encoder` that stays in eval mode: (B, 3, H, W) -> (B, N)."""

    def __init__(self, encoder, num_classes):
        super().__init__()
        self.arch = encoder.arch
        # Not named `backbone`: what tests "the backbone" would take the source's own classifier for the probe.
        self.encoder = encoder.requires_grad_(False).eval()
        self.head = nn.Linear(encoder.head.in_features, num_classes)
        if encoder.arch.startswith("mobilenet"):  # as its released code initialises linear layers
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    def train(self, mode=True):
        """Set the mode of the head; the encoder's BatchNorm statistics stand."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images):
        """Return the class logits (B, N)."""
        with torch.no_grad():
            _, features = self.encoder.features(images)
        return self.head(features)


def parse_args(argv=None):
    parser = options.training_parser(__file__, __doc__, "mobilenetV2", "stl10", epochs=100, milestones=(30, 60, 90))
    parser.recipe |= {"init_lr": 0.1, "weight_decay": 0.0}
    parser.add_argument(
        "--s-path", type=options.path, required=True, help="weights of the backbone, or of a whole network"
    )
    options.add_choice(parser.add_argument, "--s-path")
    args = options.finish(parser, argv)
    # Neither auxiliary classifiers nor the other network of a pair have a part in this.
    args.arch = models.backbone_name(args.arch, args.net or 1)
    if args.dataset == "imagenet":
        parser.error("--dataset imagenet: the probe sees images of 32 pixels: read the same folders as imagefolder")
    if models.is_imagenet(args.arch) or models.is_external(args.arch):
        parser.error(f"--arch {args.arch} is not for images of 32 pixels: the probe is for CIFAR's backbones")
    return args


def main(args, world):
    utils.seed_all(args.manual_seed)
    checkpoint = utils.Checkpoint(args.s_path, args.weights_key)  # a wrong path shows before the data is read
    args.digests = {args.s_path: checkpoint.digest}
    backbone = models.create(args.arch, checkpoint.num_classes)
    checkpoint.load_into(backbone, args.net)
    data = imagesets.load(**options.data_settings(args), crop_size=SIZE, world=world)
    probe = LinearProbe(backbone, data.num_classes)
    objective = methods.Supervised(**options.loss_settings(args, data))
    Trainer(probe, objective, **data.batches(), **options.trainer_settings(args), world=world).fit()


if __name__ == "__main__":
    launch.run(parse_args, main)
