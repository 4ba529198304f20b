"""The drawings of the analysis, each a matplotlib figure narrow enough for a phone."""

import base64
import io
import re

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tools.measures import Answers, agreement, by_class, class_correlation, confusion, reliability

TEACHER = "#444444"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the colour-blind as well
SHARES = ("#74a9cf", "#bdd7ee", "#f0b54d", "#a6a6a6", "#dddddd")


def uri(figure: Figure) -> str:
    """Return a figure as the data: URI of a PNG picture."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, bbox_inches="tight", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def axes_of(width: float = 5.0, height: float = 3.4, **labels):
    """Return a new figure and its axes, with a light grid."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.set(**labels)
    if labels.get("xlabel") == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colours(students: list[Answers]) -> list[tuple[Answers, str]]:
    """Return the students, each with its colour."""
    return [(student, COLOURS[number % len(COLOURS)]) for number, student in enumerate(students)]


def curve(log: list[dict], name: str) -> tuple[list, list]:
    """Return the epochs and the values of one entry of a log, where it is there."""
    points = [(line["epoch"], line[name]) for line in log if line.get(name) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def heads_of(log: list[dict]) -> list[str]:
    """Return the names of the heads whose accuracy a log has."""
    names = {re.fullmatch(r"train/(aux\d+)_joint", key) for line in log for key in line}
    return sorted(found[1] for found in names if found)


def learning_curves(students: list[Answers], teacher_top1: float) -> Figure:
    """Draw test accuracy over the epochs, and thinly that of training."""
    figure, axes = axes_of(xlabel="epoch", ylabel="top-1 (%)")
    for student, colour in colours(students):
        axes.plot(*curve(student.log, "test/top1"), marker=".", color=colour, label=student.name)
        axes.plot(*curve(student.log, "train/top1"), linewidth=0.8, linestyle=":", color=colour)
    axes.axhline(teacher_top1, color=TEACHER, linestyle="--", linewidth=1, label="teacher")
    axes.legend(fontsize=8)
    return figure


def head_curves(student: Answers) -> Figure:
    """Draw the accuracy of every classifier of a network over the epochs: lines in training, dots in the test."""
    figure, axes = axes_of(xlabel="epoch", ylabel="accuracy (%)")
    axes.plot(*curve(student.log, "train/top1"), color=TEACHER, label="classes")
    axes.plot(*curve(student.log, "test/top1"), color=TEACHER, linestyle="none", marker="o", markersize=4)
    for head, colour in zip(heads_of(student.log), COLOURS, strict=False):
        axes.plot(*curve(student.log, f"train/{head}_joint"), color=colour, label=f"head {head.removeprefix('aux')}")
        tested = curve(student.log, f"test/{head}_joint")
        axes.plot(*tested, color=colour, linestyle="none", marker="o", markersize=4)
    axes.legend(fontsize=8)
    return figure


def class_accuracies(students: list[Answers], teacher: Answers, labels: Tensor) -> Figure:
    """Draw each class's accuracy of the students against that of the teacher."""
    figure, axes = axes_of(4.2, 4.2, xlabel="teacher (%)", ylabel="student (%)")
    for student, colour in colours(students):
        axes.scatter(
            by_class(teacher, labels), by_class(student, labels), s=14, alpha=0.7, c=colour, label=student.name
        )
    axes.plot([0, 100], [0, 100], color=TEACHER, linewidth=1)
    axes.legend(fontsize=8)
    return figure


def heat_maps(
    named: list[tuple[str, Tensor]], classes: list[str], limits: tuple[float, float], colour_map: str
) -> Figure:
    """Draw matrices (N, N), two in a row, with the classes' names if they are few."""
    rows = (len(named) + 1) // 2
    figure = Figure(figsize=(5.2, 2.8 * rows + 0.5), layout="constrained")
    cells = figure.subplots(rows, min(len(named), 2), squeeze=False).flatten()
    for axes, (title, matrix) in zip(cells, named, strict=False):
        picture = axes.imshow(matrix.numpy(), vmin=limits[0], vmax=limits[1], cmap=colour_map, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        shown = range(len(classes)) if len(classes) <= 12 else ()
        axes.set_xticks(shown, [classes[i] for i in shown], rotation=90, fontsize=7)
        axes.set_yticks(shown, [classes[i] for i in shown], fontsize=7)
    for axes in cells[len(named) :]:
        axes.set_axis_off()
    bar = figure.colorbar(picture, ax=cells.tolist(), location="bottom", shrink=0.6, aspect=40)
    bar.ax.tick_params(labelsize=7)
    return figure


def confusions(networks: list[Answers], labels: Tensor, classes: list[str]) -> Figure:
    """Draw the mistakes of each network: the share of a row's class that is taken for a column's."""
    shares = []
    for answers in networks:
        matrix = confusion(answers, labels).double()
        share = 100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)
        shares.append((answers.name, share.fill_diagonal_(0)))
    highest = max(share.max().item() for _, share in shares) or 1
    return heat_maps(shares, classes, (0, highest), "magma_r")


def correlation_differences(students: list[Answers], teacher: Answers, classes: list[str]) -> Figure:
    """Draw how far the correlation of each two classes' logits is from the teacher's."""
    target, named = class_correlation(teacher), []
    for student in students:
        difference = (class_correlation(student) - target).abs()
        named.append((f"{student.name}: mean {difference.nanmean():.3f}", difference))
    return heat_maps(named, classes, (0, 1), "magma_r")


def reliability_diagram(students: list[Answers], teacher: Answers, labels: Tensor) -> Figure:
    """Draw accuracy against confidence; on the diagonal a network is as sure as it is right."""
    figure, axes = axes_of(4.2, 4.2, xlabel="confidence", ylabel="accuracy")
    for answers, colour in [(teacher, TEACHER), *colours(students)]:
        confidence, accuracy, share, error = reliability(answers, labels)
        filled = share > 0
        label = f"{answers.name}: {100 * error:.1f} %"
        axes.plot(confidence[filled], accuracy[filled], marker=".", color=colour, label=label)
    axes.plot([0, 1], [0, 1], color="#aaaaaa", linewidth=1)
    axes.legend(fontsize=8, title="expected calibration error", title_fontsize=8)
    return figure


def agreements(students: list[Answers], teacher: Answers, labels: Tensor) -> Figure:
    """Draw, of each student, the shares of images that it and the teacher answer alike or not, rightly or not."""
    figure, axes = axes_of(height=1.4 + 0.5 * len(students), xlabel="test images (%)", xlim=(0, 100))
    axes.grid(visible=False)
    left = torch.zeros(len(students))
    shares = [agreement(student, teacher, labels) for student in students]
    for name, colour in zip(shares[0], SHARES, strict=True):
        widths = torch.tensor([share[name] for share in shares])
        bars = axes.barh([student.name for student in students], widths, left=left, color=colour, label=name)
        texts = [f"{width:.0f}" if width >= 4 else "" for width in widths]
        axes.bar_label(bars, texts, label_type="center", fontsize=8)
        left += widths
    axes.invert_yaxis()
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.35))
    return figure


def rotations(students: list[Answers], teacher: Answers) -> Figure:
    """Draw the accuracy of the class logits by the rotation of the input."""
    figure, axes = axes_of(xlabel="rotation of the input (degrees)", ylabel="top-1 (%)")
    for answers, colour in [(teacher, TEACHER), *colours(students)]:
        axes.plot([0, 90, 180, 270], answers.by_rotation["classes"], marker="o", color=colour, label=answers.name)
    axes.set_xticks([0, 90, 180, 270])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def embedding_map(answers: Answers, labels: Tensor, classes: list[str]) -> Figure:
    """Draw the embeddings of up to 1,000 images of the first ten classes in a plane, by t-SNE."""
    from sklearn.manifold import TSNE

    rows = (labels < 10).nonzero().flatten()[:1000]
    places = TSNE(random_state=0, perplexity=min(30, len(rows) / 4)).fit_transform(answers.embeddings[rows].numpy())
    figure, axes = axes_of(4.2, 4.2)
    axes.set(xticks=[], yticks=[])
    for number, name in enumerate(classes[:10]):
        mine = places[labels[rows] == number]
        axes.scatter(*mine.T, s=6, color=f"C{number}", label=name)
    axes.legend(fontsize=6, markerscale=2)
    return figure
