"""Images/s of filling a store of teacher's outputs, against the teacher's own inference over batch sizes, in turns.

    python benchmarks/filling.py --pairs wrn_40_2:wrn_16_2 --images 256 --batch-sizes 16 32 64 128

An image is four views. Filling is all that a run does before it trains: augmentation, teacher, disk.
"""

import contextlib
import io
import shutil
import tempfile

import torch
from paths import Case, Ours, now, ranged, spread
from step import PAIRS, hardware, parser_of, table

import options
from training import distributed, teacher_cache
from utils import World


def filled(trainer, folder):
    """Fill a new store in `folder`."""
    trainer.teacher_cache = folder
    cache = teacher_cache.find(trainer)
    with cache.alone(trainer.world), contextlib.redirect_stdout(io.StringIO()):
        teacher_cache.fill(cache, trainer)
    shutil.rmtree(folder)


def inferred(trainer, images, size):
    """Compute the teacher's outputs of images in batches of a size."""
    for part in images.split(size):
        teacher_cache.teacher_parts(trainer, part)


def main():
    """Measure each pair's teacher and print the table."""
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--images", type=options.positive, default=256, help="of a round")
    parser.add_argument("--batch-sizes", type=options.positive, nargs="+", default=[16, 32, 64, 128, 256])
    args = parser.parse_args()
    device = distributed.pick_device(None)
    print(f"{hardware(device)}, {args.rounds} rounds of {args.images} images\n")
    print(table(["teacher", *(f"batch {size}" for size in args.batch_sizes), "filling", "of the best"], []), flush=True)
    for networks in args.pairs or PAIRS[:1]:
        case = Case(networks, args.images, 1, args.amp)
        trainer = Ours(case, World(0, 1, device), "filling").trainer
        images, *_ = next(iter(trainer.train))
        found = {name: [] for name in (*args.batch_sizes, "filling")}
        for number in range(args.rounds + 1):  # the first one warms up
            for name, speeds in found.items():
                began = now(device)
                if name == "filling":
                    filled(trainer, tempfile.mkdtemp())
                else:
                    inferred(trainer, images, name)
                speeds += [args.images / (now(device) - began)] * (number > 0)
        spreads = [spread(speeds) for speeds in found.values()]
        *inference, filling = (one["median"] for one in spreads)
        cells = [networks.partition(":")[0], *(ranged(one, 1) for one in spreads), f"{filling / max(inference):.0%}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
