"""The ways of training that are timed, each in a process of its own, and what measures them."""

import contextlib
import io
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import imagesets  # noqa: E402
import methods  # noqa: E402
import models  # noqa: E402
from imagesets import in_memory  # noqa: E402
from imagesets.augment import CropFlip  # noqa: E402
from imagesets.images import ImageSet  # noqa: E402
from training import Trainer, metrics  # noqa: E402
from training.precision import autocast, resolve_precision, type_name  # noqa: E402
from utils import World  # noqa: E402

RATE = 0.001  # of learning: random labels are not to diverge


class Case(NamedTuple):
    """What is trained, and how much of it in a round."""

    networks: str  # "teacher:student" for HSAKD, with or without their _aux; or a mutual pair; or a teacher
    batch_size: int = 64
    steps: int = 2
    amp: str = "auto"

    @property
    def names(self) -> tuple[str | None, str, int, int]:
        """Teacher, if there is one, and trained network; pixels a side and number of classes of their images."""
        teacher, _, student = self.networks.rpartition(":")
        student = student if models.is_pair(student) else f"{models.backbone_name(student)}_aux"
        return (
            teacher and f"{models.backbone_name(teacher)}_aux",
            student,
            *((224, 1000) if models.is_imagenet(student) else (32, 100)),
        )

    def create(self) -> tuple[torch.nn.Module, methods.Objective]:
        """Return (model, objective), freshly initialised from seed 0."""
        torch.manual_seed(0)
        teacher, student, _, classes = self.names
        model = models.create(student, classes)
        if teacher:
            return model, methods.HSAKD(models.create(teacher, classes))
        return model, methods.HSSAKD() if models.is_pair(student) else methods.Teacher()

    def images(self) -> ImageSet:
        """Return the training images of one round, random pixels."""
        *_, size, classes = self.names
        generator, count = torch.Generator().manual_seed(0), self.batch_size * self.steps
        pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, classes, (count,), generator=generator)
        return ImageSet(labels, list(map(str, range(classes))), imagesets.STATISTICS["cifar100"], size, pixels)

    def flops(self, taught: bool) -> float:
        """Return the floating-point operations of an image's four views: three times the student's, the teacher's once.

        Those of a backward pass are not counted: torch's counter takes a grouped convolution's for a dense one's.
        """
        teacher, student, size, classes = self.names
        forward = 3 * metrics.multiply_adds(models.create(student, classes), size)
        forward += metrics.multiply_adds(models.create(teacher, classes), size) if taught and teacher else 0
        return 2 * forward * 4


class PublishedImages(Dataset):
    """Images as the published scripts read them: one at a time, through PIL."""

    def __init__(self, images: ImageSet):
        self.pixels, self.labels = images.pixels.permute(0, 2, 3, 1).numpy(), images.labels.tolist()
        crop = [transforms.RandomCrop(images.size, padding=4), *[transforms.RandomHorizontalFlip()] * images.flip]
        self.transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(*images.statistics)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Reference:
    """The published scripts' loop: float32, NCHW, eager, losses and metrics read in every step."""

    precision = torch.float32

    def __init__(self, model, objective, loader, device, lr=RATE, nesterov=True):
        torch.backends.cudnn.benchmark = True  # as in the Trainer, so that the ratio is not of this
        self.model, self.objective, self.loader, self.device = model.to(device), objective.to(device), loader, device
        self.optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=nesterov)

    def round(self, epoch: int = 0) -> None:
        """Train on every image of the loader once."""
        self.model.train()
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            terms, predictions = self.objective.step(self.model, methods.Batch(images, labels, epoch))
            sum(terms.values()).backward()
            self.optimizer.step()
            for value in metrics.training_sums(terms, predictions, labels).values():
                value.item()


class Ours:
    """The Trainer's epoch: default, compile; without the teacher's pass stored (in `folder`), stored-compile, memory.

    The path filling is the default one on fixed views.
    """

    def __init__(self, case: Case, world: World, path: str = "default", folder: str | None = None):
        images, (model, objective) = case.images(), case.create()
        views = None if path in ("default", "compile") else 1
        train = in_memory.TrainBatches(images, CropFlip(images.size), case.batch_size, 0, world, views=views)
        first, labels, *_ = next(iter(train))
        settings = {"epochs": 1, "lr": RATE, "amp": case.amp, "compile": "compile" in path, "world": world}
        settings |= {"teacher_cache": folder if "stored" in path else None, "test": [(first[:2], labels[:2])]}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.trainer = Trainer(model, objective, train=train, **settings)
        self.precision = self.trainer.precision
        if path == "memory":  # one batch's outputs for every batch
            with autocast(world.device, self.precision):
                outputs = objective.read_teacher(first)
            self.trainer.cache, objective.teacher = SimpleNamespace(rows=lambda *_: outputs), None

    def round(self) -> None:
        """Train on every image once."""
        self.trainer.train_epoch(0, None)
        self.trainer.step_in_epoch = 0


class Apart:
    """A path in a process of its own, so that neither its memory nor its allocator's habits are another path's.

    `start_seconds`: from the process's start to the end of its first round, imports and all.
    """

    def __init__(self, path: str, case: Case, device: torch.device):
        context, began = multiprocessing.get_context("spawn"), time.perf_counter()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, path, case, device), daemon=True)
        self.process.start()
        theirs.close()
        self.precision = self.answer()
        self.round()
        self.start_seconds = time.perf_counter() - began

    def answer(self) -> Any:
        """Return what the process says next; RuntimeError if it has ended, which it has explained on stderr."""
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError("this path's process has ended") from None

    def round(self) -> tuple[float, float]:
        """Return the seconds of a round and its peak MiB."""
        self.pipe.send("round")
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def serve(pipe: Any, path: str, case: Case, device: torch.device) -> None:
    """Answer an Apart: the name of the path's precision, then each round's seconds and peak MiB."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(EOFError):  # the other end is closed
        if path == "reference":
            loader = DataLoader(PublishedImages(case.images()), case.batch_size, shuffle=True)
            made = Reference(*case.create(), loader, device, nesterov=not models.is_imagenet(case.names[1]))
        else:
            made = Ours(case, World(0, 1, device), path, folder)
        pipe.send(type_name(made.precision))
        while pipe.recv():
            forget_peak()
            began = now(device)
            made.round()
            pipe.send((now(device) - began, peak(device)))


def now(device: torch.device) -> float:
    """Return the time at which everything asked of the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forget_peak() -> None:
    """Count the peak of resident memory anew; where that is not allowed, it is the whole process's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float:
    """Return the peak memory in MiB: of a GPU's allocator since the process began, else resident memory."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return metrics.peak_memory(device)
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def spread(values: list[float]) -> dict[str, Any]:
    """Return median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high]}


def ranged(found: dict[str, Any], digits: int) -> str:
    """Return a spread as text."""
    low, high = found["quartiles"]
    return f"{found['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def matmul_rates(device: torch.device, amp: str) -> dict[str, float]:
    """Return the FLOP/s of a large matrix product, the median of five, in float32 and in a run's precision, by name.

    On a GPU it is as precise as convolutions are there.
    """
    side, before, found = 8192 if device.type == "cuda" else 2048, torch.backends.cuda.matmul.allow_tf32, {}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    for dtype in {torch.float32, resolve_precision(amp, device)}:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        times = []
        for _ in range(7):
            began = now(device)
            torch.mm(left, right)
            times.append(now(device) - began)
        found[type_name(dtype)] = 2 * side**3 / median(times[2:])
    torch.backends.cuda.matmul.allow_tf32 = before
    return found
