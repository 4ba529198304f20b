"""Compare students with their teacher on the test images: one web page of curves, tables and pictures.

    python -m tools.analyse --weights KD/resnet8.pth.tar HSAKD/resnet8_aux.pth.tar --teacher TEACHER --out page.html

The page works offline. A student's learning curves are those of the log.jsonl beside its weights, if there is one.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

import imagesets
import models
import options
from options.parser import dataset
from tools.measures import Answers, ask
from tools.page import page
from tools.sections import Study, all_sections
from training import launch
from training.run_folder import read_log
from training.start import suited
from utils import Checkpoint, UserError


def parse_args(argv=None):
    parser = options.Parser(__doc__, prog="tools.analyse")
    add = parser.add_argument
    add("--weights", type=options.path, nargs="+", required=True, metavar="STUDENT", help="weights of the students")
    add("--teacher", type=options.path, required=True, help="weights of their teacher")
    add("--arch", type=options.architecture, help="network of students' weights that do not say it")
    add("--tarch", type=options.architecture, help="network of the teacher's weights if they do not say it")
    add("--out", type=Path, required=True, metavar="FILE", help="page to write")
    add("--data", type=options.path, default="./data", help="folder of the data set (default: %(default)s)")
    add("--dataset", type=dataset, help="default: that of the first student's training")
    add("--tsne", action="store_true", help="map the embeddings by t-SNE as well, which takes a minute each")
    return parser.parse_args(argv)


def name_of(checkpoint: Checkpoint, arch: str | None) -> str:
    """Return the network of weights, of a mutual pair the better one: what they record, or else `arch`."""
    return options.named(None if checkpoint.arch and not models.is_file(checkpoint.arch) else arch, checkpoint)


def network_of(args: argparse.Namespace, checkpoint: Checkpoint, arch: str | None, batches: Any) -> nn.Module:
    """Return a network with the weights of a file, in evaluation mode, for images as `batches` normalises them."""
    name, rotations = name_of(checkpoint, arch), checkpoint.rotations or 4
    network = options.create(args, name, checkpoint.num_classes, batches.size, rotations, checkpoint)
    checkpoint.load_into(network)
    return suited(network, checkpoint, batches, name=str(checkpoint.path)).eval()


def names_of(checkpoints: list[Checkpoint]) -> list[str]:
    """Return what students are called: method and seed, with a number where that is not enough."""
    found = ["teacher"]
    for checkpoint in checkpoints:
        recorded = checkpoint.content.get("args")
        seed = recorded.get("manual_seed") if isinstance(recorded, dict) else None
        name = str(checkpoint.content.get("method") or Path(checkpoint.path).stem)
        name = name.replace("supervised", "alone") + (f", seed {seed}" if seed else "")
        found.append(name if name not in found else f"{name} ({len(found)})")
    return found[1:]


def log_of(checkpoint: Checkpoint) -> list[dict]:
    """Return the epochs of the log beside weights; of a mutual pair the entries of its better network."""
    prefix = f"net{checkpoint.best_net}/"
    log = read_log(Path(checkpoint.path).parent / "log.jsonl")
    return [{**line, **{key.replace(prefix, ""): line[key] for key in line if prefix in key}} for line in log]


def pictures_of(batches, numbers: set[int]) -> dict:
    """Return test images by their numbers as PIL's."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in batches.statistics)
    numbered = enumerate(image for images, _ in batches for image in images)
    return {i: to_pil_image((image.cpu() * std + mean).clamp(0, 1)) for i, image in numbered if i in numbers}


def main(args, world) -> None:
    students, teacher = [Checkpoint(path) for path in args.weights], Checkpoint(args.teacher)
    data = args.dataset or students[0].info.get("dataset")
    if data is None:
        raise UserError(f"{args.weights[0]} does not say what it was trained on: name it with --dataset")
    info = students[0].info
    reading = {**options.own_reading(name_of(students[0], args.arch), info), **imagesets.recorded(info)}
    batches = imagesets.load_test(data, args.data, skip_bad_images=True, **reading)
    for file in (*students, teacher):
        if file.num_classes != len(batches.classes):
            raise UserError(f"{file.path}: {file.num_classes} classes, but {data} has {len(batches.classes)}")

    def answers(name: str, checkpoint: Checkpoint, arch: str | None) -> tuple[Answers, Tensor]:
        network = network_of(args, checkpoint, arch, batches).to(world.device)
        return ask(name, network, batches, world.device, args.tsne)

    taught = [answers(name, file, args.arch)[0] for name, file in zip(names_of(students), students, strict=True)]
    for student, file in zip(taught, students, strict=True):
        student.log = log_of(file)
    teaching, labels = answers("teacher", teacher, args.tarch)
    title = f"{', '.join(student.name for student in taught)} and their teacher on {data}"
    text = f"Answers on {len(labels):,} test images of {len(batches.classes)} classes."
    sections = all_sections(Study(taught, teaching, labels, batches.classes), partial(pictures_of, batches))
    args.out.write_text(page(title, text, sections), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    launch.run(parse_args, main)
