"""The sections of the analysis: what each shows of the students and their teacher, in words, tables and pictures."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.manifold import TSNE
from torch import Tensor

from tools.figures import COLOURS, TEACHER, axes_of, heat_maps
from tools.measures import Answers, agreement, confusion, divergence, overview, reliability
from tools.page import Section

EXTREMES = 12  # images, classes and confusions that are listed
SHARES = ("#74a9cf", "#bdd7ee", "#f0b54d", "#a6a6a6", "#dddddd")
TURNS = (0, 90, 180, 270)


class Study(NamedTuple):
    """What students and their teacher answer on n test images."""

    students: list[Answers]
    teacher: Answers
    labels: Tensor  # (n,)
    classes: list[str]

    @property
    def networks(self) -> list[Answers]:
        """The teacher and the students."""
        return [self.teacher, *self.students]

    @property
    def coloured(self) -> list[tuple[Answers, str]]:
        """All networks, each with its colour."""
        colours = [TEACHER, *(COLOURS[number % len(COLOURS)] for number in range(len(self.students)))]
        return list(zip(self.networks, colours, strict=True))

    @property
    def names(self) -> list[str]:
        """The names of all networks."""
        return [answers.name for answers in self.networks]


def overview_section(study: Study) -> Section:
    """Return the table of all networks' main figures."""
    found = {answers.name: overview(answers, study.teacher, study.labels) for answers in study.networks}
    rows = [[name, *(f"{value:.2f}" for value in values.values())] for name, values in found.items()]
    text = "In percent: accuracies, ECE (expected calibration error) and agreement (the same answer as the teacher, "
    text += "right or wrong). Loss: cross-entropy. Divergence: mean Jensen-Shannon divergence from the teacher, from 0 "
    text += "to 1 bit."
    return Section("Overview", text, [(["network", *found["teacher"]], rows)])


