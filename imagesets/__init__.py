"""From the command line's data set to batches: what is read, what is held out, and where it lives."""

import hashlib
import json
from typing import NamedTuple

import torch

import batches
import datasets
import distributed
from augment import CropFlip, resized
from utils import UserError, is_first_process, warn


class Data(NamedTuple):
    """What a run trains and is measured on; `val` is None unless training images are held out."""

    train: object
    val: object
    test: object
    num_classes: int
    size: int
    about: dict  # tells training sets apart

    def close(self):
        """End the processes that read images, if there are any."""
        for part in (self.train, self.val, self.test):
            if hasattr(part, "close"):  # not of images in memory
                part.close()


def crop_flip(image_set):
    """Return the augmentation of the CIFAR recipe for a set of training images."""
    return CropFlip(image_set.size, flip=image_set.flip)


def load(args, world, augmentation=crop_flip, test_size=None):
    """Read the data set of `args`, once, and return its batches: a Data.

    `augmentation` makes the augmentation of training images in memory from their ImageSet; test images in memory are
    resized to `test_size` pixels a side where it is given.
    """
    train_set, test_set = read(args, world, train=True), read(args, world, train=False)
    datasets.check_classes(test_set.classes, train_set.classes, "the test set", "the training set")
    if len(train_set.classes) == 1 and world.is_main:
        warn(f"warning: --data {args.data}: one class alone, {train_set.classes[0]}")
    train_set, held_out = split(train_set, args, world)
    if isinstance(train_set, datasets.ImageSet):
        augment = augmentation(train_set)
        train = batches.DeviceBatches(train_set, args.batch_size, augment, world, args.manual_seed, args.limit_batches)
    else:
        train = imagefiles().TrainBatches(train_set, args, world)
    val = test_batches(held_out, args, world, test_size) if held_out else None
    test = test_batches(test_set, args, world, test_size)
    return Data(train, val, test, len(test.classes), test.size, about(train_set, test.size))


def load_test(args, world, trained_size=None):
    """Read the test images of the data set of `args` and return their batches.

    An image folder's are read at `trained_size` pixels a side, as a file of weights may say, if that is a size of images in
    memory, else at its own size.
    """
    sizes = range(datasets.SMALLEST, datasets.LARGEST_IN_MEMORY + 1)
    size = trained_size if type(trained_size) is int and trained_size in sizes else None  # a foreign file may say anything
    return test_batches(read(args, world, False, size), args, world)


def imagefiles():
    """Return the module of ImageNet's files, imported where they are read: the transforms it uses take a second."""
    import imagefiles

    return imagefiles


def read(args, world, train, size=None):
    """Return a split of the data set of `args`: a datasets.ImageSet, or of ImageNet an imagefiles.FileSet."""
    if args.dataset == "imagenet":
        return imagefiles().find(args.data, train)
    with distributed.first_alone(world):  # what has to be downloaded, one process downloads
        return datasets.load(args.dataset, args.data, train, args.num_workers, size)


def test_batches(images, args, world, size=None):
    """Return batches of a forward pass without gradient over a split, in memory resized to `size` where it is given."""
    if not isinstance(images, datasets.ImageSet):
        return imagefiles().TestBatches(images, args, world)
    if size:
        images = resized(images, size)
    return batches.TestBatches(images, args.batch_size, world, args.limit_batches)


def about(train_set, size):
    """Return what tells training sets apart: their images' number and size, and a digest of their classes' names."""
    return {"images": len(train_set), "size": size, "classes": class_digest(train_set.classes)}


def class_digest(classes):
    """Return a short text that tells lists of class names apart."""
    return hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()[:8]


def warn_of_other_data(content, images, path):
    """Warn, from the first process, where the file at `path` was trained on other classes or another size than `images` are of.

    `content` is the file's dict, which tells that where it is of this project; `images` are batches.
    """
    trained = content.get("data")
    if not isinstance(trained, dict) or not is_first_process():
        return
    if trained.get("classes") not in (None, class_digest(images.classes)):
        warn(f"warning: {path}: trained on the classes of another data set ({content.get('dataset')}): its outputs mean those")
    if trained.get("size") not in (None, images.size):
        warn(f"warning: {path}: trained on images of {trained['size']} pixels a side, not {images.size}")


def split(train_set, args, world):
    """Return (training images, held-out images or None) of `--val-split` and `--few-ratio`."""
    held_out = None
    if args.val_split:
        kept = datasets.stratified_share(train_set.labels, 1 - args.val_split)
        if len(kept) == len(train_set):
            raise UserError(f"--val-split {args.val_split:g}: holds out none of {len(train_set)} images")
        left = torch.ones(len(train_set), dtype=torch.bool).index_fill(0, kept, False).nonzero().flatten()
        train_set, held_out = train_set.subset(kept), train_set.subset(left)
    if getattr(args, "few_ratio", None):
        train_set = train_set.subset(datasets.stratified_share(train_set.labels, args.few_ratio))
        if world.is_main:
            counts = zip(train_set.classes, train_set.labels.bincount(minlength=len(train_set.classes)).tolist(), strict=True)
            print("training images: " + ", ".join(f"{name} {count}" for name, count in counts))
    return train_set, held_out
