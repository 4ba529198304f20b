"""Sort TinyImageNet's validation images by class: `cd data && python preprocess_tinyimagenet.py [folder]`.

`val/` stays as it was unpacked; the sorted images are hard links (copies where the file system has none) in the new
folder `val_sorted/<class>/`, which torchvision's ImageFolder reads. It appears complete or not at all.
"""

import argparse
import os
import shutil
from collections import Counter
from pathlib import Path

PARTIAL = ".val_sorted.partial"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit status 2."""

    def error(self, message):
        """Print `message` as one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def default_folder():
    """Return `tiny-imagenet-200` in the current directory, or beside this script if it is only there."""
    here, beside = Path("tiny-imagenet-200"), Path(__file__).resolve().parent / "tiny-imagenet-200"
    return beside if beside.is_dir() and not here.is_dir() else here


def read_text(path):
    """Return the text of a file; ValueError naming it where it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}): unpack tiny-imagenet-200.zip again") from None


def read_classes(folder):
    """Return the class names of `wnids.txt`; ValueError if this is not TinyImageNet or training classes are missing."""
    if not (folder / "wnids.txt").is_file() or not (folder / "val").is_dir():
        raise ValueError(f"{folder} is not TinyImageNet: it has no wnids.txt or no val/ (unpack tiny-imagenet-200.zip)")
    classes = set(read_text(folder / "wnids.txt").split())
    lacking = sorted(name for name in classes if not (folder / "train" / name).is_dir())
    if not classes or lacking:
        raise ValueError(
            f"{folder}: {len(lacking)} of {len(classes)} classes of wnids.txt have no folder in train/"
            + (f", the first is {lacking[0]}" if lacking else "")
        )
    return classes


def read_annotations(path, classes):
    """Return {image name: class} of `val_annotations.txt`; ValueError on a bad line or a class without images."""
    labels = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        image, _, rest = line.partition("\t")
        label = rest.partition("\t")[0].strip()
        if not image or Path(image).name != image or label not in classes or image in labels:
            raise ValueError(f"{path}, line {number}: expected a new image name, a tab and a class of wnids.txt")
        labels[image] = label
    empty = sorted(classes - set(labels.values()))
    if empty:
        raise ValueError(f"{path}: {len(empty)} of {len(classes)} classes have no image, the first is {empty[0]}")
    return labels


def is_complete(folder, images, labels):
    """Tell whether `folder` holds exactly the labelled images, each in its class and as long as the original."""
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return found == {f"{label}/{image}": (images / image).stat().st_size for image, label in labels.items()}


def link(source, target):
    """Hard-link `source` as `target`, or copy it where links are impossible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def build(folder, images, labels):
    """Write `val_sorted` under a temporary name and rename it when it is complete."""
    partial = folder / PARTIAL
    if partial.exists():  # left by a run that was killed
        shutil.rmtree(partial)
    try:
        for label in sorted(set(labels.values())):
            (partial / label).mkdir(parents=True)
        for image, label in labels.items():
            link((images / image).resolve(), partial / label / image)
        if not is_complete(partial, images, labels):
            raise ValueError(f"{partial} came out incomplete: is something else writing there? Run again")
        partial.rename(folder / "val_sorted")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def prepare(folder):
    """Sort the validation images of `folder` and return one line saying what was done; ValueError, OSError."""
    classes = read_classes(folder)
    images, target = folder / "val" / "images", folder / "val_sorted"
    if not images.is_dir() and all((folder / "val" / name).is_dir() for name in classes):
        return f"{folder / 'val'} is sorted into {len(classes)} class folders already: nothing to do"
    if not images.is_dir() or not (folder / "val" / "val_annotations.txt").is_file():
        raise ValueError(f"{folder / 'val'} lacks images/ or val_annotations.txt: unpack tiny-imagenet-200.zip again")
    labels = read_annotations(folder / "val" / "val_annotations.txt", classes)
    missing = sorted(image for image in labels if not (images / image).is_file())
    if missing:
        count = f"{len(missing)} of {len(labels)}"
        raise ValueError(f"{images}: {count} annotated images are missing, the first is {missing[0]}")
    counts = Counter(labels.values()).values()
    summary = f"{target}: {len(labels)} images, {len(classes)} classes, {min(counts)} to {max(counts)} images a class"
    if target.exists():
        if not is_complete(target, images, labels):
            raise ValueError(f"{target} does not match val/val_annotations.txt: move it away and run again")
        return f"{summary}; it is there already"
    build(folder, images, labels)
    return summary


def main():
    """Run from the command line; one line on stderr and exit status 2 if the folder is not usable, 130 if interrupted."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="default: tiny-imagenet-200, here or beside this script")
    try:
        print(prepare(parser.parse_args().folder or default_folder()))
    except (OSError, ValueError) as error:
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted: run it again\n")


if __name__ == "__main__":
    main()
