"""A store of the teacher's outputs for fixed views of the training images, filled once and read by every run.

The views of an image are drawn once (`--views`), so a fixed teacher's outputs are too (FKD, Shen & Xing, ECCV 2022).
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
import torch
from torch import Tensor

from methods import Outputs
from training import distributed, start
from training.precision import autocast, type_name
from training.progress import Progress
from training.run_folder import json_form, read_json
from utils import UserError, World, print_main, replacing, warn

if TYPE_CHECKING:
    from training.trainer import Trainer

IMAGES = {"cpu": 64, "cuda": 512}  # of a filling batch, times the rotated views
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}  # numpy has no bfloat16


class TeacherCache:
    """The outputs of all (view, image) pairs: `rows(index, view)` gives what the teacher would have.

    A row holds the class logits and the auxiliary logits of an image's rotated views, one after the other.
    """

    def __init__(self, folder: Path, shapes: list[list[int]], count: int, views: int, dtype: torch.dtype):
        self.folder, self.shapes, self.count, self.views, self.dtype = folder, shapes, count, views, dtype
        self.width = sum(rows * columns for rows, columns in shapes)
        self.values: Tensor | None = None

    @property
    def size(self) -> int:
        """The bytes of the store."""
        return self.count * self.views * self.width * self.dtype.itemsize

    def complete(self) -> bool:
        """Return whether every row is there."""
        return (self.folder / "complete.json").is_file()

    @contextlib.contextmanager
    def alone(self, world: World) -> Iterator[None]:
        """Let one run at a time fill the store; another waits. UserError if the disk is too small."""
        lock = filelock.FileLock(self.folder / ".lock", fallback_to_soft=False)
        if world.is_main:
            self.make_folder()
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                print_main(f"{self.folder}: another run is filling this store: waiting for it")
                lock.acquire()
            except (OSError, NotImplementedError):
                warn(f"warning: {self.folder}: its file system has no locks; see to it that no other run fills it")
        distributed.barrier()
        try:
            yield
        finally:
            lock.release()

    def make_folder(self) -> None:
        """Make the store's folder; UserError if it cannot be made, or its disk is too small."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--teacher-cache {self.folder.parent}: {error.strerror}") from None
        path = self.folder / "outputs.bin"
        written = path.stat().st_blocks * 512 if path.is_file() else 0
        free = shutil.disk_usage(self.folder).free
        if self.size - written > free:
            sizes = f"the store takes {self.size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
            raise UserError(f"--teacher-cache {self.folder.parent}: {sizes}")

    def map(self, world: World) -> np.memmap:
        """Return the rows (views * images, width), mapped into memory for writing; a new file has its full length."""
        return mapped(self.folder / "outputs.bin", NUMPY[self.dtype], (self.count * self.views, self.width), world)

    def marks(self, world: World, blocks: int) -> np.memmap:
        """Return a mark for each block of rows, mapped into memory: 1 once they are written."""
        return mapped(self.folder / "marks.bin", np.uint8, (blocks,), world)

    def open(self, device: torch.device) -> None:
        """Make the rows readable: in the device's memory if they fit there, else mapped into the host's."""
        path = self.folder / "outputs.bin"
        values = torch.from_file(str(path), False, self.count * self.views * self.width, dtype=self.dtype)
        self.values = values.view(self.count * self.views, self.width)
        if device.type == "cuda" and self.size < 0.5 * torch.cuda.mem_get_info(device)[0]:
            self.values = self.values.to(device)

    def rows(self, index: Tensor, view: Tensor) -> Outputs:
        """Return the teacher's outputs for the views `view` (B,) of the images `index` (B,)."""
        device = index.device
        found = self.values[(view * self.count + index).to(self.values.device)].to(device, non_blocking=True)
        parts = found.split([rows * columns for rows, columns in self.shapes], dim=1)
        logits, *aux = (part.reshape(-1, shape[1]) for part, shape in zip(parts, self.shapes, strict=True))
        return Outputs(logits, aux)


def mapped(path: Path, dtype: type, shape: tuple[int, ...], world: World) -> np.memmap:
    """Return a file mapped into memory for writing; the first process makes it, of zeros, if there is none."""
    length = np.dtype(dtype).itemsize * math.prod(shape)
    if world.is_main and not (path.is_file() and path.stat().st_size == length):
        np.memmap(path, dtype, "w+", shape=shape)
    distributed.barrier()
    return np.memmap(path, dtype, "r+", shape=shape)