def curve(log: list[dict], name: str) -> tuple[list, list]:
    """Return the epochs and the values of one entry of a log, where it is there."""
    points = [(line["epoch"], line[name]) for line in log if line.get(name) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def curve_section(study: Study) -> Section:
    """Return test accuracy over the epochs, and thinly that of training, of the students whose logs are there."""
    figure, axes = axes_of(xlabel="epoch", ylabel="top-1 (%)")
    for student, colour in study.coloured[1:]:
        if student.log:
            axes.plot(*curve(student.log, "test/top1"), marker=".", color=colour, label=student.name)
            axes.plot(*curve(student.log, "train/top1"), linewidth=0.8, linestyle=":", color=colour)
    top1 = 100 * study.teacher.hits(study.labels).double().mean().item()
    axes.axhline(top1, color=TEACHER, linestyle="--", linewidth=1, label="teacher")
    axes.legend(fontsize=8)
    text = "Top-1 on the test images by epoch; dotted, on the training images while they are augmented."
    pictures = [(figure, "Test accuracy over the epochs.")] if any(student.log for student in study.students) else []
    return Section("Learning curves", text, pictures=pictures)


def head_section(study: Study) -> Section:
    """Return the accuracy of every head over the epochs, of the students whose logs have it."""
    pictures = []
    for student in study.students:
        found = {re.fullmatch(r"train/aux(\d+)_joint", key) for line in student.log for key in line}
        heads = sorted({int(match[1]) for match in found if match})
        figure, axes = axes_of(xlabel="epoch", ylabel="accuracy (%)")
        axes.plot(*curve(student.log, "train/top1"), color=TEACHER, label="classes")
        axes.plot(*curve(student.log, "test/top1"), color=TEACHER, linestyle="none", marker="o", markersize=4)
        for head in heads:
            colour = COLOURS[(head - 1) % len(COLOURS)]
            axes.plot(*curve(student.log, f"train/aux{head}_joint"), color=colour, label=f"head {head}")
            axes.plot(*curve(student.log, f"test/aux{head}_joint"), "o", color=colour, markersize=4)
        axes.legend(fontsize=8)
        pictures += [(figure, f"Heads of {student.name}.")] if heads else []
    text = "A head predicts class and rotation, or the class alone if it has one rotation. "
    text += "Lines: in training; dots: in the tests of all heads."
    return Section("Heads over the epochs", text, pictures=pictures)


def class_section(study: Study) -> Section:
    """Return accuracy by class, and the classes in which the first student is furthest from the teacher."""
    matrices = [confusion(answers, study.labels) for answers in study.networks]
    accuracies = [100 * matrix.diagonal() / matrix.sum(1) for matrix in matrices]  # NaN for a class without images
    furthest = (accuracies[1] - accuracies[0]).abs().nan_to_num(-1).argsort(descending=True)[:EXTREMES].tolist()
    rows = [[study.classes[i], *(f"{accuracy[i]:.0f}" for accuracy in accuracies)] for i in furthest]
    figure, axes = axes_of(4.2, 4.2, xlabel="teacher (%)", ylabel="student (%)")
    for (student, colour), accuracy in zip(study.coloured[1:], accuracies[1:], strict=True):
        axes.scatter(accuracies[0], accuracy, s=14, alpha=0.7, c=colour, label=student.name)
    axes.plot([0, 100], [0, 100], color=TEACHER, linewidth=1)
    axes.legend(fontsize=8)
    text = "Below the line a student is worse than the teacher in a class. The table has the classes in which "
    text += f"{study.students[0].name} is furthest from it, in percent."
    return Section("Accuracy by class", text, [(["class", *study.names], rows)], [(figure, "Each dot is a class.")])


def confusion_section(study: Study) -> Section:
    """Return the confusion matrices, and the most frequent confusions of all students together."""
    matrices, shares = [confusion(answers, study.labels) for answers in study.networks], []
    for name, matrix in zip(study.names, matrices, strict=True):
        share = 100 * matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
        shares.append((name, share.fill_diagonal_(0)))
    figure = heat_maps(shares, study.classes, max(share.max().item() for _, share in shares) or 1)
    mistakes = sum(matrices[1:]).clone().fill_diagonal_(0).flatten()
    most = mistakes.argsort(descending=True)[:EXTREMES].tolist()
    cells = [divmod(cell, len(study.classes)) for cell in most if mistakes[cell]]
    counts = [[str(matrix[cell].item()) for matrix in matrices] for cell in cells]
    rows = [[f"{study.classes[i]} → {study.classes[j]}", *n] for (i, j), n in zip(cells, counts, strict=True)]
    text = "Share of the images of a class (row) that are taken for another (column), in percent; the right answers "
    text += "are left out. The table counts the confusions that are most frequent among the students."
    pictures = [(figure, "Confusion matrices without their diagonals.")]
    return Section("Confusion", text, [(["class → answer", *study.names], rows)], pictures)


def calibration_section(study: Study) -> Section:
    """Return accuracy against confidence; on the diagonal a network is perfectly calibrated."""
    figure, axes = axes_of(4.2, 4.2, xlabel="confidence", ylabel="accuracy")
    for answers, colour in study.coloured:
        confidence, accuracy, share, error = reliability(answers, study.labels)
        label = f"{answers.name}: {100 * error:.1f} %"
        axes.plot(confidence[share > 0], accuracy[share > 0], marker=".", color=colour, label=label)
    axes.plot([0, 1], [0, 1], color="#aaaaaa", linewidth=1)
    axes.legend(fontsize=8, title="expected calibration error", title_fontsize=8)
    text = "Below the diagonal a network is overconfident. Fifteen bins of equal width."
    return Section("Calibration", text, pictures=[(figure, "Reliability diagram.")])


def agreement_section(study: Study) -> Section:
    """Return, of each student, the shares of images that it and the teacher answer alike or not, rightly or not."""
    shares = {student.name: agreement(student, study.teacher, study.labels) for student in study.students}
    rows = [[name, *(f"{value:.1f}" for value in share.values())] for name, share in shares.items()]
    kinds, left = [*next(iter(shares.values()))], torch.zeros(len(shares))
    figure, axes = axes_of(height=1.4 + 0.5 * len(shares), xlabel="test images (%)", xlim=(0, 100))
    axes.grid(visible=False)
    for kind, colour in zip(kinds, SHARES, strict=True):
        widths = torch.tensor([share[kind] for share in shares.values()])
        bars = axes.barh([*shares], widths, left=left, color=colour, label=kind)
        axes.bar_label(bars, fmt=lambda width: f"{width:.0f}" if width >= 4 else "", label_type="center", fontsize=8)
        left += widths
    axes.invert_yaxis()
    axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.35))
    text = "A student that had learned all from its teacher would share its mistakes too."
    table = (["test images, %", *kinds], rows)
    return Section("Agreement with the teacher", text, [table], [(figure, "Shares of the test images.")])


