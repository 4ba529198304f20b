"""The picture of a confusion matrix."""

import os

from matplotlib.figure import Figure
from torch import Tensor

from utils import replacing

NAMED, COUNTED = 50, 20  # classes up to which the axes name them, and the cells their images


def draw_confusion(matrix: Tensor, classes: list[str], path: str | os.PathLike) -> None:
    """Write a confusion matrix (N, N), images of a row's class in a column's, as a PNG file, coloured by row share."""
    shares = 100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    side = min(max(0.4 * len(classes), 4.0), 14.0)
    figure = Figure(figsize=(side + 2, side + 1), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), vmin=0, vmax=100, cmap="Blues", interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="class")
    if len(classes) <= NAMED:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= COUNTED:
        for row, column in matrix.nonzero().tolist():
            colour = "white" if shares[row, column] > 50 else "black"
            axes.text(column, row, matrix[row, column].item(), ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.7, label="% of the row")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
