"""The ways of training that are timed."""

import contextlib
import functools
import io
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import imagesets  # noqa: E402
import methods  # noqa: E402
import models.cost  # noqa: E402
from imagesets import in_memory  # noqa: E402
from imagesets.augment import CropFlip  # noqa: E402
from imagesets.images import ImageSet, Settings  # noqa: E402
from training import Trainer, metrics, teacher_cache  # noqa: E402
from training.precision import autocast, type_name  # noqa: E402
from utils import World  # noqa: E402

SIZE, CLASSES, RATE = 32, 100, 0.001  # of images, of learning: random labels are not to diverge


class Case(NamedTuple):
    """What is trained by HSAKD, and how much of it in a round."""

    pair: str  # TEACHER:STUDENT, with or without their _aux
    batch_size: int
    steps: int
    amp: str

    def create(self) -> tuple[torch.nn.Module, methods.Objective]:
        """Return (student, objective), freshly initialised from seed 0."""
        torch.manual_seed(0)
        names = (f"{models.backbone_name(name)}_aux" for name in self.pair.split(":"))
        teacher, student = (models.create(name, CLASSES) for name in names)
        return student, methods.HSAKD(teacher)

    def images(self) -> ImageSet:
        """Return the training images of one round, random pixels."""
        generator, count = torch.Generator().manual_seed(0), self.batch_size * self.steps
        pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        return ImageSet(labels, list(map(str, range(CLASSES))), imagesets.STATISTICS["cifar100"], SIZE, pixels)

    def flops(self, path: str) -> int:
        """Return the floating-point operations of an image's four views: three times the student's, the teacher's once.

        Those of a backward pass are not counted: torch's counter takes a grouped convolution's for a dense one's.
        """
        student, objective = self.create()
        trained = 0 if path in ("inference", "filling") else 3 * models.cost.multiply_adds(student, SIZE)
        taught = 0 if "stored" in path or path == "memory" else models.cost.multiply_adds(objective.teacher, SIZE)
        return 4 * 2 * (trained + taught)


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

    def __init__(self, model, objective, loader, device, lr=RATE):
        torch.backends.cudnn.benchmark = True  # as in the Trainer, so that the ratio is not of this
        self.model, self.objective, self.loader, self.device = model.to(device), objective.to(device), loader, device
        self.optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True)

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
    """The Trainer's epoch, or the teacher's pass alone (inference, filling); the paths are those of step.py."""

    def __init__(self, case: Case, world: World, path: str):
        images, (model, objective) = case.images(), case.create()
        views = None if path in ("default", "compile") else 1
        batches = Settings(batch_size=case.batch_size, world=world, views=views)
        train = in_memory.TrainBatches(images, CropFlip(SIZE), batches)
        first, labels, *_ = next(iter(train))
        self.path, self.folder = path, tempfile.TemporaryDirectory()
        settings = {"epochs": 1, "lr": RATE, "amp": case.amp, "compile": "compile" in path, "world": world}
        settings["teacher_cache"] = self.folder.name if "stored" in path else None
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.trainer = Trainer(model, objective, train=train, test=[(first[:2], labels[:2])], **settings)
        self.precision = self.trainer.precision
        if path == "memory":  # one batch's outputs for every batch
            with autocast(world.device, self.precision):
                outputs = objective.read_teacher(first)
            self.trainer.cache, objective.teacher = SimpleNamespace(rows=lambda *_: outputs), None

    def round(self) -> None:
        """Train on every image once, or read the teacher for it."""
        if self.path == "inference":
            for images, *_ in self.trainer.train:
                teacher_cache.teacher_parts(self.trainer, images)
        elif self.path == "filling":
            with tempfile.TemporaryDirectory() as self.trainer.teacher_cache, contextlib.redirect_stdout(io.StringIO()):
                teacher_cache.fill(teacher_cache.find(self.trainer), self.trainer)
        else:
            self.trainer.train_epoch(0, None)
            self.trainer.step_in_epoch = 0


@functools.cache
def made(path: str, case: Case, world: World) -> Reference | Ours:
    """Return a way of training, the same one each time in a process."""
    if path == "reference":
        loader = DataLoader(PublishedImages(case.images()), case.batch_size, shuffle=True)
        return Reference(*case.create(), loader, world.device)
    return Ours(case, world, path)


def timed(path: str, case: Case, world: World) -> tuple[float, float, str]:
    """Train for a round in this process; return its seconds, the peak memory in MiB and the precision's name."""
    trained = made(path, case, world)
    began = now(world.device)
    trained.round()
    return now(world.device) - began, metrics.peak_memory(world.device), type_name(trained.precision)


def now(device: torch.device) -> float:
    """Return the time at which everything asked of the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
