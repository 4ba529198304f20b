"""A store of the teacher's outputs for fixed views of the training images, filled once and read by every run.

The views of an image are drawn once (`--views`), so a fixed teacher's outputs are too (FKD, Shen & Xing, ECCV 2022).
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
import torch
from torch import Tensor

from methods import Objective, Outputs
from training import distributed, start
from training.precision import autocast, type_name
from training.progress import Progress
from training.run_folder import acquired, json_form
from utils import UserError, World, print_main, read_json, replacing

if TYPE_CHECKING:
    from training.trainer import Trainer

IMAGES = {"cpu": 64, "cuda": 512}  # of a filling batch, times the rotated views
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}  # numpy has no bfloat16
POLL_EVERY = 60  # seconds after which processes that wait for another run's filling hear of each other


class TeacherCache:
    """The outputs of all (view, image) pairs: `rows(index, view)` returns what the teacher would output.

    A row holds the class logits and the auxiliary logits of an image's rotated views, one after the other. The rows of
    view 0 come first, so a run with more views lengthens the store.
    """

    def __init__(self, root: Path, key: dict, count: int, views: int, dtype: torch.dtype):
        self.key, self.count, self.views, self.dtype = key, count, views, dtype
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = root / name
        self.outputs, self.marks, self.record = (self.folder / f for f in ("outputs.bin", "marks.bin", "complete.json"))
        self.sizes = [rows * columns for rows, columns in key["shapes"]]
        self.row = sum(self.sizes)
        self.size = count * views * self.row * dtype.itemsize  # bytes
        self.values: np.memmap | Tensor | None = None

    def complete(self) -> bool:
        """Return whether every row is there."""
        found = read_json(self.record)
        return found is not None and found["views"] >= self.views and length_of(self.outputs) >= self.size

    def check_room(self) -> None:
        """Make the store's folder; UserError if its disk is too small."""
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = self.outputs.stat().st_blocks * 512 if self.outputs.exists() else 0
        free = shutil.disk_usage(self.folder).free
        if self.size - taken > free:
            sizes = f"the store takes {self.size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
            raise UserError(f"--teacher-cache {self.folder.parent}: {sizes}")

    @contextlib.contextmanager
    def alone(self, world: World) -> Iterator[None]:
        """Let one run at a time fill the store; another waits."""
        lock, patience = filelock.FileLock(self.folder / ".lock", fallback_to_soft=False), 0
        while distributed.any_over_ranks(world.is_main and not acquired(lock, patience), world):
            if not patience:
                print_main(f"{self.folder}: another run is filling this store: waiting for it")
            patience = POLL_EVERY
        try:
            yield
        finally:
            lock.release()

    def make_files(self) -> None:
        """Make the files, or lengthen them, with zeros; marks whose rows are lost do not count.

        Disk space is reserved at once: writing to mapped memory without any would kill the process (SIGBUS).
        """
        if length_of(self.outputs) < length_of(self.marks) * self.row * self.dtype.itemsize:
            self.record.unlink(missing_ok=True)
            self.marks.unlink()
        for path, length in ((self.outputs, self.size), (self.marks, self.count * self.views)):
            if length_of(path) < length:
                path.touch()
                with open(path, "r+b") as file:  # not to append, which glibc's emulation on NFS refuses
                    reserve = getattr(os, "posix_fallocate", lambda number, _, length: os.truncate(number, length))
                    reserve(file.fileno(), 0, length)

    def mapped(self, mode: str) -> np.memmap:
        """Return the rows (views * images, numbers), mapped into memory."""
        return np.memmap(self.outputs, NUMPY[self.dtype], mode, shape=(self.count * self.views, self.row))

    def open(self, device: torch.device) -> None:
        """Make the rows readable: in a GPU's memory if they fit there, else mapped into the host's."""
        self.values = self.mapped("r")
        if device.type == "cuda" and self.size < 0.5 * torch.cuda.mem_get_info(device)[0]:
            flat = torch.from_file(str(self.outputs), size=self.values.size, dtype=self.dtype)
            self.values = flat.view(self.values.shape).to(device)

    def rows(self, index: Tensor, view: Tensor) -> Outputs:
        """Return the teacher's outputs for the views `view` (B,) of the images `index` (B,)."""
        at = view * self.count + index
        if torch.is_tensor(self.values):
            found = self.values[at]
        else:
            found = torch.from_numpy(self.values[at.cpu().numpy()]).view(self.dtype).to(index.device)
        parts = zip(found.split(self.sizes, dim=1), self.key["shapes"], strict=True)
        logits, *aux = (part.reshape(-1, columns) for part, (_, columns) in parts)
        return Outputs(logits, aux)


