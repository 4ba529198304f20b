"""All that waits for a GPU, in one command: its tests, the speed of every way to train, NCCL on all GPUs.

    python benchmarks/gpu.py --quick          two pairs, three rounds
    python benchmarks/gpu.py                  all published pairs, and ResNet-20 -> ResNet-8

A run is added to those in OUTPUT.json, and OUTPUT.md is written anew from all of them: images/s, ratios, share of a
matrix product's rate, memory, and how long 240 epochs of CIFAR-100 take at that speed. Each part is written once it is
measured. Everything also runs on a CPU, but for the tests.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from paths import Case, matmul_rates
from scaling import HEAD as GROUP_HEAD
from scaling import row as group_row
from scaling import run_cell
from step import HEAD, PAIRS, hardware, measure, parser_of, rows, table

from training import distributed
from training.run_folder import read_json
from utils import replacing

ROOT = Path(__file__).resolve().parents[1]
PATHS = ("reference", "default", "compile", "stored", "stored-compile")
RECIPE = 240 * 50_000  # images of CIFAR-100 in the published recipe


def parse_args(argv=None):
    """Parse the command line."""
    parser = parser_of(__doc__, rounds=None)
    add = parser.add_argument
    add("--quick", action="store_true", help="two pairs and three rounds")
    add("--paths", nargs="+", choices=PATHS, default=PATHS, help="ways to train (default: all)")
    add("--no-tests", action="store_true", help="leave out the tests that need a GPU")
    add("--output", type=Path, default=ROOT / "results" / "gpu", help="files without ending (default: results/gpu)")
    args = parser.parse_args(argv)
    args.pairs = args.pairs or ([PAIRS[0], PAIRS[3]] if args.quick else PAIRS)
    args.rounds = args.rounds or (3 if args.quick else 5)
    return args


def run_tests():
    """Run the tests marked `cuda`; return the exit status and pytest's last line. What fails is printed."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.cuda" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "--durations=0", *files]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    lines = [line for line in done.stdout.splitlines() if re.search(r"passed|failed|skipped|error", line)]
    return {"status": done.returncode, "summary": lines[-1] if lines else "no tests ran"}


def measure_all(args, device, save):
    """Measure, and call `save` with the run so far after each part."""
    found = {"hardware": hardware(device), "date": time.strftime("%Y-%m-%d"), "pairs": [], "groups": []}
    if not args.no_tests:
        found["tests"] = run_tests()
        save(found)
    rates = matmul_rates(device, args.amp)
    for networks in args.pairs:
        case = Case(networks, args.batch_size, args.steps, args.amp)
        result = measure(case, list(args.paths), args.rounds, rates, device)
        found["pairs"].append(result)
        print(table(HEAD, rows(result)), flush=True)
        save(found)
    gpus = torch.cuda.device_count()
    for processes in sorted({1, gpus or 2}):  # as many images for each: NCCL's share shows
        case = Case(args.pairs[0], args.batch_size * processes, args.steps, args.amp)
        cell = run_cell(processes, case, args.rounds)
        found["groups"] += [cell] if cell else []
    save(found)
    return found


def report(runs):
    """Return Markdown tables of all runs, the newest first."""
    lines = ["# Measured by benchmarks/gpu.py", ""]
    for run in reversed(runs):
        lines += [f"## {run['hardware']}, {run['date']}", ""]
        if "tests" in run:
            lines += [f"Tests marked `cuda`: {run['tests']['summary'].strip('= ')}", ""]
        listed = []
        for result in run["pairs"]:
            for cells, path in zip(rows(result), result["paths"].values(), strict=True):
                hours = RECIPE / path["images_per_second"]["median"] / 3600
                listed.append([*cells, f"{hours:.1f}", f"{path['start_seconds']:.0f}"])
        lines += [table([*HEAD, "240 epochs, hours", "first round after, s"], listed), ""]
        if run["pairs"]:
            rates = {name: rate for result in run["pairs"] for name, rate in result["matmul_gflops"].items()}
            lines += ["Matrix product: " + ", ".join(f"{v / 1e3:.1f} TFLOP/s in {k}" for k, v in rates.items()), ""]
        if run["groups"]:
            lines += [table(GROUP_HEAD, [group_row(cell) for cell in run["groups"]]), ""]
    return "\n".join(lines)


def main(argv=None):
    """Measure, and write the files."""
    args = parse_args(argv)
    device = distributed.pick_device(None)
    target = args.output.with_suffix(".json")
    before = (read_json(target) or {"runs": []})["runs"]

    def save(run):
        with replacing(target, "w") as file:
            json.dump({"runs": [*before, run]}, file, indent=1)
        with replacing(args.output.with_suffix(".md"), "w") as file:
            file.write(report([*before, run]))

    found = measure_all(args, device, save)
    print(report([found]))
    sys.exit(found.get("tests", {"status": 0})["status"])


if __name__ == "__main__":
    main()
