"""Training speed of this project's step against the published scripts' recipe, timed in one run, round by round.

    python benchmarks/step.py --all --compile --json step.json --markdown
    python benchmarks/step.py --scaling --plot scaling.png

reference: float32, NCHW, eager, PIL transforms image by image without workers, PyTorch's usual SGD, all losses and metrics
           read in every step.
default:   the engine's own loop over its own batches. compile: the same with --compile.
The images are synthetic. Every path has a process of its own and they take turns; ratios compare the two of the same
round, so a slow spell of the machine hits both.
"""

import json
import sys

import scaling
import torch
from training_paths import Apart, ranged, spread

import distributed
import models
import options

# The pairs of results/published_results.json, by the names of the architectures.
PAIRS = [
    ("wrn_40_2_aux", "wrn_16_2_aux"),
    ("wrn_40_2_aux", "wrn_40_1_aux"),
    ("resnet56_aux", "resnet20_aux"),
    ("resnet32x4_aux", "resnet8x4_aux"),
    ("vgg13_bn_aux", "mobilenetV2_aux"),
    ("ResNet50_aux", "mobilenetV2_aux"),
    ("wrn_40_2_aux", "ShuffleV1_aux"),
    ("resnet32x4_aux", "ShuffleV2_aux"),
]
IMAGENET_PAIR = ("resnet34_imagenet_aux", "resnet18_imagenet_aux")


def parse_args(argv=None):
    """Parse the command line."""
    parser = options.Parser(__doc__)
    add, count = parser.add_argument, options.positive
    add("--all", action="store_true", help="the eight published offline pairs")
    add("--tarch", type=options.architecture, default=PAIRS[0][0], help="teacher of the one pair timed otherwise")
    add("--arch", type=options.architecture, default=PAIRS[0][1], help="its student")
    add("--teacher", type=options.architecture, metavar="ARCH", help="time a teacher's joint training instead")
    add("--online", type=options.architecture, metavar="PAIR", help="time a mutual pair instead")
    add("--imagenet", action="store_true", help="time the ImageNet pair on decoded 224 x 224 images instead")
    add("--batch-size", type=count, default=64)
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto")
    add("--compile", action="store_true", help="time --compile too")
    add("--rounds", type=count, default=8)
    add("--steps", type=count, help="steps a round (20 on a GPU, 2 on a CPU)")
    add("--scaling", action="store_true", help="the default path against batch size and number of processes instead")
    add("--batch-sizes", type=count, nargs="+", default=[16, 32, 64, 128, 256], help="of --scaling, all processes together")
    add("--processes", type=count, nargs="+", help="of --scaling (1 and all GPUs or cores)")
    add("--json", metavar="FILE", help="write all measurements")
    add("--markdown", action="store_true", help="print the table in Markdown")
    add("--plot", metavar="FILE", help="write the plot of --scaling")
    add("--gpu-id", type=options.gpu_ids, help="GPU to use")
    args = parser.parse_args(argv)
    if args.scaling and (args.all or args.compile or args.gpu_id):
        parser.error("--scaling measures the default path of one pair, on all GPUs: no --all, --compile or --gpu-id")
    options.require_aux(parser, args, *(["teacher"] if args.teacher else ["tarch", "arch"]))
    if args.online and not models.is_pair(args.online):
        parser.error(f"--online {args.online} is one network, not a mutual pair")
    for flag in ("json", "plot"):
        options.check_output(parser, f"--{flag}", getattr(args, flag))
    args.steps = args.steps or (20 if torch.cuda.is_available() else 2)
    return args


def cases(args):
    """Return the (teacher, trained network) to time; no teacher for --teacher and --online."""
    if args.teacher or args.online:
        return [(None, args.teacher or args.online)]
    if args.imagenet:
        return [IMAGENET_PAIR]
    return PAIRS if args.all else [(args.tarch, args.arch)]


def time_rounds(paths, args):
    """Return name -> images/s of every round and name -> peak MiB, the paths (warmed up by a round) taking turns."""
    speeds, peaks = {name: [] for name in paths}, {}
    for number in range(args.rounds):
        for name in sorted(paths, reverse=number % 2 == 1):
            seconds, peaks[name] = paths[name].ask("timed_round")
            speeds[name].append(args.batch_size * args.steps / seconds)
    return speeds, peaks


def measure(args, case):
    """Return the measurements of one case."""
    names = ["reference", "default", *["compile"] * args.compile]
    paths = {name: Apart(name, args, case) for name in names}
    speeds, peaks = time_rounds(paths, args)
    result = {"teacher": case[0], "arch": case[1], "batch_size": args.batch_size, **paths["default"].ask("facts"), "paths": {}}
    for name, found in speeds.items():
        ratios = [mine / theirs for mine, theirs in zip(found, speeds["reference"], strict=True)]
        speed = spread(found)
        gflops = result["gflop_a_step"] * speed["median"] / args.batch_size
        precision = "float32" if name == "reference" else result["precision"]
        result["paths"][name] = {
            "images_per_second": speed,
            "ratio": spread(ratios),
            "step_ms": 1000 * args.batch_size / speed["median"],
            "peak_mib": peaks[name],
            "start_seconds": paths[name].start_seconds,
            "of_matmul_rate": gflops / result["matmul_gflops"][precision],
        }
        paths[name].close()
    return result


def row(result, name):
    """Return the table's cells of one path of a case."""
    path = result["paths"][name]
    return [
        " -> ".join(filter(None, (result["teacher"], result["arch"]))),
        name if name == "reference" else f"{name}, {result['precision']}",
        ranged(path["images_per_second"], 1),
        f"{path['step_ms']:.1f}",
        ranged(path["ratio"], 2),
        f"{100 * path['of_matmul_rate']:.0f} %",
        f"{path['peak_mib']:.0f}",
        f"{path['start_seconds']:.1f}",
    ]


def table(head, rows, markdown):
    """Return a table as text, in columns or in Markdown."""
    if markdown:
        return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in [head, *rows])


def hardware(device):
    """Return the machine and PyTorch in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_json(args, content):
    """Write `content` where --json says."""
    if args.json:
        with open(args.json, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")


def main(args, world):
    """Time, print the tables, write the files."""
    batch = "" if args.scaling else f"batch {args.batch_size}, "
    print(f"{hardware(world.device)}, {batch}{args.rounds} rounds of {args.steps} steps", flush=True)
    if args.scaling:
        cells = scaling.measure(args, cases(args)[0])
        print(table(scaling.HEAD, scaling.rows(cells), args.markdown))
        write_json(args, {"hardware": hardware(world.device), "scaling": cells})
        if not any(cell["images_per_second"] for cell in cells):
            sys.exit(1)
        if args.plot:
            scaling.plot(cells, args.plot)
        return
    results = []
    for case in cases(args):
        results.append(measure(args, case))
        write_json(args, {"hardware": hardware(world.device), "results": results})
    head = ["pair", "path", "images/s (quartiles)", "ms a step", "ratio to reference", "of matrix product rate"]
    head += ["peak MiB", "first round after, s"]
    print(table(head, [row(result, name) for result in results for name in result["paths"]], args.markdown))
    rates = (f"{rate:.0f} in {name}" for name, rate in results[0]["matmul_gflops"].items())
    print(f"\nRate of a large matrix product, GFLOP/s: {', '.join(rates)}\n\nShares of the default path's step:\n")
    shares = [[row(r, "default")[0], *(f"{100 * value:.0f} %" for value in r["shares"].values())] for r in results]
    print(table(["pair", *results[0]["shares"]], shares, args.markdown))


if __name__ == "__main__":
    distributed.run(parse_args, main)
