"""Print a table of all runs, mean and std over seeds, beside the published results.

`python report.py [FOLDER ..] [--markdown FILE] [--csv FILE] [--plot FILE]`; default: all below ./checkpoint.
"""

import csv
import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import options
import published
from published import is_joint, read_json, source_args
from runs import FREE_ARGUMENTS, read_log
from utils import warn

COLUMNS = [
    *("script", "network", "method", "data set", "settings", "epochs", "seeds"),
    *("last top-1", "best top-1", "images/s", "published"),
]
# Where and on what a run was made does not set it apart from another, nor does its seed.
NOT_SETTINGS = FREE_ARGUMENTS - {"epochs", "tcheckpoint", "pretrained_backbone"} | {"manual_seed"}


class Run(NamedTuple):
    """One run folder: its path, the flat dict of args.json and the epochs of log.jsonl in order."""

    folder: Path
    args: dict
    epochs: list

    @property
    def length(self):
        """The epochs of its schedule."""
        return int(self.args.get("epochs") or 1)

    @property
    def finished(self):
        """Whether the last epoch is logged."""
        return len(self.epochs) >= self.length


class Label(NamedTuple):
    """What was trained, as it is shown: runs with equal labels differ in their settings at most."""

    script: str
    network: str
    method: str
    data: str


def find_runs(folders):
    """Return the runs in and below the folders; a folder whose args.json is missing or broken is named on stderr."""
    found = {
        path.parent.resolve() for folder in folders for name in ("args.json", "log.jsonl") for path in Path(folder).rglob(name)
    }
    runs = []
    for folder in sorted(found):
        try:
            run = Run(folder, read_json(folder / "args.json"), read_log(folder / "log.jsonl"))
            if run.length < 1 or not all(text.isprintable() for text in label_of(run.args)):
                raise ValueError("no settings of a run here")
            runs.append(run)
        except (AttributeError, TypeError, ValueError, OverflowError):
            warn(f"report: {folder} has no readable args.json: left out")
    return runs


def label_of(args):
    """Return the Label of a run; a method learned from a jointly trained teacher is starred."""
    script, method = Path(str(args.get("script"))).stem, args.get("method")
    origin = source_args(args["s_path"]) if script == "eval_rep" and args.get("s_path") else args
    tarch, arch = origin.get("tarch"), args.get("arch")
    if script.startswith("train_teacher"):
        method = "frozen" if args.get("freezed") else "joint"
    elif script.startswith(("train_student", "eval_rep")) and tarch:
        method = (origin.get("method") or "hsakd") + "*" * is_joint(origin)
    data = str(args.get("dataset"))
    if args.get("few_ratio") is not None:
        data += f" ({float(args['few_ratio']):.0%})"
    return Label(script, f"{tarch} -> {arch}" if tarch else str(arch), method or "", data)


def settings_of(args):
    """Return what sets a run apart as a dict of strings; a path is cut to file and folder and loses its seed."""
    kept = {name: value for name, value in args.items() if name not in NOT_SETTINGS and str(value) not in ("None", "False", "")}
    return {name: re.sub(r"seed\d+", "seed", "/".join(str(value).split("/")[-2:])) for name, value in kept.items()}


def is_number(value):
    """Tell whether a logged value is a number that can be averaged rather than missing."""
    return isinstance(value, int | float) and abs(value) < 1e15  # nor NaN


def mean_std(values):
    """Return `mean±std` of the numbers among the values (ddof = 1; no std for a single one), or a dash."""
    values = [value for value in values if is_number(value)]
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f"±{statistics.stdev(values):.2f}" if len(values) > 1 else "")


def best_top1(run):
    """Return the test top-1 of the epoch that the run selected, or None."""
    last = run.epochs[-1]
    chosen = next((entry for entry in run.epochs if entry["epoch"] == last.get("best/epoch")), {})
    return chosen.get("test/top1", last.get("best/top1"))


def make_row(label, settings, runs, table):
    """Return the cells of one row: runs that differ in the seed only; of those, the finished ones are averaged."""
    args, started = runs[0].args, [run for run in runs if run.epochs]
    averaged = [run for run in started if run.finished] or started
    done = sorted({len(run.epochs) for run in runs})
    epochs = "-".join(str(count) for count in dict.fromkeys((done[0], done[-1])))
    seeds = [str(run.args.get("manual_seed")) if run.finished else f"({run.args.get('manual_seed')})" for run in runs]
    last = mean_std(run.epochs[-1].get("test/top1") for run in averaged)
    best = mean_std(map(best_top1, averaged)) + (" (val)" if args.get("val_split") else "")
    speeds = [
        entry["images_per_second"] for run in started for entry in run.epochs if is_number(entry.get("images_per_second"))
    ]
    speed = f"{statistics.median(speeds):.0f}" if speeds else "-"
    return [
        *label,
        settings,
        f"{epochs}/{args.get('epochs')}",
        " ".join(sorted(seeds, key=lambda seed: (len(seed), seed))),
        last,
        best,
        speed,
        published.lookup(label, args, table),
    ]


