"""Print a table of runs, mean and std over seeds, beside the published results.

    python report.py [FOLDER | FILE.jsonl ...] [--markdown FILE] [--csv FILE] [--plot FILE]

A folder stands for all run folders below it; the default is ./checkpoint. A line of a .jsonl file is a run: an object
with `args` (its args.json) and `log` (the list of its epochs).
"""

import csv
import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import options
from tools.published import Label, label_of, lookup
from training.run_folder import FREE_ARGUMENTS, read_log
from utils import UserError, read_json, warn

COLUMNS = [
    *("script", "network", "method", "data set", "settings", "epochs", "seeds"),
    *("last top-1", "best top-1", "images/s", "seconds", "published"),
]
# Where a run was made does not set it apart from another, nor does its seed.
NOT_SETTINGS = FREE_ARGUMENTS - {"epochs", "tcheckpoint", "pretrained_backbone"} | {"manual_seed"}
ALWAYS_SHOWN = {"limit_batches", "override"}  # also if all runs have it
NEEDED = {"script", "arch", "dataset", "epochs", "manual_seed"}
CAPTION = (
    "Top-1 in percent, mean±std (n - 1) over seeds; * = jointly trained teacher. last: after the last epoch, selected "
    "by nothing. best: at the epoch selected on the test set, as in the published results; optimistic. With (val) it "
    "was selected on held-out training images. seconds: of a whole run, by the median of its epochs, training and "
    "tests. A mutual pair counts as its better network, chosen on the same images as the best epoch. Seeds in brackets "
    "are unfinished and count only if no seed of their row is finished."
)


class Run(NamedTuple):
    """One run: the dict of its args.json and the records of its epochs in order."""

    args: dict
    epochs: list[dict]

    @property
    def finished(self) -> bool:
        """Whether the last epoch of the schedule is logged."""
        return len(self.epochs) >= self.args["epochs"]

    @property
    def seed(self) -> str:
        """The seed, in brackets if the run is unfinished."""
        return str(self.args["manual_seed"]) if self.finished else f"({self.args['manual_seed']})"


def find_runs(paths: list[Path]) -> list[Run]:
    """Return the runs in the .jsonl files and below the folders; UserError for a path without any."""
    runs = []
    for path in paths:
        found = read_results(path) if path.is_file() else [read_run(file) for file in sorted(path.rglob("args.json"))]
        if not any(found):
            raise UserError(f"no runs in {path}")
        runs += filter(None, found)
    return runs


def read_results(file: Path) -> list[Run]:
    """Return the runs of a .jsonl file; UserError if it is something else."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [Run(line["args"], line["log"]) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} holds no results: every line must be an object with args and log") from None


def read_run(file: Path) -> Run | None:
    """Return the run of an args.json; None, and a warning, if it is none."""
    args = read_json(file) or {}
    if args.keys() >= NEEDED:
        return Run(args, read_log(file.parent / "log.jsonl"))
    warn(f"report.py: left out {file}: not the arguments of a run")
    return None


def settings_of(args: dict) -> dict[str, str]:
    """Return what sets a run apart; paths are cut to their last two parts, without seeds."""
    kept = {key: str(value) for key, value in args.items() if value and key not in NOT_SETTINGS}
    changes = [f"{c['name']} {c['from']} -> {c['to']} from epoch {c['epoch']}" for c in args.get("overrides", ())]
    kept |= {"override": " and ".join(changes)} if changes else {}
    images = args.get("image_set") or {}
    if images.get("dataset") == "imagefolder":  # whose folder may have moved
        kept["images"] = f"{images.get('images')} of {images.get('size')} pixels"
    return {key: re.sub(r"seed\d+", "seed", "/".join(value.split("/")[-2:])) for key, value in kept.items()}


def group(runs: list[Run]) -> list[tuple[Label, str, list[Run]]]:
    """Return (label, settings, runs of several seeds); the settings name what runs of one label differ in."""
    labels = {}
    for run in runs:
        variant = tuple(sorted(settings_of(run.args).items()))
        labels.setdefault(label_of(run.args), {}).setdefault(variant, []).append(run)
    groups = []
    for label, variants in sorted(labels.items()):
        common = set.intersection(*map(set, variants))
        for variant, members in sorted(variants.items()):
            own = set(variant) - common
            shown = [f"{key} {value}" for key, value in variant if key in ALWAYS_SHOWN or (key, value) in own]
            groups.append((label, ", ".join(shown), members))
    return groups


def mean_std(values) -> str:
    """Return `mean±std` (n - 1) of the numbers among the values, or a dash."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f"±{statistics.stdev(values):.2f}" if len(values) > 1 else "")


def make_row(label: Label, settings: str, runs: list[Run]) -> list[str]:
    """Return the cells of the runs of one row; the finished ones are averaged, if there are any."""
    args, started = runs[0].args, [run for run in runs if run.epochs]
    averaged = [run for run in started if run.finished] or started
    done = sorted({len(run.epochs) for run in runs})
    speeds = [entry["images_per_second"] for run in started for entry in run.epochs if entry.get("images_per_second")]
    seconds = [entry["seconds"] for run in started for entry in run.epochs if "seconds" in entry]
    return [
        *(*label, settings),
        "-".join(map(str, dict.fromkeys((done[0], done[-1])))) + f"/{args['epochs']}",
        " ".join(sorted((run.seed for run in runs), key=lambda seed: (len(seed), seed))),
        mean_std(run.epochs[-1].get("test/top1") for run in averaged),
        mean_std(run.epochs[-1].get("best/top1") for run in averaged) + (" (val)" if args.get("val_split") else ""),
        f"{statistics.median(speeds):.0f}" if speeds else "-",
        f"{statistics.median(seconds) * args['epochs']:.0f}" if seconds else "-",
        lookup(label),
    ]


def align(rows: list[list[str]], separator: str = "  ") -> list[str]:
    """Return the lines of a table with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [separator.join(map(str.ljust, row, widths)).rstrip() for row in rows]


def plot(path: Path, groups: list[tuple[Label, str, list[Run]]]) -> None:
    """Draw test top-1 against the epoch, a line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6))
    axes = figure.subplots()
    for label, settings, runs in groups:
        for run in runs:
            points = [(entry["epoch"], entry["test/top1"]) for entry in run.epochs]
            name = " ".join(filter(None, (*label, settings, f"seed {run.seed}")))
            axes.plot(*zip(*points, strict=True), marker=".", markersize=4, label=name)
    axes.set(xlabel="epoch", ylabel="test top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def parse_args(argv=None):
    parser = options.Parser(__doc__, prog="report.py")
    parser.add_argument(
        "paths", nargs="*", type=Path, metavar="FOLDER | FILE.jsonl", help="instead of --checkpoint-dir"
    )
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoint"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as comma-separated values")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the learning curves")
    return parser.parse_args(argv)


def main(args) -> None:
    groups = group(find_runs(args.paths or [args.checkpoint_dir]))
    rows = [COLUMNS, *(make_row(*entry) for entry in groups)]
    print("\n".join([*align(rows), "", CAPTION]))
    if args.markdown:
        lines = align([rows[0], ["---"] * len(rows[0]), *rows[1:]], " | ")
        args.markdown.write_text("\n".join(f"| {line} |" for line in lines) + f"\n\n{CAPTION}\n", encoding="utf-8")
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    if args.plot:
        plot(args.plot, groups)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (OSError, UserError) as error:
        warn(f"report.py: error: {error}")
        sys.exit(2)
