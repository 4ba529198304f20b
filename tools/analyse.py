"""Compare students with their teacher on the test images: one web page of curves, tables and pictures.

    python -m tools.analyse --weights KD/resnet8.pth.tar HSAKD/resnet8_aux.pth.tar --teacher TEACHER --out page.html

The page needs no network. A student's learning curves are those of the log.jsonl beside its weights, if there is one.
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

import imagesets
import models
import options
from tools.measures import ask
from tools.page import page
from tools.sections import Study, all_sections
from training import launch
from training.run_folder import read_log
from utils import Checkpoint, UserError


def parse_args(argv=None):
    parser = options.Parser(__doc__, prog="tools.analyse")
    parser.set_defaults(gpu_id=None)
    add = parser.add_argument
    add("--weights", type=options.path, nargs="+", required=True, metavar="STUDENT", help="weights of the students")
    add("--teacher", type=options.path, required=True, help="weights of their teacher")
    add("--arch", type=options.architecture, help="network of students' weights that do not say it")
    add("--tarch", type=options.architecture, help="network of the teacher's weights if they do not say it")
    add("--out", type=Path, required=True, metavar="FILE", help="page to write")
    add("--data", type=options.path, default="./data", help="folder of the data set (default: %(default)s)")
    add("--dataset", help="default: that of the first student's training")
    add("--tsne", action="store_true", help="map the embeddings by t-SNE as well, which takes a minute each")
    return parser.parse_args(argv)


def read_network(path: str, arch: str | None) -> tuple[nn.Module, Checkpoint]:
    """Return a network with the weights at `path`, in evaluation mode; of a mutual pair the better one."""
    checkpoint = Checkpoint(path)
    name, size = options.named(arch, checkpoint), checkpoint.info.get("size")
    network = models.create(name, checkpoint.num_classes, checkpoint.rotations or 4, size=size)
    checkpoint.load_into(network)
    return network.eval(), checkpoint


def names_of(checkpoints: list[Checkpoint]) -> list[str]:
    """Return what students are called: method and seed, with a number where that is not enough."""
    found = []
    for checkpoint in checkpoints:
        seed = checkpoint.content.get("args", {}).get("manual_seed")
        name = str(checkpoint.content.get("method") or Path(checkpoint.path).stem)
        name = name.replace("supervised", "alone") + (f", seed {seed}" if seed else "")
        found.append(name if name not in found else f"{name} ({len(found) + 1})")
    return found


def log_of(checkpoint: Checkpoint) -> list[dict]:
    """Return the epochs of the log beside weights; of a mutual pair the entries of its better network."""
    prefix = f"net{checkpoint.best_net}/"
    log = read_log(Path(checkpoint.path).parent / "log.jsonl")
    return [{key.replace(prefix, ""): value for key, value in line.items()} for line in log]


def pictures_of(batches, numbers: set[int]) -> dict:
    """Return test images by their numbers as PIL's."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in batches.statistics)
    found, first = {}, 0
    for images, labels in batches:
        for number in numbers & set(range(first, first + len(labels))):
            found[number] = to_pil_image((images[number - first].cpu() * std + mean).clamp(0, 1))
        first += len(labels)
    return found


def main(args, world) -> None:
    read = [read_network(path, args.arch) for path in args.weights]
    teacher_network, _ = read_network(args.teacher, args.tarch)
    checkpoints = [checkpoint for _, checkpoint in read]
    dataset = args.dataset or checkpoints[0].info.get("dataset")
    if dataset is None:
        raise UserError(f"{args.weights[0]} does not say what it was trained on: name it with --dataset")
    batches = imagesets.load_test(dataset, args.data, **imagesets.recorded(checkpoints[0].info))
    for checkpoint in checkpoints:
        imagesets.warn_of_other_data(checkpoint.info, batches, checkpoint.path)
    teacher, labels = ask("teacher", teacher_network.to(world.device), batches, world.device, args.tsne)
    students = []
    for name, (network, checkpoint) in zip(names_of(checkpoints), read, strict=True):
        students.append(ask(name, network.to(world.device), batches, world.device, args.tsne)[0])
        students[-1].log = log_of(checkpoint)
    title = f"{', '.join(student.name for student in students)} and their teacher on {dataset}"
    text = f"Answers on {len(labels):,} test images of {len(batches.classes)} classes."
    sections = all_sections(Study(students, teacher, labels, batches.classes), partial(pictures_of, batches))
    args.out.write_text(page(title, text, sections), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    launch.run(parse_args, main)
