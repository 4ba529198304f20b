"""Which networks of timm can be given auxiliary branches: two of every family, on the meta device, in seconds each.

python tools/survey_timm.py [FAMILY ...]
"""

import argparse
import collections
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch

import models

NUM_CLASSES = 10


def two_of_each(families: list[str]) -> list[tuple[str, str]]:
    """Return (family, network): of each family the first name and the one in the middle."""
    found = collections.defaultdict(list)
    for module in timm.list_modules():
        found[module] = timm.list_models(module=module)
    chosen = families or list(found)
    return [
        (family, name)
        for family in chosen
        for name in dict.fromkeys((found[family][0], found[family][len(found[family]) // 2]))
    ]


def survey(name: str) -> str:
    """Return what became of a network: its taps, or the error in one line."""
    size = timm.get_pretrained_cfg(name).input_size[-1]
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=NUM_CLASSES)
    try:
        network = models.attach_auxiliary(net, NUM_CLASSES, example=torch.empty(1, 3, size, size, device="meta"))
    except ValueError as error:
        return f"no: {error}"
    reader = network.backbone.stage_reader
    return f"{len(reader.taps)} taps: " + ", ".join(
        f"`{tap}` {'x'.join(map(str, shape))}" for tap, shape in reader.taps.items()
    )


def main() -> None:
    """Print a line a network, and how many work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="timm's modules; default: all")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    worked = total = 0
    for family, name in two_of_each(args.families):
        try:
            found = survey(name)
        except Exception as error:  # timm's own: what it says stands in the table
            found = f"no: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        total += 1
        worked += not found.startswith("no:")
        print(f"| {family} | {name} | {found} |", flush=True)
    print(f"{worked} of {total} networks work ({100 * worked / total:.1f} %)")


if __name__ == "__main__":
    main()
