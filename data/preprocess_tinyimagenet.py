"""Sort TinyImageNet's validation images by class: `cd data && python preprocess_tinyimagenet.py [FOLDER]`.

Copies the images of `val/` to `val_sorted/<class>/`.
"""

import argparse
import shutil
from pathlib import Path


def prepare(folder: Path) -> str:
    """Create `val_sorted/`, complete or not at all; return a line about it. Raises OSError otherwise."""
    target, partial = folder / "val_sorted", folder / ".val_sorted.partial"
    if target.is_dir():
        return f"{target} already exists"
    annotations = (folder / "val" / "val_annotations.txt").read_text()
    labels = dict(line.split("\t")[:2] for line in annotations.splitlines())
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left behind
    for image, label in labels.items():
        (partial / label).mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / "val" / "images" / image, partial / label)
    partial.rename(target)
    return f"{target}: {len(labels)} images in {len(set(labels.values()))} classes"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(__file__).parent / "tiny-imagenet-200"
    parser.add_argument("folder", nargs="?", type=Path, default=beside, help="TinyImageNet (default: %(default)s)")
    try:
        print(prepare(parser.parse_args().folder))
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