def correlation_section(study: Study) -> Section:
    """Return how far the correlation of each two classes' logits is from the teacher's."""
    target, *others = (torch.corrcoef(answers.logits.T.double()) for answers in study.networks)
    found = [(student.name, (other - target).abs()) for student, other in zip(study.students, others, strict=True)]
    named = [(f"{name}: mean {difference.nanmean():.3f}", difference) for name, difference in found]
    text = "How far the correlation of two classes' logits over the test images is from the teacher's."
    pictures = [(heat_maps(named, study.classes, 1), "Differences of the correlation matrices.")]
    return Section("Class correlations", text, pictures=pictures)


def rotation_section(study: Study) -> Section:
    """Return accuracy by the rotation of the input, of the class logits and of every head."""
    figure, axes = axes_of(xlabel="rotation of the input (degrees)", ylabel="top-1 (%)")
    rows = []
    for answers, colour in study.coloured:
        axes.plot(TURNS, answers.by_rotation["classes"], marker="o", color=colour, label=answers.name)
        for name, values in answers.by_rotation.items():
            rows.append([f"{answers.name}: {name}", *(f"{value:.1f}" for value in values)])
    axes.set_xticks(TURNS)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    text = "Heads of four rotations saw rotated images with labels or targets; plain networks never did."
    table = (["accuracy, %", *(f"{turn}°" for turn in TURNS)], rows)
    return Section("Rotated images", text, [table], [(figure, "Accuracy of the class logits by rotation.")])


def difference_sections(study: Study, pictures_of: Callable[[set[int]], dict]) -> list[Section]:
    """Return, of each student, the images on which its probabilities are furthest from the teacher's."""
    furthest = [divergence(student, study.teacher).argsort(descending=True)[:EXTREMES] for student in study.students]
    pictures, found = pictures_of(set(torch.cat(furthest).tolist())), []
    text = "The images with the highest Jensen-Shannon divergence, with the label and both answers and probabilities."
    for student, numbers in zip(study.students, furthest, strict=True):
        cards = []
        for number in numbers.tolist():
            lines = [f"label: {study.classes[study.labels[number]]}"]
            for who, answers in (("teacher", study.teacher), ("student", student)):
                probability, answer = answers.logits[number].softmax(0).max(0)
                lines.append(f"{who}: {study.classes[answer]} {probability:.2f}")
            cards.append((pictures[number], "\n".join(lines)))
        found.append(Section(f"Where {student.name} differs most from the teacher", text, cards=cards))
    return found


def embedding_section(study: Study) -> Section:
    """Return maps of the embeddings, if there are any, of up to 1,000 images of the first ten classes, by t-SNE."""
    rows, pictures = (study.labels < 10).nonzero().flatten(), []
    rows = rows[:: -(-len(rows) // 1000)]  # the images of a folder come class by class
    for answers in study.networks if study.teacher.embeddings is not None else ():
        reduced = TSNE(random_state=0, perplexity=min(30, len(rows) / 4)).fit_transform(answers.embeddings[rows])
        figure, axes = axes_of(4.2, 4.2, xticks=[], yticks=[])
        for number, name in enumerate(study.classes[:10]):
            axes.scatter(*reduced[study.labels[rows] == number].T, s=6, color=f"C{number}", label=name)
        axes.legend(fontsize=6, markerscale=2)
        pictures.append((figure, answers.name))
    return Section("Embeddings", "t-SNE of the embeddings of up to ten classes.", pictures=pictures)


def all_sections(study: Study, pictures_of: Callable[[set[int]], dict]) -> list[Section]:
    """Return the sections that have something to show; `pictures_of` returns test images by their numbers."""
    found = [overview_section, curve_section, head_section, class_section, confusion_section, calibration_section]
    found += [agreement_section, correlation_section, rotation_section, embedding_section]
    sections = [section(study) for section in found] + difference_sections(study, pictures_of)
    return [section for section in sections if section.tables or section.pictures or section.cards]
