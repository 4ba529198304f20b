"""Training speed of this project's step against the published scripts' recipe, timed in turns, round by round.

    python benchmarks/step.py --all --json step.json
    python benchmarks/step.py --paths inference filling --batch-size 64 --steps 4
    torchrun --standalone --nproc-per-node 2 benchmarks/step.py --paths default

reference: float32, NCHW, eager, PIL transforms image by image without workers, losses and metrics read in every step.
default:   the Trainer's own epoch over its own batches; compile, stored-compile: with --compile.
stored:    with the teacher's outputs of --teacher-cache; memory: with outputs that cost nothing, which bounds that.
filling:   the outputs are stored, which takes augmentation, teacher and disk; inference: the teacher's outputs alone.
The images are synthetic. Each path has a process of its own, unless torchrun starts several, which is for `default` and
`compile` alone: what the Trainer does to the memory allocator would help the reference too. Ratios compare rounds that
follow each other.
"""

import json
import timeit
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles

import torch
from paths import Case, made, now, timed

import options
from training import distributed
from training.precision import resolve_precision, type_name
from utils import print_main

# The pairs of results/published_results.json, and the smallest one.
PAIRS = ["wrn_40_2:wrn_16_2", "wrn_40_2:wrn_40_1", "resnet56:resnet20", "resnet32x4:resnet8x4", "vgg13_bn:mobilenetV2"]
PAIRS += ["ResNet50:mobilenetV2", "wrn_40_2:ShuffleV1", "resnet32x4:ShuffleV2", "resnet20:resnet8"]
PATHS = ("reference", "default", "stored", "memory", "compile", "stored-compile", "inference", "filling")
BASES = ("reference", "default", "memory", "inference")
HEAD = ["pair", "path", "batch, processes", "images/s (quartiles)", *(f"ratio to {base}" for base in BASES)]
HEAD += ["of the matrix product's rate", "peak MiB", "240 epochs, hours"]
RECIPE = 240 * 50_000  # images of CIFAR-100 in the published recipe


def parser_of(description, pairs, paths):
    """Return a parser with the flags of the benchmarks of steps; the defaults of two of them are given."""
    parser = options.Parser(description)
    add = parser.add_argument
    add("--pairs", nargs="+", metavar="TEACHER:STUDENT", default=pairs, help="default: %(default)s")
    add("--batch-size", type=options.positive, default=64)
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto")
    add("--rounds", type=options.positive, default=5)
    add("--steps", type=options.positive, default=20 if torch.cuda.is_available() else 2, help="of a round")
    add("--paths", nargs="+", choices=PATHS, default=paths, help="default: %(default)s")
    return parser


def measure(case, paths, rounds, world):
    """Return (seconds, peak MiB, precision) of a case's rounds, the paths taking turns; one that fails is left out."""
    pools = {path: ProcessPoolExecutor(1, get_context("spawn")) for path in paths}
    found = {path: [] for path in paths}
    for number in range(rounds + 1):  # in the first one the processes start
        for path in [*found][:: -1 if number % 2 else 1]:
            task = path, case, world
            try:
                measured = pools[path].submit(timed, *task).result() if world.size == 1 else timed(*task)
                found[path] += [measured] * (number > 0)
            except RuntimeError as error:
                print_main(f"{case.pair}, {path}: {error}")
                del found[path]
    for pool in pools.values():
        pool.shutdown()
    flops = {path: case.flops(path) for path in found}
    return {**case._asdict(), "processes": world.size, "flops": flops, "paths": found}


def rows(result, rates):
    """Return the table's rows of a case."""
    found = []
    for path, rounds in result["paths"].items():
        _, peak, precision = rounds[-1]
        speeds = [result["batch_size"] * result["steps"] / seconds for seconds, *_ in rounds]
        cells = [result["pair"].replace(":", " -> "), f"{path}, {precision}"]
        cells += [f"{result['batch_size']}, {result['processes']}", ranged(speeds)]
        for base in BASES:
            others = result["paths"].get(base) if path not in (base, "reference") else None
            ratios = others and [theirs[0] / ours[0] for theirs, ours in zip(others, rounds, strict=True)]
            cells.append(ranged(ratios, 2) if ratios else "")
        share = median(speeds) * result["flops"][path] / rates[precision]
        found.append([*cells, f"{share:.0%}", f"{peak:.0f}", f"{RECIPE / median(speeds) / 3600:.1f}"])
    return found


def ranged(values, digits=1):
    """Return median and quartiles as text."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def lines(*rows, head=()):
    """Return rows of cells in Markdown, below the head of a table if there is one."""
    head = [head, ["---"] * len(head)] if head else []
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (*head, *rows))


def matmul_rates(device, amp):
    """Return the FLOP/s of a large matrix product, the median of five, in float32 and in a run's precision, by name.

    On a GPU it is as precise as convolutions are there.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    side, found = 8192 if device.type == "cuda" else 2048, {}
    for dtype in {torch.float32, resolve_precision(amp, device)}:
        square = torch.randn(side, side, device=device).to(dtype)
        known = {"square": square, "now": now, "device": device}
        seconds = timeit.repeat("square @ square; now(device)", number=1, repeat=7, globals=known)
        found[type_name(dtype)] = 2 * side**3 / median(seconds[2:])
    return found


def measure_all(args, save):
    """Measure and print all pairs, and call `save` with what is found after each."""
    world = distributed.setup()
    device = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else device
    rates = {name: world.size * rate for name, rate in matmul_rates(world.device, args.amp).items()}
    found = {"hardware": f"{device}, torch {torch.__version__}", "rates": rates, "pairs": []}
    listed = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items())
    print_main(f"{found['hardware']}, {args.rounds} rounds of {args.steps} steps\nMatrix product: {listed}\n")
    print_main(lines(head=HEAD))
    for pair in args.pairs:
        case = Case(pair, args.batch_size, args.steps, args.amp)
        found["pairs"].append(measure(case, args.paths, args.rounds, world))
        print_main(lines(*rows(found["pairs"][-1], rates)))
        save(found)
    made.cache_clear()
    distributed.leave()


def main():
    parser = parser_of(__doc__, PAIRS[:1], PATHS[:4])
    add = parser.add_argument
    add("--all", dest="pairs", action="store_const", const=PAIRS, help="the published pairs and ResNet-20 -> ResNet-8")
    add("--json", type=Path, metavar="FILE", help="write all measurements")
    args = parser.parse_args()
    measure_all(args, lambda found: args.json and args.json.write_text(json.dumps(found, indent=1)))


if __name__ == "__main__":
    main()
