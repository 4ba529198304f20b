"""Which networks of timm can be given auxiliary branches (two of every family), or what the branches of some cost.

    python -m tools.survey_timm
    python -m tools.survey_timm --costs torchvision/resnet18 timm/vit_tiny_patch16_224 ...

Networks are built on the meta device if they can be. Prints a table in Markdown.
"""

import argparse
import warnings

import timm
from torch import nn

from models.cost import branch_costs, without_values
from models.hub import default_size
from utils import first_line

NUM_CLASSES = 100


def shown_taps(network: nn.Module) -> str:
    """Return the taps of a network and their shapes without the batch."""
    taps = network.backbone.stage_reader.taps
    return ", ".join(f"`{tap}` {' x '.join(map(str, shape))}" for tap, shape in taps.items())


def survey(name: str) -> str:
    """Return the taps of a network, or why it has none."""
    try:
        return shown_taps(without_values(f"timm/{name}_aux", NUM_CLASSES))
    except Exception as error:  # whatever timm's own code raises belongs into the table
        return f"no: {first_line(error)}"


def costs(name: str) -> str:
    """Return a line of the table: parameters in millions and multiply-adds in millions, plain, copied, light."""
    size = default_size(name)
    found = branch_costs(f"{name}_aux", NUM_CLASSES, size)
    numbers = [
        " / ".join(f"{part[key] / 1e6:.2f}" for part in found.values()) for key in ("parameters", "multiply_adds")
    ]
    return f"| {name} | {size} | {shown_taps(without_values(f'{name}_aux', NUM_CLASSES))} | {' | '.join(numbers)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", nargs="+", metavar="NAME", help="print what the branches of these networks cost")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in args.costs or ():
        print(costs(name), flush=True)
    found = []
    for family in timm.list_modules() if not args.costs else ():
        names = timm.list_models(module=family)
        for name in dict.fromkeys((names[0], names[len(names) // 2])):
            found.append(survey(name))
            print(f"| {family} | {name} | {found[-1]} |", flush=True)
    if found:
        worked = sum(not line.startswith("no:") for line in found)
        print(f"{worked} of {len(found)} networks work ({100 * worked / len(found):.1f} %)")


if __name__ == "__main__":
    main()
