"""Append the settings and the log of a finished run to a .jsonl file, which report.py reads.

python -m tools.collect kd checkpoint/RUN --into results/table.jsonl
"""

import json
import sys
from pathlib import Path

import options
from training.run_folder import FREE_ARGUMENTS, read_json, read_log
from utils import UserError, versions, warn

KEPT = {"epochs", "tcheckpoint", "pretrained_backbone", "overrides", "image_set"}  # of FREE_ARGUMENTS, for report.py


def collect(name: str, folder: Path) -> dict:
    """Return the line of a run: its name, seed, arguments, log and versions; UserError if it is not finished."""
    args, log = read_json(folder / "args.json"), read_log(folder / "log.jsonl")
    if args is None or len(log) < args["epochs"]:
        raise UserError(f"{folder} holds no finished run")
    kept = {key: value for key, value in args.items() if key not in FREE_ARGUMENTS - KEPT}
    return {"name": name, "seed": args["manual_seed"], "args": kept, "log": log, "versions": versions()}


def parse_args(argv=None):
    """Return the command line's arguments."""
    parser = options.Parser(__doc__, prog="tools.collect")
    parser.add_argument("name", help="what the run is called in the file")
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--into", type=Path, required=True, metavar="FILE", help="file that the line is appended to")
    return parser.parse_args(argv)


def main(args) -> None:
    """Append the run's line at once, so that two runs that end together do not mix theirs."""
    line = json.dumps(collect(args.name, args.folder)) + "\n"
    with open(args.into, "a", encoding="utf-8", buffering=len(line) + 1) as file:
        file.write(line)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (OSError, UserError) as error:
        warn(f"tools.collect: error: {error}")
        sys.exit(2)
