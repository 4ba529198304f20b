"""Write a trained network to a file for other programs, and check the file on real images.

    python export.py --weights ./checkpoint/.../resnet8_best.pth.tar --data ./data --output resnet8.onnx --int8

The plain backbone is written, without auxiliary heads; how its images are read is in the file and in FILE.json. The
file is read back and compared with the network on test images, or on those of --images: if a logit differs by more than
1e-3 of the largest one, the file is removed and the exit status is 1. --int8 writes FILE_int8.onnx too, calibrated on
training images, and prints both accuracies. ONNX needs the packages of requirements-extra.txt.
"""

import os
import sys
from itertools import islice

import torch

import imagesets
import options
from options.parser import DATASETS, dataset
from tools import exporting, trained
from training import launch
from utils import UserError, World, warn

COMPARED = CALIBRATED = 512  # images


def parse_args(argv=None):
    parser = options.Parser(__doc__, prog="export.py")
    trained.add_weights(parser)
    add = parser.add_argument_group("file").add_argument
    add("--format", choices=exporting.FORMATS, default="onnx", help="default: %(default)s")
    add("--output", type=options.path, required=True, metavar="FILE", help="file to write")
    add("--int8", action="store_true", help="write FILE_int8.onnx too, with 8-bit weights and activations")
    add = parser.add_argument_group("images that the file is checked on").add_argument
    add("--data", type=options.path, default="./data", help="folder of the data set (default: %(default)s)")
    add("--dataset", type=dataset, help=f"{', '.join(DATASETS)}; default: that of the weights")
    add("--images", type=options.path, metavar="FOLDER", help="images in place of a data set's")
    args = parser.parse_args(argv)
    if args.int8 and (args.format != "onnx" or args.images):
        parser.error("--int8 is for --format onnx and a data set, which calibrates it")
    return args


def main(args, _):
    """Write the file and check it, on the CPU."""
    if args.format == "onnx":
        exporting.check_packages()
    network = trained.load(args, World())
    train, test = (None, None) if args.images else read_data(args, network)
    images = sample(args, network, test)
    plain = exporting.plain(network.network)
    exporting.write(plain, args.format, args.output, network.size, network.preprocessing)
    runs = {"PyTorch": plain, args.output: exporting.read_back(plain, args.format, args.output)}
    found = exporting.compare(plain, runs[args.output], images)
    if not found.is_close:
        os.remove(args.output)
        os.remove(f"{args.output}.json")
        warn(f"{args.output}: its logits differ by {found.difference:.3g}, the largest is {found.largest:.3g}: removed")
        sys.exit(1)
    if args.int8:
        quantized = "_int8".join(os.path.splitext(args.output))
        batches = (batch[0] for batch in islice(train, -(-CALIBRATED // args.batch_size)))
        exporting.quantize(args.output, quantized, batches, network.preprocessing)
        runs[quantized] = exporting.read_back(plain, args.format, quantized)
    print("\n".join(exporting.table(runs, images)))
    if args.int8:
        for name, run in runs.items():
            print(f"top-1 on {test.total} test images, {name}: {exporting.top1(run, test):.2f}")


def read_data(args, network):
    """Return (training batches, test batches), read as the weights' images; the former are None unless --int8 asks.

    UserError if the data set is not known or does not fit.
    """
    name = args.dataset or network.info.get("dataset")
    if not name:
        raise UserError(f"{args.weights}: does not say its data set: give --dataset and --data, or --images")
    reading = {"batch_size": args.batch_size, "workers": args.num_workers, "skip_bad_images": True, **network.settings}
    test = imagesets.load_test(name, args.data, **reading)
    kinds = (network.size, len(network.classes)), (test.size, len(test.classes))
    if kinds[0] != kinds[1]:
        ours, theirs = (f"{size} pixels a side and {classes} classes" for size, classes in kinds)
        raise UserError(f"{args.weights}: for images of {ours}, but {name} has {theirs}")
    unnamed = {**reading, "class_names": None}  # which calibration has no use for
    return imagesets.load(name, args.data, augment="none", **unnamed).train if args.int8 else None, test


def sample(args, network, test):
    """Return some images (B, 3, S, S), evenly spaced, of the test set or of the folder --images."""
    if test:
        return torch.cat([images for images, _ in test.some(COMPARED)]).contiguous()
    files = trained.image_files([args.images])
    files = files[:: -(-len(files) // COMPARED)]
    read = network.read(files, args.batch_size, args.num_workers, World())
    found = [images for images, _ in read]
    if not found:
        raise UserError(f"no readable images in {args.images}")
    return torch.cat(found).contiguous()


if __name__ == "__main__":
    launch.run(parse_args, main)
