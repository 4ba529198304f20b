"""What the analysis draws with, by matplotlib; its figures are narrow enough for a phone."""

import os

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

from utils import replacing

TEACHER = "#444444"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the colour-blind as well


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


def heat_maps(named: list[tuple[str, Tensor]], classes: list[str], highest: float) -> Figure:
    """Draw matrices (N, N) of values from 0 on, two in a row, with the classes' names if they are few."""
    rows = (len(named) + 1) // 2
    figure = Figure(figsize=(5.2, 2.8 * rows + 0.5), layout="constrained")
    cells = figure.subplots(rows, min(len(named), 2), squeeze=False).flatten()
    for axes, (title, matrix) in zip(cells[: len(named)], named, strict=True):
        picture = axes.imshow(matrix.numpy(), vmin=0, vmax=highest, cmap="magma_r", interpolation="nearest")
        axes.set_title(title, fontsize=9)
        shown = range(len(classes)) if len(classes) <= 12 else ()
        axes.set_xticks(shown, [classes[i] for i in shown], rotation=90, fontsize=7)
        axes.set_yticks(shown, [classes[i] for i in shown], fontsize=7)
    for axes in cells[len(named) :]:
        axes.set_axis_off()
    figure.colorbar(picture, ax=cells.tolist(), location="bottom", shrink=0.6, aspect=40)
    return figure


def draw_confusion(matrix: Tensor, classes: list[str], path: str | os.PathLike) -> None:
    """Write a confusion matrix (N, N), images of a row's class in a column's, as a PNG file."""
    side = min(max(0.4 * len(classes), 4.0), 14.0)
    figure = Figure(figsize=(side + 2, side + 1), layout="constrained")
    display = ConfusionMatrixDisplay(matrix.numpy(), display_labels=classes)
    display.plot(ax=figure.subplots(), include_values=len(classes) <= 20, xticks_rotation=90, cmap="Blues")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