def length_of(path: Path) -> int:
    """Return the bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def find(trainer: "Trainer") -> TeacherCache:
    """Return the store, possibly still empty, of the teacher's outputs that a Trainer's method reads.

    UserError if the method reads other things, if there are no fixed views, or if the disk is too small.
    """
    objective, train = trainer.objective, trainer.train
    known = trainer.teacher_digest and type(objective).read_teacher is Objective.read_teacher
    if objective.reads not in ("logits", "heads") or not known:
        raise UserError(f"--teacher-cache has no part in {objective.name}: it stores a network's logits and heads")
    if not getattr(train, "views", None):
        raise UserError("--teacher-cache needs --views: the teacher's outputs are those of fixed views")
    dtype = trainer.precision if trainer.cache_dtype == "exact" else torch.float16
    parts = teacher_parts(trainer, torch.zeros(1, 3, train.size, train.size))
    network = getattr(objective.teacher, "arch", type(objective.teacher).__name__)
    key = {"teacher": trainer.teacher_digest, "network": network, "shapes": [list(part.shape) for part in parts]}
    key |= {"precision": type_name(trainer.precision), "stored": type_name(dtype)}
    key = json_form({**key, **train.views_key()})
    cache = TeacherCache(Path(trainer.teacher_cache), key, train.num_images, train.views, dtype)
    if trainer.world.is_main and not cache.complete():
        cache.check_room()
    return cache


def prepare(cache: TeacherCache, trainer: "Trainer") -> None:
    """Fill the store if no run has, open it, and free the teacher's memory."""
    world = trainer.world
    if distributed.any_over_ranks(not cache.complete(), world):
        with cache.alone(world):
            if distributed.any_over_ranks(not cache.complete(), world):
                fill(cache, trainer)
    top1 = read_json(cache.record)["teacher_top1"]
    print_main(f"teacher's outputs: {cache.folder}, {cache.size / 2**20:.0f} MiB, top-1 {top1:.2f}")
    cache.open(world.device)
    trainer.objective.teacher = None


def teacher_parts(trainer: "Trainer", images: Tensor) -> list[Tensor]:
    """Return the class logits and the auxiliary logits, each (views, outputs), that the method reads for images."""
    images = images.to(trainer.world.device, memory_format=trainer.layout)
    with autocast(trainer.world.device, trainer.precision):
        outputs = trainer.objective.read_teacher(images)
    return [outputs.logits, *outputs.aux_logits]


def fill(cache: TeacherCache, trainer: "Trainer") -> None:
    """Compute every row that is missing, each process its share of the batches, and note that the store is complete.

    A row is marked once it is on the disk, so a row half-written by a killed run is computed again.
    """
    world, began = trainer.world, time.monotonic()
    if world.is_main:
        cache.make_files()
    distributed.barrier()
    rows, marks = cache.mapped("r+"), np.memmap(cache.marks, np.uint8, "r+", shape=cache.count * cache.views)
    missing = torch.from_numpy(np.flatnonzero(marks == 0))
    print_main(f"filling {cache.folder}, {cache.size / 2**20:.0f} MiB: {len(missing)} of {len(marks)} rows are missing")
    distributed.barrier()  # all have read the marks before one writes them
    batches = missing.split(IMAGES.get(world.device.type, IMAGES["cpu"])) if len(missing) else ()
    batches = batches[world.rank :: world.size]

    def measure() -> dict[str, float]:
        return {"minutes left": (time.monotonic() - began) / 60 * (progress.steps / progress.step - 1)}

    progress = Progress("teacher's outputs", 0, len(batches), world.is_main, measure)
    for at, values, copied in computed(cache, trainer, batches):
        if copied:
            copied.synchronize()
        rows[at] = values.numpy()
        rows.flush()
        marks[at] = 1
        progress.update()
    progress.close()
    seconds = time.monotonic() - began
    print_main(f"filled in {seconds:.0f} s, {len(missing) / seconds:.0f} images/s")
    accuracy, _ = start.accuracy(trainer, trainer.objective.teacher, False)  # of all processes: none fills any more
    if world.is_main:
        with replacing(cache.record, "w") as file:
            json.dump({**cache.key, "views": cache.views, "teacher_top1": accuracy["top1"]}, file, indent=1)
    distributed.barrier()


def computed(cache: TeacherCache, trainer: "Trainer", batches: Iterable[Tensor]) -> Iterator[tuple]:
    """Yield (numbers of rows, values, event of their copy) of batches, each once a GPU computes the next one."""
    blocks, last = ((at % cache.count, at // cache.count) for at in batches), []
    for images, index, view in trainer.train.read_views(blocks):  # without images that cannot be read
        at = (view * cache.count + index).cpu().numpy()
        parts = [part.to(cache.dtype).reshape(len(index), -1) for part in teacher_parts(trainer, images)]
        values = torch.cat(parts, dim=1).to("cpu", non_blocking=images.is_cuda)
        copied = torch.cuda.current_stream().record_event() if images.is_cuda else None
        yield from last
        last = [(at, values.view(torch.int16) if cache.dtype == torch.bfloat16 else values, copied)]
    yield from last
