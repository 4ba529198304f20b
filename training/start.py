"""Networks tested without training: what a run starts from, suited to its images and classes, and its best weights."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import imagesets
import models
import options
from methods import Objective
from methods.base import split_outputs
from models.adapted import Adapted, Statistics
from training.metrics import Totals, class_logits, evaluate, hits, networks
from training.precision import autocast, resolve_precision, type_name
from training.run_folder import json_form
from utils import Checkpoint, UserError, load_weights, print_main, warn

if TYPE_CHECKING:
    from training.trainer import Trainer

TESTED = 2000  # images, at most
NEAR_CHANCE = 3  # points above the share of one class
WORSE = 5  # points below what the weights' file records


def class_order(theirs: list[str] | None, ours: list[str]) -> list[int] | None:
    """Return the number in `theirs` of each class of `ours`; None if the order is the same, or the classes are not."""
    if not theirs or theirs == ours or sorted(theirs) != sorted(ours):
        return None
    return [theirs.index(name) for name in ours]


def suited(
    network: nn.Module,
    checkpoint: Checkpoint,
    batches: Any,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    name: str = "the teacher",
) -> nn.Module:
    """Return a network of a file, wrapped if its normalisation or its order of classes is not that of test `batches`.

    Its own statistics are `mean` and `std`, or else those that the file records, those that a library's network was
    made for, or those of the batches.
    """
    warn_of_other_images(network, checkpoint, batches)
    given = tuple(map(tuple, batches.statistics))
    known = dict(zip(("mean", "std"), given, strict=True))
    known |= {**options.own_statistics(network.arch), **imagesets.recorded(checkpoint.info)}
    own = tuple(mean or known["mean"]), tuple(std or known["std"])
    order = class_order(known.get("class_names"), batches.classes)
    if own != given:
        print_main(f"{name}'s images are normalised by its own {shown(own)}, not {shown(given)}")
    if order:
        print_main(f"{name}'s classes are matched by name: it has them in another order")
    return Adapted(network, given, own, order) if order or own != given else network


def warn_of_other_images(network: nn.Module, checkpoint: Checkpoint, batches: Any, renewed: bool = False) -> None:
    """Warn if weights were trained on images of another size, or, unless the classifier is `renewed`, other classes."""
    info, path = checkpoint.info, checkpoint.path
    names, usual = info.get("class_names"), options.own_reading(network.arch, info).get("size")
    if names and not renewed and sorted(names) != sorted(batches.classes):
        warn(f"warning: {path}: trained on the classes of other data ({info.get('dataset')}): its outputs mean those")
    if info.get("size") not in (None, batches.size):
        warn(f"warning: {path}: trained on images of {info['size']} pixels a side, not {batches.size}")
    if "size" not in info and usual not in (None, batches.size):
        made = f"{network.arch} was made for images of {usual} pixels a side"
        warn(f"warning: {path}: does not record its size: {made}, these have {batches.size}")


def shown(statistics: Statistics) -> str:
    """Return a mean and a standard deviation as flags."""
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in statistics)
    return f"--mean {mean} --std {std}"


def load_backbone(
    model: nn.Module,
    path: str | os.PathLike | None,
    data: imagesets.Data,
    key: str | None = None,
    renew: bool = True,
) -> dict[str, str]:
    """Load the weights of a file into the backbone of `model`, of a mutual pair into both; return {path: digest}.

    With `renew` a classifier of another number of classes stays as it was initialised. One with the classes in another
    order is reordered. UserError if the weights do not fit otherwise. Without a path nothing happens.
    """
    if not path:
        return {}
    checkpoint = Checkpoint(path, key, models.backbone_name(model.arch))
    renewed = checkpoint.num_classes != data.num_classes
    known = imagesets.recorded(checkpoint.info)
    order = class_order(known.get("class_names"), data.classes)
    for network in networks(model).values():
        backbone = models.backbone_of(network)
        checkpoint.load_into(backbone, renew=renew and renewed)
        if renewed:
            del backbone.source  # its classifier is not the file's: there is no accuracy to expect
        elif order:
            layers = [module for module in backbone.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
            last = [layer for layer in layers if len(layer.weight) == data.num_classes][-1]
            last.load_state_dict({name: value[order] for name, value in last.state_dict().items()})
    if renewed:
        print_main(f"{checkpoint.path}: a new classifier: the weights have none for {data.num_classes} classes")
    elif order:
        print_main(f"{checkpoint.path}: the classes are matched by name: the weights have them in another order")
    warn_of_other_images(backbone, checkpoint, data.test, renewed)
    own = tuple(tuple({**data.info, **known}[name]) for name in ("mean", "std"))
    if own != data.statistics:
        warn(f"warning: {checkpoint.path}: trained on images with another normalisation, {shown(own)}")
    return {str(path): checkpoint.digest}


def opening(trainer: "Trainer", test: bool) -> dict[str, Any]:
    """Return what `args.json` holds beside settings: `image_set`, how images are read, and `tested`, accuracies.

    With `test`, the teacher and a backbone that was loaded from a file are tested, and the accuracies printed.
    """
    images = {name: value for name, value in trainer.info.items() if name != "class_names"}
    tested = {}
    teacher, network = trainer.objective.teacher, next(iter(networks(trainer.model).values()))
    backbone = models.backbone_of(network)
    # A method of the user's own may read a teacher whose outputs have a form of their own.
    if test and isinstance(teacher, nn.Module) and type(trainer.objective).read_teacher is Objective.read_teacher:
        tested["teacher"] = tested_accuracy(trainer, teacher, "the teacher", trainer.objective.reads == "heads")
    if test and hasattr(backbone, "source"):
        tested["backbone"] = tested_accuracy(trainer, backbone, "the pretrained backbone", False)
    return {"image_set": images, "tested": tested}


def tested_accuracy(trainer: "Trainer", network: nn.Module, name: str, heads: bool) -> dict[str, float]:
    """Test a network on un-rotated test images; print its accuracies in percent, warn if they are low, return them."""
    found, classes = accuracy(trainer, network, heads)
    source = getattr(network, "source", {"acc": None, "own": False})
    recorded = "" if source["acc"] is None else f" (its file records {source['acc']:.2f})"
    each = ", ".join(f"{part} {value:.2f}" for part, value in found.items())
    print_main(f"{name} on un-rotated test images: {each}{recorded}")
    low = [part for part, value in found.items() if value < 100 / classes + NEAR_CHANCE]
    hint = "are the classes in this order, and the images normalised as those it was trained on?"
    if low:
        warn(f"warning: {name} is near chance, 1 in {classes} ({', '.join(low)}): {hint}")
    elif source["own"] and source["acc"] is not None and found["top1"] < source["acc"] - WORSE:
        warn(f"warning: {name} is worse than its file records, {found['top1']:.2f} to {source['acc']:.2f}: {hint}")
    return found


@torch.no_grad()
def accuracy(trainer: "Trainer", network: nn.Module, heads: bool) -> tuple[dict[str, float], int]:
    """Return the top-1 in percent of a network, and of its heads' classes, on test images; and the classes' number."""
    totals, device, mode = Totals(trainer.world.device), trainer.world.device, network.training
    network.eval()
    batches = trainer.test.some(TESTED) if hasattr(trainer.test, "some") else trainer.test
    for images, labels in (batch[:2] for batch in batches):
        labels = labels.to(device)
        with autocast(device, trainer.precision):
            logits, aux_logits, *_ = split_outputs(network(images.to(device)))
        sums = {"top1": hits(logits, labels)}
        for number, aux in enumerate(aux_logits if heads else (), 1):
            sums[f"aux{number}"] = hits(class_logits(aux, aux.shape[1] // logits.shape[1]), labels)
        totals.add({name: 100 * value for name, value in sums.items()}, len(labels))
    network.train(mode)
    return totals.means(), logits.shape[1]


def test_best(trainer: "Trainer") -> dict[str, float]:
    """Test the run folder's best weights with all heads, print and return the accuracies."""
    run = trainer.run
    path = run.best if run.best.exists() else run.last
    if not path.exists():
        raise UserError(f"--evaluate: nothing has been trained in {run.path} yet")
    checkpoint = load_weights(trainer.model, path)
    now, then = (json_form(imagesets.recorded(info)) for info in (trainer.info, checkpoint.info))
    other = [f"{name} {then[name]} -> {value}" for name, value in now.items() if value != then.get(name, value)]
    if other:
        raise UserError(f"{path}: trained on images that are read otherwise ({', '.join(other)})")
    precision = resolve_precision(trainer.amp, trainer.world.device, checkpoint.content.get("precision"))
    net = checkpoint.best_net if trainer.val is not None else None
    means = evaluate(trainer.model, trainer.test, trainer.world.device, precision, heads=True, net=net)
    listed = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    print_main(f"{path}, {type_name(precision)}: {listed}")
    return means
