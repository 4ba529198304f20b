"""Test published or own weights: accuracy of the backbone and of every auxiliary classifier, size, cost, speed.

    python test_model.py --arch wrn_16_2_aux --student-weights ./checkpoint/.../wrn_16_2_aux_best.pth.tar

Reads every layout that `utils.Checkpoint` knows. Rotations and number of classes are read off the weights.
"""

import json
import time

import imagesets
import options
import utils
from models.cost import cost
from training import launch, speed, start
from training.metrics import by_class, confusion, evaluate, table_of
from training.precision import resolve_precision, type_name

KINDS = {None: "a plain backbone", 1: "DPCD (heads over classes)", 4: "HSAKD (heads over class and rotation)"}


def parse_args(argv=None):
    parser = options.base_parser(__file__, __doc__, arch=None)
    parser.set_defaults(amp="off")
    add = parser.add_argument
    add("--student-weights", type=options.path, required=True, help="weights to test")
    options.add_choice(add, "--student-weights")
    add("--json", action="store_true", help="print one JSON object")
    add("--confusion", type=options.path, metavar="FILE.png", help="draw the confusion matrix")
    options.add_networks(parser)
    return options.finish(parser, argv)


def main(args, world):
    checkpoint = utils.Checkpoint(args.student_weights, args.weights_key, args.arch)
    num_classes, rotations = checkpoint.widths
    args.arch = options.named(args.arch, checkpoint, args.net)
    recorded = {**options.own_reading(args.arch, checkpoint.info), **imagesets.recorded(checkpoint.info)}
    images = imagesets.load_test(**{**recorded, **options.test_settings(args)}, world=world)
    network = options.create(args, args.arch, num_classes, images.size, rotations or 4, checkpoint)
    checkpoint.load_into(network, args.net)
    network = network.to(world.device, memory_format=speed.common_layout([network], images)).eval()
    if len(images.classes) != num_classes:
        classes = f"{num_classes} classes, but {args.dataset} has {len(images.classes)}"
        raise utils.UserError(f"{args.student_weights}: {classes}")
    if args.class_names and args.class_names != images.classes:
        raise utils.UserError("--class-names: these are not the classes of the images")
    start.warn_of_other_images(network, checkpoint, images)
    precision = resolve_precision(args.amp, world.device)
    tested = evaluate(network, images, world.device, precision, heads=True)  # first: it also warms the device up
    began = time.perf_counter()
    matrix = confusion(network, images, world.device, precision).cpu()
    seconds = time.perf_counter() - began
    result = {
        "arch": args.arch,
        "dataset": args.dataset,
        "num_classes": num_classes,
        "method": checkpoint.content.get("method") or KINDS[rotations],
        **checkpoint.recorded,
        "images": images.total,
        "mean": images.statistics[0],
        "std": images.statistics[1],
        "precision": type_name(precision),
        **tested,
        **cost(network, images.size),
        "images_per_second": images.total / seconds,
    }
    if args.confusion and world.is_main:
        from tools.figures import draw_confusion  # matplotlib takes a second

        draw_confusion(matrix, images.classes, args.confusion)
    classes = by_class(matrix, images.classes)
    shown = [*table_of(classes), *lines(result)]
    utils.print_main(json.dumps({**result, "classes": classes}) if args.json else "\n".join(shown))


def lines(result):
    """Return the result as lines for a reader."""
    for name, value in result.items():
        if isinstance(value, dict):
            millions = [f"{value[key] / 1e6:.2f} M {key.replace('_', '-')}" for key in ("parameters", "multiply_adds")]
            yield f"{name}: {', '.join(millions)}"
        elif isinstance(value, (list, tuple)):
            yield f"{name}: {' '.join(f'{number:.4g}' for number in value)}"
        else:
            yield f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}"


if __name__ == "__main__":
    launch.run(parse_args, main)
