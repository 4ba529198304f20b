"""Test published or own weights: accuracy of the backbone and of every auxiliary classifier, size, cost, speed.

    python test_model.py --arch wrn_16_2_aux --student-weights ./checkpoint/.../wrn_16_2_aux_best.pth.tar

Reads every layout that `utils.load_weights` knows. Rotations and number of classes are read off the weights.
"""

import json
import time

import torch

import distributed
import loading
import methods
import models
import options
import utils
from metrics import cost, evaluate
from precision import resolve_precision, type_name


def parse_args(argv=None):
    """Parse the command line."""
    parser = options.base_parser(__file__, __doc__, arch="wrn_16_2_aux")
    parser.set_defaults(amp="off")
    add = parser.add_argument
    add("--student-weights", type=options.path, required=True, help="weights to test")
    options.add_net(add, "--student-weights")
    add("--export-backbone", type=options.path, metavar="FILE", help="write the backbone out as a plain checkpoint")
    add("--json", action="store_true", help="print one JSON object")
    args = options.finish(parser, argv)
    if models.is_pair(args.arch):
        args.arch = models.member_name(args.arch)
    if args.export_backbone is not None:
        options.check_export(parser, args.export_backbone, args.student_weights)
    return args


def export_backbone(network, content, acc, path):
    """Write the backbone's weights in the layout of a checkpoint, with what `content` says of the training images.

    `acc` is its accuracy, or None where only some of the images were tested.
    """
    backbone = getattr(network, "backbone", network)
    about = {"arch": models.backbone_name(network.arch), "num_classes": backbone.head.out_features}
    about |= {"acc": acc, "epoch": utils.recorded(content).get("recorded_epoch")}
    about |= {key: content[key] for key in ("dataset", "size", "data") if key in content}
    utils.save_checkpoint({"net": utils.to_cpu(backbone.state_dict()), **about}, path)


def main(args, world):
    """Test the weights and print the results."""
    num_classes, rotations = utils.weights_layout(args.student_weights)
    network = models.create(args.arch, num_classes, rotations or 4)
    content = utils.load_weights(network, args.student_weights, args.net)
    network = network.to(world.device, memory_format=torch.channels_last).eval()
    images = loading.load_test(args, world, content.get("size"))
    if len(images.classes) != num_classes:
        raise utils.UserError(f"{args.student_weights}: {num_classes} classes, but {args.dataset} has {len(images.classes)}")
    loading.warn_of_other_data(content, images, args.student_weights)
    precision = resolve_precision(args.amp, world.device)
    tested = evaluate(network, images, world.device, precision, heads=True)  # first: it also warms the device up
    began = time.perf_counter()
    evaluate(network, images, world.device, precision)
    seconds = time.perf_counter() - began
    result = {
        "arch": args.arch,
        "dataset": args.dataset,
        "num_classes": num_classes,
        "method": methods.method_of(content, rotations if models.is_aux(args.arch) else None),
        **utils.recorded(content),
        "images": images.total,
        "precision": type_name(precision),
        **tested,
        **cost(network, images.size),
        "images_per_second": images.total / seconds,
    }
    if not world.is_main:
        return
    print(json.dumps(utils.json_ready(result)) if args.json else "\n".join(lines(result)), flush=True)
    if args.export_backbone:
        export_backbone(network, content, None if args.limit_batches else result["top1"], args.export_backbone)


def lines(result):
    """Return the result as lines for a reader."""
    for name, value in result.items():
        if isinstance(value, dict):
            yield f"{name}: {value['parameters'] / 1e6:.2f} M parameters, {value['multiply_adds'] / 1e6:.2f} M multiply-adds"
        else:
            yield f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}"


if __name__ == "__main__":
    distributed.run(parse_args, main)
