"""Images/s and memory of the default path against batch size and number of processes: one torchrun for each cell.

python benchmarks/scaling.py --batch-sizes 16 32 64 128 --processes 1 2
"""

import json
import os
import subprocess
import sys

import torch
from paths import Case, Ours, forget_peak, now, peak, ranged, spread
from step import PAIRS, hardware, parser_of, table

import options
from training import distributed

HEAD = ["pair", "processes", "batch, all processes", "images/s (quartiles)", "MiB a process"]


def run_cell(processes, case, rounds):
    """Run this file under torchrun, with NCCL on GPUs; return what its first process measures, {} if it fails."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # torchrun would give each of several processes one thread only.
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    command = [*launch, __file__, json.dumps([case, rounds])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | threads)
    return {} if done.returncode else json.loads(done.stdout.splitlines()[-1])


def worker(case, rounds):
    """Time one cell in torchrun's process group; the first process prints the result as JSON."""
    world = distributed.setup()
    path, speeds = Ours(case, world), []
    path.round()
    forget_peak()
    for _ in range(rounds):
        distributed.barrier()
        began = now(world.device)
        path.round()
        distributed.barrier()
        speeds.append(case.batch_size * case.steps / (now(world.device) - began))
    if world.is_main:
        measured = {"images_per_second": spread(speeds), "peak_mib": peak(world.device)}
        print(json.dumps({**case._asdict(), "processes": world.size, **measured}))
    del path
    distributed.leave()


def row(cell):
    """Return a cell's row of the table."""
    pair, speed = cell["networks"].replace(":", " -> "), ranged(cell["images_per_second"], 1)
    return [pair, str(cell["processes"]), str(cell["batch_size"]), speed, f"{cell['peak_mib']:.0f}"]


def main():
    """Measure every cell and print the table."""
    parser = parser_of(__doc__, rounds=6)
    parser.add_argument("--batch-sizes", type=options.positive, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--processes", type=options.positive, nargs="+", default=[1, torch.cuda.device_count() or 2])
    args = parser.parse_args()
    print(f"{hardware(distributed.pick_device(None))}, {args.rounds} rounds of {args.steps} steps\n\n{table(HEAD, [])}")
    for networks in args.pairs or PAIRS[:1]:
        for processes in sorted(set(args.processes)):
            for size in args.batch_sizes:
                cell = run_cell(processes, Case(networks, size, args.steps, args.amp), args.rounds)
                print("| " + " | ".join(row(cell) if cell else [networks, str(processes), str(size), "failed"]) + " |")


if __name__ == "__main__":
    if "RANK" in os.environ:
        fields, number = json.loads(sys.argv[1])
        worker(Case(*fields), number)
    else:
        main()
