"""Append the settings and the log of a finished run to a .jsonl file, which report.py reads.

python -m tools.collect kd checkpoint/RUN --into results/table.jsonl
"""

import json
from pathlib import Path

import options
from training.run_folder import FREE_ARGUMENTS, read_log
from utils import read_json, versions

KEPT = {"epochs", "tcheckpoint", "pretrained_backbone", "overrides", "image_set"}  # of FREE_ARGUMENTS, for report.py


def portable(setting):
    """Return the folder and name alone of an absolute path, whose beginning says something of this machine only."""
    return "/".join(Path(setting).parts[-2:]) if isinstance(setting, str) and Path(setting).is_absolute() else setting


def main(argv=None) -> None:
    """Append the line of a finished run at once, so that two runs that end together do not mix theirs."""
    parser = options.Parser(__doc__, prog="tools.collect")
    parser.add_argument("name", help="what the run is called in the file")
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("--into", type=Path, required=True, metavar="FILE", help="file that the line is appended to")
    args = parser.parse_args(argv)
    settings, log = read_json(args.folder / "args.json"), read_log(args.folder / "log.jsonl")
    if settings is None or len(log) < settings["epochs"]:
        parser.error(f"{args.folder} holds no finished run")
    kept = {key: portable(value) for key, value in settings.items() if key not in FREE_ARGUMENTS - KEPT}
    found = {"name": args.name, "seed": settings["manual_seed"], "args": kept, "log": log, "versions": versions()}
    line = json.dumps(found) + "\n"
    try:
        with open(args.into, "a", encoding="utf-8", buffering=len(line) + 1) as file:
            file.write(line)
    except OSError as error:
        parser.error(f"{args.into}: {error.strerror}")


if __name__ == "__main__":
    main()
