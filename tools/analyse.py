"""Compare students with their teacher on the test images: one web page of curves, tables and pictures.

    python -m tools.analyse --weights KD/resnet8.pth.tar HSAKD/resnet8_aux.pth.tar --teacher TEACHER --out page.html

The page needs no network. A student's learning curves are those of the log.jsonl beside its weights, if there is one.
"""

import base64
import io
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import imagesets
import models
import options
from tools import figures
from tools.measures import Answers, agreement, ask, by_class, confusion, divergence, overview
from tools.page import Section, page
from training.distributed import pick_device
from training.run_folder import read_log
from utils import Checkpoint, UserError, warn

EXTREMES = 12  # images, classes and confusions that are listed


def parse_args(argv=None):
    """Return the command line's arguments."""
    parser = options.Parser(__doc__, prog="tools.analyse")
    add = parser.add_argument
    add("--weights", type=options.path, nargs="+", required=True, metavar="STUDENT", help="weights of the students")
    add("--teacher", type=options.path, required=True, help="weights of their teacher")
    add("--arch", type=options.architecture, help="network of students' weights that do not say it")
    add("--tarch", type=options.architecture, help="network of the teacher's weights if they do not say it")
    add("--out", type=Path, required=True, metavar="FILE", help="page to write")
    add("--names", nargs="+", help="what the students are called (default: method and network)")
    add("--data", type=options.path, default="./data", help="folder of the data set (default: %(default)s)")
    add("--dataset", help="default: that of the first student's training")
    add("--batch-size", type=options.positive, default=64, help="images at once (default: 64, or more of small ones)")
    add("--limit-batches", type=options.positive, help="for a quick trial: stop after so many batches")
    add("--tsne", action="store_true", help="map the embeddings by t-SNE as well, which takes a minute each")
    args = parser.parse_args(argv)
    if args.names and len(args.names) != len(args.weights):
        parser.error(f"--names: {len(args.names)} names for {len(args.weights)} students")
    return args


def read_network(path: str, arch: str | None) -> tuple[nn.Module, Checkpoint]:
    """Return a network with the weights at `path`, in evaluation mode; of a mutual pair the better one."""
    checkpoint = Checkpoint(path)
    name = arch or checkpoint.arch
    if name is None:
        raise UserError(f"{path} does not say what network it is of: name it with --arch or --tarch")
    name = models.member_name(name) if models.is_pair(name) else name
    network = models.create(name, checkpoint.num_classes, checkpoint.rotations or 4)
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


def pictures_of(batches, numbers: list[int]) -> dict[int, str]:
    """Return test images by their numbers as data: URIs of PNG pictures."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in batches.statistics)
    found, first, wanted = {}, 0, set(numbers)
    for images, labels in batches:
        for number in wanted & set(range(first, first + len(labels))):
            pixels = ((images[number - first].cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
            found[number] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        first += len(labels)
    return found


def overview_section(students: list[Answers], teacher: Answers, labels: Tensor) -> Section:
    """Return the table of all networks' main figures."""
    rows = []
    for answers in (teacher, *students):
        measured = overview(answers, teacher, labels)
        rows.append([answers.name, *(f"{value:.2f}" for value in measured.values())])
    text = (
        "In percent: accuracies, ECE (expected calibration error) and agreement (the same answer as the teacher, right "
    )
    text += (
        "or wrong). Loss: cross-entropy. Divergence: mean Jensen-Shannon divergence from the teacher, from 0 to 1 bit."
    )
    return Section("Overview", text, [(["network", *measured], rows)])


def curve_sections(students: list[Answers], teacher: Answers, labels: Tensor) -> list[Section]:
    """Return the learning curves of the students whose logs are there, and those of their heads."""
    logged = [student for student in students if student.log]
    if not logged:
        return []
    top1 = 100 * teacher.hits(labels).double().mean().item()
    drawn = figures.uri(figures.learning_curves(logged, top1))
    text = "Top-1 on the test images by epoch; dotted, on the training images while they are augmented."
    found = [Section("Learning curves", text, pictures=[(drawn, "Test accuracy over the epochs.")])]
    with_heads = [student for student in logged if figures.heads_of(student.log)]
    if with_heads:
        text = (
            "Each auxiliary head tells class and rotation apart. Lines: in training; dots: in the tests of all heads."
        )
        drawn = [(figures.uri(figures.head_curves(student)), f"Heads of {student.name}.") for student in with_heads]
        found.append(Section("Heads over the epochs", text, pictures=drawn))
    return found


def class_section(students: list[Answers], teacher: Answers, labels: Tensor, classes: list[str]) -> Section:
    """Return accuracy by class, and the classes in which the first student is furthest from the teacher."""
    accuracies = [by_class(answers, labels) for answers in (teacher, *students)]
    furthest = (accuracies[1] - accuracies[0]).abs().nan_to_num(-1).argsort(descending=True)[:EXTREMES].tolist()
    rows = [[classes[i], *(f"{accuracy[i]:.0f}" for accuracy in accuracies)] for i in furthest]
    text = "Below the line a student is worse than the teacher in a class. The table has the classes in which "
    text += f"{students[0].name} is furthest from it, in percent."
    drawn = figures.uri(figures.class_accuracies(students, teacher, labels))
    head = ["class", teacher.name, *(student.name for student in students)]
    return Section("Accuracy by class", text, [(head, rows)], [(drawn, "Each dot is a class.")])


