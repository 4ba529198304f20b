"""Images/s and memory of the default path against batch size and number of processes: one torchrun for each cell."""

import argparse
import json
import os
import subprocess
import sys

import torch
from training_paths import Ours, Peak, now, ranged, spread, synthetic

import distributed

HEAD = ["processes", "batch, all processes", "images/s (quartiles)", "MiB a process"]


def measure(args, case):
    """Return the cells {processes, batch_size, images_per_second, peak_mib}; None where a cell did not run."""
    units = torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count()
    cells = []
    for processes in args.processes or sorted({1, units}):
        for size in args.batch_sizes:
            cell = {"processes": processes, "batch_size": size, "images_per_second": None, "peak_mib": None}
            options = {"batch_size": size, "steps": args.steps, "rounds": args.rounds, "amp": args.amp, "case": case}
            cells.append(cell | run_cell(processes, options))
    return cells


def run_cell(processes, options):
    """Run this file under torchrun and return what its first process printed; {} where it failed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # torchrun would give each of several processes one thread only.
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    command = [*launch, __file__, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "Error" in line), "no error message")
        print(f"{processes} processes, batch {options['batch_size']}: failed: {reason}", file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def rows(cells):
    """Return the table's rows."""

    def found(cell):
        if cell["images_per_second"] is None:
            return ["failed", "failed"]
        return [ranged(cell["images_per_second"], 1), f"{cell['peak_mib']:.0f}"]

    return [[str(cell["processes"]), str(cell["batch_size"]), *found(cell)] for cell in cells]


def plot(cells, path):
    """Draw images/s (with its quartiles) and memory against the batch size, a line for each number of processes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    measured = [cell for cell in cells if cell["images_per_second"] is not None]
    speed_axes, memory_axes = figure.subplots(1, 2)
    for processes in sorted({cell["processes"] for cell in measured}):
        line = [cell for cell in measured if cell["processes"] == processes]
        sizes, speeds = [cell["batch_size"] for cell in line], [cell["images_per_second"] for cell in line]
        medians, quartiles = [speed["median"] for speed in speeds], [speed["quartiles"] for speed in speeds]
        speed_axes.plot(sizes, medians, marker="o", label=f"{processes} process{'es' * (processes > 1)}")
        speed_axes.fill_between(sizes, *zip(*quartiles, strict=True), alpha=0.2)
        memory_axes.plot(sizes, [cell["peak_mib"] for cell in line], marker="o")
    for axes, label in [(speed_axes, "images/s"), (memory_axes, "peak memory of a process, MiB")]:
        axes.set(xscale="log", xlabel="batch size, all processes", ylabel=label)
        axes.set_xticks(sorted({cell["batch_size"] for cell in measured}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    speed_axes.legend()
    figure.savefig(path, dpi=150)


def worker():
    """Time one cell in the process group of torchrun; the first process prints the result as JSON."""
    args = argparse.Namespace(**json.loads(sys.argv[1]), compile=False)
    world = distributed.setup(argparse.Namespace(gpu_id=None))
    path = Ours(args, args.case, synthetic(args, args.case), world)
    path.round()
    speeds, peak = [], Peak(world.device)
    for _ in range(args.rounds):
        distributed.barrier()
        began = now(world.device)
        path.round()
        distributed.barrier()
        speeds.append(args.batch_size * args.steps / (now(world.device) - began))
    if world.is_main:
        print(json.dumps({"images_per_second": spread(speeds), "peak_mib": peak.read()}))


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit("this measures one cell of: python benchmarks/step.py --scaling")
    worker()
    distributed.leave()