def prepare(trainer: "Trainer") -> TeacherCache:
    """Return the open store of what a Trainer's method reads of the teacher, and free the teacher's memory.

    The first run that needs the store fills it. UserError if the method reads other things of the teacher, if there are
    no fixed views, or if the disk is too small.
    """
    objective, train, device = trainer.objective, trainer.train, trainer.world.device
    if objective.reads not in ("logits", "heads"):
        raise UserError(f"--teacher-cache has no part in {objective.name}: it stores logits and heads alone")
    if not getattr(train, "views", None):
        raise UserError("--teacher-cache needs --views: the teacher's outputs are those of fixed views")
    dtype = trainer.precision if trainer.cache_dtype == "exact" else torch.float16
    key = {"teacher": trainer.teacher_digest, "reads": objective.reads, **train.views_key()}
    key = json_form({**key, "precision": type_name(trainer.precision), "stored": type_name(dtype)})
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    first = torch.zeros(1, dtype=torch.int64)
    images, *_ = next(train.read_views([(first, first)]))
    shapes = [list(part.shape) for part in teacher_parts(trainer, images)]
    cache = TeacherCache(Path(trainer.teacher_cache) / name, shapes, train.num_images, train.views, dtype)
    if not cache.complete():
        with cache.alone(trainer.world):
            if not cache.complete():
                fill(cache, trainer, key)
    distributed.barrier()
    found = read_json(cache.folder / "complete.json")
    print_main(f"teacher's outputs: {cache.folder}, {cache.size / 2**20:.0f} MiB, top-1 {found['teacher_top1']:.2f}")
    cache.open(device)
    objective.teacher = None
    return cache


def teacher_parts(trainer: "Trainer", images: Tensor) -> list[Tensor]:
    """Return the class logits and the auxiliary logits, each (views, outputs), that the method reads for images."""
    images = images.to(trainer.world.device, memory_format=trainer.layout)
    with autocast(trainer.world.device, trainer.precision):
        outputs = trainer.objective.read_teacher(images)
    return [outputs.logits, *outputs.aux_logits]


def fill(cache: TeacherCache, trainer: "Trainer", key: dict) -> None:
    """Compute every row that is missing, each process its share of the blocks, and note that the store is complete.

    A block's mark is set once its rows are written, so a killed run leaves no half-written row behind.
    """
    world, size = trainer.world, IMAGES.get(trainer.world.device.type, IMAGES["cpu"])
    blocks = blocks_of(cache.count, cache.views, size)
    rows, marks = cache.map(world), cache.marks(world, len(blocks))
    left = [number for number in range(len(blocks)) if not marks[number]]
    print_main(f"filling {cache.folder}: {cache.size / 2**20:.0f} MiB, {len(left)} of {len(blocks)} blocks are missing")
    left = left[world.rank :: world.size]
    progress = Progress("teacher's outputs", 0, len(left), world.is_main, dict)
    distributed.barrier()  # all have read the marks before one writes them
    for number, (images, index, view) in zip(left, trainer.train.read_views(blocks[n] for n in left), strict=True):
        parts = [part.to(cache.dtype).reshape(len(index), -1) for part in teacher_parts(trainer, images)]
        joined = torch.cat(parts, dim=1).cpu()
        at = (view * cache.count + index).cpu().numpy()
        rows[at] = (joined.view(torch.uint16) if cache.dtype == torch.bfloat16 else joined).numpy()
        marks[number] = 1
        progress.update()
    progress.close()
    rows.flush()
    accuracy, _ = start.accuracy(trainer, trainer.objective.teacher, False)
    distributed.barrier()
    if world.is_main:
        with replacing(cache.folder / "complete.json", "w") as file:
            json.dump({**key, "shapes": cache.shapes, "teacher_top1": accuracy["top1"]}, file, indent=1)


def blocks_of(count: int, views: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the (index, view) tensors, each (size,) or less, of all views of `count` images."""
    parts = torch.arange(count).split(size)
    return [(index, torch.full_like(index, view)) for view in range(views) for index in parts]
