"""All that waits for a GPU, in one command: its tests, the speed of every way to train, NCCL on all GPUs.

    python benchmarks/gpu.py [--quick]

A run is added to those in OUTPUT.json, and OUTPUT.md is written anew from all of them, after each part. Everything also
runs on a CPU, but for the tests.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from step import HEAD, PAIRS, PATHS, lines, measure_all, parser_of, rows

from utils import read_json

ROOT = Path(__file__).resolve().parents[1]


def printed(*command):
    """Run a command of Python's and return the lines that it prints, which are printed too."""
    out = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    print(out, flush=True)
    return out.strip().splitlines()


def report(runs):
    """Return Markdown tables of all runs, the newest first."""
    parts = ["# Measured by benchmarks/gpu.py"]
    for run in reversed(runs):
        parts += [f"## {run['hardware']}, {run['date']}", f"Tests marked `cuda`: {run['tests']}"]
        listed = lines(*(row for result in run["pairs"] for row in rows(result, run["rates"])), head=HEAD)
        parts += ["\n".join([listed, *run["groups"]])]
        parts += ["Matrix product: " + ", ".join(f"{v / 1e12:.1f} TFLOP/s in {k}" for k, v in run["rates"].items())]
    return "\n\n".join(parts) + "\n"


def main():
    parser = parser_of(__doc__, PAIRS, PATHS)
    parser.add_argument("--quick", action="store_true", help="two pairs and three rounds")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gpu", help="files without ending")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.rounds = args.pairs[:4:3], 3
    tests = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in path.read_text()]
    run = {"date": time.strftime("%Y-%m-%d"), "tests": printed("-m", "pytest", "-m", "cuda", *tests)[-1], "groups": []}
    before = (read_json(args.output.with_suffix(".json")) or {"runs": []})["runs"]

    def save(found):
        run.update(found)
        runs = [*before, run]
        for ending, content in ((".json", json.dumps({"runs": runs}, indent=1)), (".md", report(runs))):
            args.output.with_suffix(ending).write_text(content)

    measure_all(args, save)
    for count in sorted({1, torch.cuda.device_count() or 2}):  # as many images for each process: NCCL's share shows
        flags = {"pairs": args.pairs[0], "batch-size": args.batch_size * count, "amp": args.amp, "paths": "default"}
        flags |= {"steps": args.steps, "rounds": args.rounds}
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "benchmarks/step.py"]
        run["groups"] += printed(*launch, *(f"--{name}={value}" for name, value in flags.items()))[-1:]
        save({})


if __name__ == "__main__":
    main()
