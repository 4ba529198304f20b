"""A split of a data set, how it is read, and what an image file holds."""

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from utils import UserError, World, first_line, warn

try:
    from torchvision.io import decode_jpeg
except ImportError:  # torchvision has announced that it will leave; PIL reads the files then
    decode_jpeg = None

# Not Pillow's whole list: its reader of EPS runs Ghostscript on a file, whatever its extension.
FORMATS = ["JPEG", "JPEG2000", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF"]
with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
    FORMATS.append("HEIF")
Image.init()
FORMATS = [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has no AVIF
UNREADABLE = (OSError, EOFError, ValueError, SyntaxError, RuntimeError, MemoryError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of `imagesets.load` and `imagesets.load_test`."""

    batch_size: int = 64  # images of a step, over all processes
    seed: int = 0  # of order and augmentation
    world: World = World()  # noqa: RUF009 - a tuple
    workers: int = 4  # threads, or processes if images are not kept in memory, that read files
    limit: int | None = None  # batches of a pass; tests in memory: of 256+ images
    val_split: float = 0.0  # share of training images held out
    few_ratio: float | None = None  # share of the others trained on
    skip_bad_images: bool = False
    views: int | None = None  # fixed views of each training image, of which an epoch draws one; None: new ones
    views_seed: int = 0
    crop_size: int | None = None  # train on random resized crops of this size of images in memory, and test at it
    augment: str | None = None  # crop, rrc, randaugment, strong, none; as published, for own images by their size
    flip: bool | None = None  # whether mirrored images keep their class
    mean: tuple | str | None = None  # of the normalisation; "auto": mean and std of the training images
    std: tuple | None = None
    class_names: list[str] | None = None  # the order of the classes
    # Of folders of images:
    size: int | None = None  # pixels a side; by default the median of the shorter sides, at most 96
    resize: str = "crop"  # how images become square: crop, squash, pad
    margin: float | None = None  # shorter side before the centre crop, in sizes; by default 1, of ImageNet 256 / 224
    keep: str | None = None  # "memory" or "files"; by default in memory up to 2 GB
    test_split: float | None = None  # share of the images that are tests if there is no folder of these
    split_of: int | None = None  # images of which the tests were drawn when the weights at hand were trained
    grey_range: tuple[int, int] | None = None  # 16-bit values that become black and white; by default those in use


@dataclass
class ImageSet:
    """One split: its images are `pixels` (N, 3, S, S) uint8 on the CPU, or files at `paths` (N,) of encoded names."""

    labels: torch.Tensor  # (N,) int64
    classes: list[str]
    statistics: tuple  # mean and std of the normalisation, on the scale 0 to 1
    size: int = 0  # S, also of files once they are read
    pixels: torch.Tensor | None = None
    paths: np.ndarray | None = None  # one array, since workers would copy a list of texts
    in_memory: bool = True  # or read from files again in every pass
    resize: str = "crop"
    margin: float = 1.0  # shorter side before the centre crop, in sizes
    grey_range: tuple[int, int] = (0, 65535)
    flip: bool = True  # whether a mirrored image keeps its class
    split_of: int | None = None  # images of which tests were drawn, if they were

    def __len__(self):
        return len(self.labels)

    def fingerprint(self) -> str:
        """Return a hash of the set: of its pixels, or of the files' names, sizes and times."""
        found = hashlib.sha256(str((self.size, self.resize, self.grey_range)).encode())
        if self.pixels is not None:
            found.update(self.pixels.numpy().tobytes())
            return found.hexdigest()[:16]
        for path in map(os.fsdecode, self.paths):
            stat = os.stat(path)
            found.update(f"{path.split(os.sep)[-2:]} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return found.hexdigest()[:16]

    def subset(self, indices: torch.Tensor) -> "ImageSet":
        """Return the images at `indices`, in that order."""
        pixels = None if self.pixels is None else self.pixels[indices]
        paths = None if self.paths is None else self.paths[indices.numpy()]
        return replace(self, labels=self.labels[indices], pixels=pixels, paths=paths)

    def some(self, count: int) -> "ImageSet":
        """Return at most `count` images, evenly spaced."""
        return self.subset(torch.arange(0, len(self), math.ceil(len(self) / count)))

    def stratified(self, ratio: float) -> tuple["ImageSet", "ImageSet"]:
        """Return a stratified share `ratio` of the images, and the rest.

        As in the published few-shot runs: scikit-learn's StratifiedShuffleSplit with random_state 0; 1 means all.
        """
        from sklearn.model_selection import StratifiedShuffleSplit  # takes a second

        if ratio == 1:
            return self, self.subset(torch.arange(0))
        splitter = StratifiedShuffleSplit(n_splits=1, test_size=1 - ratio, random_state=0)
        try:
            kept, _ = next(splitter.split(self.labels, self.labels.numpy()))
        except ValueError as error:
            shares = f"shares of {ratio:g} and {1 - ratio:g}"
            raise UserError(f"cannot draw stratified {shares} of {len(self)} images: {first_line(error)}") from None
        is_kept = torch.zeros(len(self), dtype=torch.bool).index_fill(0, torch.from_numpy(kept), True)
        return self.subset(is_kept.nonzero().flatten()), self.subset((~is_kept).nonzero().flatten())

    def decode(self, number: int) -> torch.Tensor:
        """Return the image in file `number` as (3, H, W) uint8."""
        return decode(os.fsdecode(self.paths[number]), self.grey_range)

    def fitting(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the transform of an image (3, H, W) to this size.

        crop: resized by its shorter side, the centre cropped; squash: resized to a square; pad: resized by its longer
        side, with black borders.
        """
        if self.resize == "squash":
            return v2.Resize((self.size, self.size))
        pad = self.resize == "pad"
        resized = v2.Resize(None, max_size=self.size) if pad else v2.Resize(round(self.size * self.margin))
        return v2.Compose([resized, v2.CenterCrop(self.size)])

    def into_memory(self, settings: Settings) -> "ImageSet":
        """Return the set with its pixels, read by threads; unreadable images may be left out."""
        if self.pixels is not None:
            return self
        fit, pixels = self.fitting(), torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)

        def read(number: int) -> bool:
            try:
                pixels[number] = fit(self.decode(number))
            except UserError as error:
                if not settings.skip_bad_images:
                    raise UserError(f"{error}; --skip-bad-images leaves it out") from None
                warn(f"skipped: {error}")
                return False
            return True

        with ThreadPoolExecutor(max(settings.workers, 1)) as pool:
            readable = torch.tensor(list(pool.map(read, range(len(self)))))
        read_set = replace(self, pixels=pixels, paths=None)
        if readable.all():
            return read_set
        warn(f"skipped {(~readable).sum()} unreadable images of {len(self)}")
        return read_set.subset(readable.nonzero().flatten())


def header(path: str | bytes) -> Image.Image | None:
    """Return the image at `path`, its pixels not read, or None if it is not an image of a known format."""
    with suppress(*UNREADABLE), Image.open(os.fsdecode(path), formats=FORMATS) as image:
        return image
    return None


def to_rgb(image: Image.Image, grey_range: tuple[int, int]) -> Image.Image:
    """Return a PIL image in 8-bit RGB; 16-bit grey, which PIL itself cuts off at 255, is scaled by `grey_range`."""
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        low, high = grey_range
        scaled = (np.asarray(image).astype(np.float64) - low) * (255 / (high - low))
        image = Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # else PIL warns of palettes with it
    return image.convert("RGB")


def decode(path: str, grey_range: tuple[int, int] = (0, 65535)) -> torch.Tensor:
    """Return the image at `path` as (3, H, W) uint8, upright, of any extension; UserError if it cannot be read.

    JPEG is decoded by torchvision, which is faster; Pillow decodes the rest, and what torchvision cannot. Pillow reads
    every header, so its limit of pixels holds for both.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            if decode_jpeg and file.format == "JPEG":
                with suppress(RuntimeError):
                    content = torch.from_numpy(np.fromfile(path, np.uint8))
                    return decode_jpeg(content, "RGB", apply_exif_orientation=True)
            ImageOps.exif_transpose(file, in_place=True)
            image = to_rgb(file, grey_range)
    except UNREADABLE as error:
        raise UserError(f"unreadable image {path} ({first_line(error)})") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