def confusion_section(students: list[Answers], teacher: Answers, labels: Tensor, classes: list[str]) -> Section:
    """Return the confusion matrices, and the most frequent confusions of all students together."""
    matrices = [confusion(answers, labels) for answers in (teacher, *students)]
    mistakes = sum(matrices[1:]).clone().fill_diagonal_(0).flatten()
    most = mistakes.argsort(descending=True)[:EXTREMES].tolist()
    cells = [divmod(cell, len(classes)) for cell in most if mistakes[cell]]
    rows = [[f"{classes[i]} → {classes[j]}", *(str(matrix[i, j].item()) for matrix in matrices)] for i, j in cells]
    text = (
        "Share of the images of a class (row) that are taken for another (column), in percent; the right answers are "
    )
    text += "left out. The table counts the confusions that are most frequent among the students."
    drawn = figures.uri(figures.confusions([teacher, *students], labels, classes))
    head = ["class → answer", teacher.name, *(student.name for student in students)]
    return Section("Confusion", text, [(head, rows)], [(drawn, "Confusion matrices without their diagonals.")])


def agreement_section(students: list[Answers], teacher: Answers, labels: Tensor) -> Section:
    """Return how often students and teacher answer alike."""
    shares = {student.name: agreement(student, teacher, labels) for student in students}
    rows = [[name, *(f"{value:.1f}" for value in share.values())] for name, share in shares.items()]
    text = "A student that had learned all from its teacher would share its mistakes too."
    drawn = figures.uri(figures.agreements(students, teacher, labels))
    head = ["test images, %", *next(iter(shares.values()))]
    return Section("Agreement with the teacher", text, [(head, rows)], [(drawn, "Shares of the test images.")])


def rotation_section(students: list[Answers], teacher: Answers) -> Section:
    """Return accuracy by the rotation of the input, of the class logits and of every head."""
    rows = [
        [f"{answers.name}: {name}", *(f"{value:.1f}" for value in values)]
        for answers in (teacher, *students)
        for name, values in answers.by_rotation.items()
    ]
    text = "Auxiliary heads saw rotated images with labels or targets; plain networks never did."
    drawn = figures.uri(figures.rotations(students, teacher))
    table = (["accuracy, %", "0°", "90°", "180°", "270°"], rows)
    return Section("Rotated images", text, [table], [(drawn, "Accuracy of the class logits by rotation.")])


def difference_sections(students, teacher, labels, classes, batches) -> list[Section]:
    """Return, of each student, the images on which its probabilities are furthest from the teacher's."""
    furthest = {s.name: divergence(s, teacher).argsort(descending=True)[:EXTREMES].tolist() for s in students}
    pictures = pictures_of(batches, sum(furthest.values(), []))
    text = (
        "The images with the highest Jensen-Shannon divergence, with the label and both answers with their probability."
    )
    found = []
    for student in students:
        cards = []
        for number in furthest[student.name]:
            lines = [f"label: {classes[labels[number]]}"]
            for who, answers in (("teacher", teacher), ("student", student)):
                probability, answer = answers.logits[number].softmax(0).max(0)
                lines.append(f"{who}: {classes[answer]} {probability:.2f}")
            cards.append((pictures[number], "\n".join(lines)))
        found.append(Section(f"Where {student.name} differs most from the teacher", text, cards=cards))
    return found


def sections_of(students, teacher, labels, batches, tsne: bool) -> list[Section]:
    """Return all sections of the page."""
    classes = batches.classes
    reliable = figures.uri(figures.reliability_diagram(students, teacher, labels))
    text = "Below the diagonal a network is surer than it is right. Fifteen bins of equal width."
    correlated = figures.uri(figures.correlation_differences(students, teacher, classes))
    about = "How far the correlation of two classes' logits over the test images is from the teacher's."
    found = [
        overview_section(students, teacher, labels),
        *curve_sections(students, teacher, labels),
        class_section(students, teacher, labels, classes),
        confusion_section(students, teacher, labels, classes),
        Section("Calibration", text, pictures=[(reliable, "Reliability diagram.")]),
        agreement_section(students, teacher, labels),
        Section("Class correlations", about, pictures=[(correlated, "Differences of the correlation matrices.")]),
        rotation_section(students, teacher),
        *difference_sections(students, teacher, labels, classes, batches),
    ]
    if tsne:
        maps = [
            (figures.uri(figures.embedding_map(answers, labels, classes)), answers.name)
            for answers in (teacher, *students)
        ]
        found.append(Section("Embeddings", "t-SNE of the embeddings of up to ten classes.", pictures=maps))
    return found


def main(args) -> None:
    """Ask all networks and write the page."""
    device = pick_device(None)
    read = [read_network(path, args.arch) for path in args.weights]
    info = read[0][1].info
    dataset = args.dataset or info.get("dataset")
    if dataset is None:
        raise UserError(f"{args.weights[0]} does not say what it was trained on: name it with --dataset")
    settings = {"batch_size": args.batch_size, "limit": args.limit_batches}
    batches = imagesets.load_test(dataset, args.data, **imagesets.recorded(info), **settings)
    for path, (_, checkpoint) in zip(args.weights, read, strict=True):
        imagesets.warn_of_other_data(checkpoint.info, batches, path)
    names = args.names or names_of([checkpoint for _, checkpoint in read])
    teacher_network, _ = read_network(args.teacher, args.tarch)
    teacher, labels = ask("teacher", teacher_network.to(device), batches, device)
    students = []
    for name, (network, checkpoint) in zip(names, read, strict=True):
        students.append(ask(name, network.to(device), batches, device)[0])
        students[-1].log = log_of(checkpoint)
    title = f"{', '.join(names)} and their teacher on {dataset}"
    text = f"Answers on {len(labels):,} test images of {len(batches.classes)} classes."
    args.out.write_text(page(title, text, sections_of(students, teacher, labels, batches, args.tsne)), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except (OSError, UserError) as error:
        warn(f"tools.analyse: error: {error}")
        sys.exit(2)
