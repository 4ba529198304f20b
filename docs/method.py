"""Draw docs/method.svg, the README's picture of HSAKD: `python docs/method.py`."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

TEACHER, STUDENT, MATCH, LABEL, GREY = "#3b6ea8", "#c8731b", "#2b8457", "#b03a48", "#666666"
STAGES, HEAD, MIDDLE = (4.1, 7.0, 9.9), 12.7, 4.6  # x of the stages and of the class logits, y of the KL terms
CAPTION = """Auxiliary classifier $l$ is a copy of the stages after stage $l$; the last one repeats its stage.
Joint logits are over class and rotation. The KL terms cover all four views, at temperature 3.
At test time only the student's stages and class logits remain."""


def text(axes, x, y, content, size=10, color="black", **kwargs):
    """Write text centred at (x, y)."""
    axes.text(x, y, content, fontsize=size, color=color, **{"ha": "center", "va": "center"} | kwargs)


def box(axes, x, y, width, height, content, color, fill="white"):
    """Draw a rounded box around (x, y)."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch(corner, width, height, style, facecolor=fill, edgecolor=color, linewidth=1.5))
    text(axes, x, y, content, color="black" if fill == "white" else "white")


def arrow(axes, *points, color=GREY):
    """Draw a line through points, below all boxes, that ends in an arrow."""
    axes.plot(*zip(*points[:-1], strict=True), color=color, linewidth=1.5, zorder=0)
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style, zorder=0)


def distribution(axes, x, y, rotations, peak, color):
    """Draw a softened distribution over three classes times `rotations`, standing on y."""
    at = np.arange(3 * rotations)
    heights = 0.08 + 0.06 * np.sin(5.0 * at + 2) ** 2 + peak * (at == rotations + rotations // 4)
    at = at + at // 4  # a gap between the classes
    step = 0.3 if rotations == 1 else 0.11
    axes.bar(x + (at - at.mean()) * step, heights, width=0.75 * step, bottom=y, color=color)


def network(axes, name, y, way, peak, color):
    """Draw a network in the row y, and its outputs in the direction `way`."""
    text(axes, STAGES[0] - 0.9, y - 0.75 * way, name, 13, color, weight="bold", ha="left")
    arrow(axes, (1.3, MIDDLE - way * (1.4 if way < 0 else 2.6)), (1.3, y), (STAGES[0] - 0.9, y))
    for number, x in enumerate((*STAGES, HEAD), 1):
        arrow(axes, (x, y), (x, y + 1.85 * way))
        box(axes, x, y, 1.8, 0.8, "pool, linear" if x == HEAD else f"stage {number}", color, color)
        if x != HEAD:
            arrow(axes, (x + 0.9, y), ((*STAGES, HEAD)[number] - 0.9, y))
            arrow(axes, (x, y), (x, y + 0.8 * way))
            box(axes, x, y + 1.15 * way, 2.1, 0.7, f"auxiliary\nclassifier {number}", color)
        peak += 0.02  # deeper classifiers are surer
        distribution(axes, x, 5.55 if way < 0 else 3.05, 1 if x == HEAD else 4, peak, color)


def draw(axes):
    """Draw the whole picture."""
    for number, angle in enumerate((0, 90, 180, 270)):
        x, y = 0.85 + 0.9 * (number % 2), MIDDLE + 0.75 - 1.3 * (number // 2)
        box(axes, x, y, 0.75, 0.75, "", GREY)
        text(axes, x, y, "F", 17, rotation=angle, weight="bold")
        text(axes, x, y - 0.56, f"{angle}°", 9)
    text(axes, 1.3, MIDDLE - 2, "four views\nof each image")
    network(axes, "teacher (fixed)", 8.1, -1, 0.32, TEACHER)
    network(axes, "student (trained)", 1.1, 1, 0.24, STUDENT)
    for x, y, name, color in [(x, MIDDLE, "KL", MATCH) for x in (*STAGES, HEAD)] + [(14.9, 3.3, "CE", LABEL)]:
        shape = {"boxstyle": "circle,pad=0.35", "facecolor": color, "edgecolor": color}
        text(axes, x, y, name, 11, "white", weight="bold", bbox=shape)
    for number, x in enumerate((*STAGES, HEAD), 1):
        arrow(axes, (x, 5.45), (x, 5.02), color=MATCH)
        arrow(axes, (x, 4.18), (x, 3.75), color=MATCH)
        outputs = "class logits $p$\n$N$ outputs" if x == HEAD else f"joint logits $q_{number}$\n$4N$ outputs"
        text(axes, x + 0.5, MIDDLE, outputs, color=MATCH, ha="left")
    arrow(axes, (HEAD + 0.6, 3.3), (14.48, 3.3), color=LABEL)
    arrow(axes, (14.9, 1.5), (14.9, 2.88), color=LABEL)
    box(axes, 14.9, 1.1, 1.2, 0.8, "label $y$", LABEL)
    text(axes, 14.75, 2.2, "un-rotated\nimages only", 9, LABEL, ha="right")
    text(axes, 7.8, -0.45, CAPTION, 11)


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "method"  # the same file from the same drawing
    figure = Figure(figsize=(12, 7.85))
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, 15.6), ylim=(-1.1, 9.1))
    canvas.set_axis_off()
    draw(canvas)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})
