"""Predict the classes of image files with trained weights.

    python predict.py --weights ./checkpoint/.../resnet8_best.pth.tar photo.jpg ./photos --top 3

Network, image size, normalisation and class names are those that the weights record; other people's weights take them
by flag. A folder stands for the images in and below it. An unreadable image is named on stderr and skipped; the exit
status is then 1.
"""

import csv
import json
import sys

import torch

import options
from options.parser import gpu_ids
from tools import trained
from training import launch


def parse_args(argv=None):
    parser = options.Parser(__doc__, prog="predict.py")
    parser.add_argument("images", nargs="+", type=options.path, metavar="IMAGE|FOLDER")
    trained.add_weights(parser)
    add = parser.add_argument_group("output").add_argument
    add("--top", type=options.positive, default=3, metavar="K", help="classes of each image (default: %(default)s)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--json", action="store_true", help="print a list of objects, one an image")
    add("--csv", action="store_true", help="print a line for each image and class")
    parser.add_argument("--gpu-id", type=gpu_ids, help="GPU to use")
    return parser.parse_args(argv)


def main(args, world):
    """Print the classes of the images; exit status 1 if one could not be read."""
    paths = trained.image_files(args.images)
    network = trained.load(args, world)
    found = list(predictions(network, paths, args, world))
    show = print_json if args.json else print_csv if args.csv else print_table
    show(found)
    if len(found) < len(paths):
        sys.exit(1)


@torch.no_grad()
def predictions(network, paths, args, world):
    """Yield (path, [(class, probability), ...]) of each readable image, the likeliest of its classes first."""
    for images, names in network.read(paths, args.batch_size, args.num_workers, world):
        likeliest = network.network(images).float().softmax(1).topk(min(args.top, len(network.classes)))
        for name, values, numbers in zip(names, likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            yield name, [(network.classes[number], value) for number, value in zip(numbers, values, strict=True)]


def print_json(found):
    """Print the predictions as a list of objects."""
    named = ((name, [{"class": label, "probability": value} for label, value in top]) for name, top in found)
    print(json.dumps([{"image": name, "classes": classes} for name, classes in named]))


def print_csv(found):
    """Print the predictions with a header, a line for each image and class."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("image", "rank", "class", "probability"))
    writer.writerows((name, rank, *entry) for name, top in found for rank, entry in enumerate(top, 1))


def print_table(found):
    """Print the predictions for a reader: a line for each image and class, the image's name before the first."""
    width = max([len("image"), *(len(name) for name, _ in found)])
    label = max([len("class"), *(len(entry[0]) for _, top in found for entry in top)])
    print(f"{'image':{width}}  {'class':{label}}  probability")
    for name, top in found:
        for rank, (class_name, value) in enumerate(top):
            print(f"{'' if rank else name:{width}}  {class_name:{label}}  {value:11.4f}")


if __name__ == "__main__":
    launch.run(parse_args, main)
