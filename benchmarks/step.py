"""Training speed of this project's step against the published scripts' recipe, timed in turns, round by round.

    python benchmarks/step.py --all --compile --json step.json

reference: float32, NCHW, eager, PIL transforms image by image without workers, losses and metrics read in every step.
default:   the Trainer's own epoch over its own batches; compile: the same with --compile.
stored:    with the teacher's outputs of --teacher-cache; memory: with outputs that cost nothing, which bounds that.
The images are synthetic. Each path has a process of its own, since what the Trainer does to the memory allocator would
help the reference too. Ratios compare rounds that follow each other.
"""

import json
from pathlib import Path

import torch
from paths import Apart, Case, matmul_rates, ranged, spread

import options
from training import distributed

# The pairs of results/published_results.json, and the smallest one.
PAIRS = ["wrn_40_2:wrn_16_2", "wrn_40_2:wrn_40_1", "resnet56:resnet20", "resnet32x4:resnet8x4", "vgg13_bn:mobilenetV2"]
PAIRS += ["ResNet50:mobilenetV2", "wrn_40_2:ShuffleV1", "resnet32x4:ShuffleV2", "resnet20:resnet8"]
BASES = ("reference", "default", "memory")
HEAD = ["pair", "path", "images/s (quartiles)", *(f"ratio to {base}" for base in BASES)]
HEAD += ["of the matrix product's rate", "peak MiB"]


def pair(text):
    """Check a flag's TEACHER:STUDENT."""
    for name in text.split(":"):
        options.architecture(name)
    return text


def parser_of(description, rounds):
    """Return a parser with the flags of all benchmarks of steps."""
    parser = options.Parser(description)
    add = parser.add_argument
    add("--pairs", type=pair, nargs="+", metavar="TEACHER:STUDENT", help=f"default: {PAIRS[0]}; or one mutual pair")
    add("--batch-size", type=options.positive, default=64)
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto")
    add("--rounds", type=options.positive, default=rounds)
    add("--steps", type=options.positive, default=20 if torch.cuda.is_available() else 2, help="of a round")
    return parser


def measure(case, names, rounds, rates, device):
    """Return the measurements of a case, its paths taking turns; a path that fails is left out."""
    paths, found = {}, {name: [] for name in names}
    for number in range(rounds + 1):  # in the first one the processes start
        for name in names[:: -1 if number % 2 else 1]:
            try:
                if number == 0:
                    paths[name] = Apart(name, case, device)
                elif name in paths:
                    found[name].append(paths[name].round())
            except RuntimeError as error:
                print(f"{case.networks}, {name}: {error}", flush=True)
                paths.pop(name, None)
    result = {**case._asdict(), "matmul_gflops": {name: rate / 1e9 for name, rate in rates.items()}, "paths": {}}
    for name, path in paths.items():
        seconds = [round_seconds for round_seconds, _ in found[name]]
        speed = spread([case.batch_size * case.steps / value for value in seconds])
        flops = case.flops(taught="stored" not in name and name != "memory") * speed["median"]
        made = {"precision": path.precision, "images_per_second": speed, "peak_mib": found[name][-1][1]}
        made |= {"start_seconds": path.start_seconds, "of_matmul_rate": flops / rates[path.precision], "ratio": {}}
        for base in paths.keys() & set(BASES) - {name}:
            made["ratio"][base] = spread([a / b for (a, _), b in zip(found[base], seconds, strict=True)])
        result["paths"][name] = made
        path.close()
    return result


def rows(result):
    """Return the table's rows of a case."""
    return [
        [
            result["networks"].replace(":", " -> "),
            f"{name}, {path['precision']}",
            ranged(path["images_per_second"], 1),
            *(ranged(path["ratio"][b], 2) if b in path["ratio"] and name != "reference" else "" for b in BASES),
            f"{100 * path['of_matmul_rate']:.0f} %",
            f"{path['peak_mib']:.0f}",
        ]
        for name, path in result["paths"].items()
    ]


def table(head, rows):
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def hardware(device):
    """Return the machine and PyTorch in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    kind = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({kind}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def main(argv=None):
    """Time, print the table, write the file."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--all", action="store_true", help="the published pairs and ResNet-20 -> ResNet-8")
    parser.add_argument("--compile", action="store_true", help="time --compile too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    args = parser.parse_args(argv)
    device, results = distributed.pick_device(None), []
    rates = matmul_rates(device, args.amp)
    listed = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items())
    print(f"{hardware(device)}, batch {args.batch_size}, {args.rounds} rounds of {args.steps} steps")
    print(f"Rate of a large matrix product: {listed}\n\n{table(HEAD, [])}", flush=True)
    for networks in PAIRS if args.all else args.pairs or PAIRS[:1]:
        case = Case(networks, args.batch_size, args.steps, args.amp)
        names = ["reference", "default", *["compile"] * args.compile]
        names += ["stored", *["stored-compile"] * args.compile, "memory"] if ":" in networks else []
        results.append(measure(case, names, args.rounds, rates, device))
        print(*("| " + " | ".join(cells) + " |" for cells in rows(results[-1])), sep="\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"hardware": hardware(device), "results": results}, indent=1))


if __name__ == "__main__":
    main()
