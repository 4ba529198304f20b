"""What repeated views (--views) cost in accuracy and save in time: a table of the runs of scripts/table.sh.

    python -m tools.repeats results/repeats.jsonl --filling 130

A row is compared seed by seed with the one of fresh views: few_4 with few_fresh, all_4 with all_fresh.
Times are medians of the epochs, with training and tests, times their number; --filling is the speed of filling in
images/s, which every store prints. The time to reach the fresh views' accuracy ends with the first epoch whose test
top-1 reaches that of their last; it excludes the filling.
"""

import json
from pathlib import Path
from statistics import mean, median, stdev

import options

HEAD = ["run", "repeats of a view", "last top-1 by seed", "mean ± std", "seconds an epoch", "seconds in all"]
HEAD += ["with filling", "to the fresh accuracy, by seed"]


def row(name: str, runs: dict[int, dict], fresh: dict[int, dict], filling: float) -> list[str]:
    """Return the cells of the runs of a row, seed -> line of the file, beside those of the row with fresh views."""
    args = next(iter(runs.values()))["args"]
    last = [run["log"][-1]["test/top1"] for run in runs.values()]
    epoch = median(entry["seconds"] for run in runs.values() for entry in run["log"])
    views, whole = args.get("views"), epoch * args["epochs"]
    filled = (views or 0) * args["image_set"]["images"] / filling
    reached = []
    for seed, run in runs.items():
        aim = fresh[seed]["log"][-1]["test/top1"] if seed in fresh else float("inf")
        found = [entry["epoch"] for entry in run["log"] if entry["test/top1"] >= aim]
        reached.append(f"{found[0] * epoch:.0f}" if found else "-")
    spread = f" ± {stdev(last):.2f}" if len(last) > 1 else ""
    repeats = f"{args['epochs'] / views:g}" if views else "fresh"
    accuracies = ", ".join(f"{top1:.2f}" for top1 in last)
    times = [f"{epoch:.1f}", f"{whole:.0f}", f"{whole + filled:.0f}"]
    return [name, repeats, accuracies, f"{mean(last):.2f}{spread}", *times, ", ".join(reached)]


def main(argv=None) -> None:
    """Print the table in Markdown."""
    parser = options.Parser(__doc__, prog="tools.repeats")
    parser.add_argument("file", type=Path, help="results, such as results/repeats.jsonl")
    parser.add_argument("--filling", type=options.above_zero, required=True, help="speed of filling in images/s")
    args = parser.parse_args(argv)
    rows: dict[str, dict[int, dict]] = {}
    for line in map(json.loads, args.file.read_text().splitlines()):
        rows.setdefault(line["name"], {})[line["seed"]] = line
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (HEAD, [":--", *["--:"] * (len(HEAD) - 1)])))
    for name, runs in rows.items():
        fresh = rows.get(f"{name.partition('_')[0]}_fresh", {})
        print(f"| {' | '.join(row(name, dict(sorted(runs.items())), fresh, args.filling))} |")


if __name__ == "__main__":
    main()
