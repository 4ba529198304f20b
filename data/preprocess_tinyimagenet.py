"""Sort TinyImageNet's validation images by class: `cd data && python preprocess_tinyimagenet.py [FOLDER]`.

Fills `val_sorted/<class>/` with hard links to the images in `val/`, or with copies on a file system without links.
"""

import argparse
import os
import shutil
from pathlib import Path


def prepare(folder: Path) -> str:
    """Create `val_sorted/`, complete or not at all; return a line about it. Raises OSError or ValueError otherwise."""
    images, target, partial = folder / "val" / "images", folder / "val_sorted", folder / ".val_sorted.partial"
    annotations = folder / "val" / "val_annotations.txt"
    if target.is_dir():
        return f"{target} already exists"
    if not annotations.is_file() or not images.is_dir():
        raise ValueError(f"{folder} is not TinyImageNet as unpacked: it needs val/images and val/val_annotations.txt")
    labels = dict(line.split("\t")[:2] for line in annotations.read_text().splitlines())
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left behind
    for image, label in labels.items():
        (partial / label).mkdir(parents=True, exist_ok=True)
        try:
            os.link(images / image, partial / label / image)
        except OSError:
            shutil.copy2(images / image, partial / label / image)
    partial.rename(target)
    return f"{target}: {len(labels)} images in {len(set(labels.values()))} classes"


def main() -> None:
    """Run the command; a folder that cannot be used is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(__file__).parent / "tiny-imagenet-200"
    parser.add_argument("folder", nargs="?", type=Path, default=beside, help="TinyImageNet (default: %(default)s)")
    try:
        print(prepare(parser.parse_args().folder))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