def group(runs):
    """Return [(label, settings text, runs)], the text with the tag, a trial's limit and what equal labels differ in."""
    labels = {}
    for run in runs:
        settings = settings_of(run.args)
        labels.setdefault(label_of(run.args), {}).setdefault(tuple(sorted(settings.items())), []).append(run)
    groups = []
    for label, variants in sorted(labels.items()):
        common = set.intersection(*(set(variant) for variant in variants))
        for variant, members in sorted(variants.items()):
            shown = [
                f"{name} {value}"
                for name, value in variant
                if name in ("tag", "limit_batches") or (name, value) not in common and name != "epochs"
            ]
            groups.append((label, ", ".join(shown), members))
    return groups


def caption(runs, rows):
    """Return the sentences below the table of `rows`."""
    split = [bool(run.args.get("val_split")) for run in runs]
    lines = ["Top-1 in percent, mean±std (n - 1) over seeds; * = jointly trained teacher."]
    if not all(split):
        lines.append("best: epoch selected on the test set, as in the published results.")
    if any(split):
        lines.append("best (val): epoch selected on held-out training data.")
    if any(run.epochs and "test/net1/top1" in run.epochs[-1] for run in runs):
        lines.append("A mutual pair counts by the network that is better on the images that select the best epoch.")
    if any(row[-1].endswith("teacher)") for row in rows):
        lines.append("published ... (... teacher): with another kind of teacher than these runs'.")
    if not all(run.finished for run in runs):
        lines.append("Seeds in brackets are unfinished; they count only where no seed of the row is finished.")
    return " ".join(lines)


def align(rows, separator, pad=str.ljust):
    """Return the lines of a table with columns of equal width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [separator.join(pad(text, width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def write_markdown(path, rows, note):
    """Write the table and its caption as Markdown."""
    cells = [[text.replace("|", "\\|") for text in row] for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    path.write_text("\n".join(f"| {line} |" for line in align(cells, " | ")) + f"\n\n{note}\n", encoding="utf-8")


def write_csv(path, rows):
    """Write the table as comma-separated values."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def plot(path, groups):
    """Draw test top-1 against the epoch, a labelled line a run; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6))
    axes = figure.subplots()
    for label, settings, runs in groups:
        for run in runs:
            points = [(entry["epoch"], entry["test/top1"]) for entry in run.epochs if is_number(entry.get("test/top1"))]
            name = " ".join(filter(None, (*label, settings, f"seed {run.args.get('manual_seed')}")))
            axes.plot(*([point[i] for point in points] for i in (0, 1)), marker=".", markersize=4, label=name)
    axes.set(xlabel="epoch", ylabel="test top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def path(text):
    """Return a path of the command line."""
    return Path(options.path(text))


def parse_args():
    """Return the command line arguments and what ends the program in one line and exit status 2."""
    parser = options.Parser(__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=path, help="instead of --checkpoint-dir")
    parser.add_argument("--checkpoint-dir", type=path, default=Path("checkpoint"))
    parser.add_argument("--markdown", type=path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--csv", type=path, metavar="FILE", help="write the table as comma-separated values")
    parser.add_argument("--plot", type=path, metavar="FILE", help="draw the learning curves (needs matplotlib)")
    return parser.parse_args(), parser.error


def main():
    """Print the table and write the files asked for; exit status 2 after one line on stderr if that is not possible."""
    args, stop = parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # folder names need not be text, nor every terminal know "±"
    folders = args.folders or [args.checkpoint_dir]
    try:
        runs = find_runs(folders)
        for folder in folders:
            if not any(run.folder.is_relative_to(folder.resolve()) for run in runs):
                raise ValueError(f"no runs below {folder}")
        table = json.loads(published.TABLE.read_text())
        groups = group(runs)
        rows = [COLUMNS, *(make_row(*entry, table) for entry in groups)]
        note = caption(runs, rows)
        print("\n".join([*align(rows, "  "), "", note]))
        if args.markdown:
            write_markdown(args.markdown, rows, note)
        if args.csv:
            write_csv(args.csv, rows)
        if args.plot:
            plot(args.plot, groups)
    except ImportError:
        stop("--plot needs matplotlib: pip install matplotlib")
    except (OSError, ValueError) as error:
        stop(error)


if __name__ == "__main__":
    main()
