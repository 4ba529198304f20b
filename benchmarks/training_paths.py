"""The two ways of training that are timed, and the clock and memory meter they are timed with."""

import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import augment  # noqa: E402
import batches  # noqa: E402
import datasets  # noqa: E402
import engine  # noqa: E402
import losses  # noqa: E402
import models  # noqa: E402
import options  # noqa: E402
from metrics import training_sums  # noqa: E402


def networks(case, classes):
    """Return (model, objective) of a case, freshly initialised from seed 0."""
    torch.manual_seed(0)
    teacher, name = case
    model = models.create(name, classes)
    if teacher:
        return model, losses.HSAKDLoss(models.create(teacher, classes))
    return model, losses.MutualLoss() if models.is_pair(name) else losses.TeacherLoss()


def synthetic(args, case):
    """Return the training images of one round: an ImageSet of random pixels."""
    size, classes = (224, 1000) if models.is_imagenet(case[1]) else (32, 100)
    generator, count = torch.Generator().manual_seed(0), args.batch_size * args.steps
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return datasets.in_memory(images, labels, range(classes), datasets.CIFAR100_STATISTICS)


class PublishedImages(Dataset):
    """Images as the published scripts read them: one at a time, through PIL."""

    def __init__(self, image_set):
        self.images = image_set.images().permute(0, 2, 3, 1).numpy()
        self.labels = image_set.labels.tolist()
        crop = [transforms.RandomCrop(image_set.size, padding=4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(*image_set.statistics)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Reference:
    """The published scripts' training loop."""

    def __init__(self, args, case, image_set, world):
        self.device = world.device
        self.model, self.objective = networks(case, len(image_set.classes))
        self.model.to(self.device)
        self.objective.to(self.device)
        self.loader = DataLoader(PublishedImages(image_set), args.batch_size, shuffle=True)
        nesterov = not models.is_imagenet(case[1])
        parameters = self.model.parameters()
        self.optimizer = torch.optim.SGD(parameters, 0.05, 0.9, weight_decay=5e-4, nesterov=nesterov, foreach=False)

    def round(self):
        """Train on every image once."""
        self.model.train()
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            terms, predictions = self.objective.step(self.model, images, labels)
            sum(terms.values()).backward()
            self.optimizer.step()
            for value in training_sums(terms, predictions, labels).values():
                value.item()


class Ours:
    """The engine's own epoch; nothing is written."""

    def __init__(self, args, case, image_set, world, compiled=False):
        model, objective = networks(case, len(image_set.classes))
        argv = ["--arch", case[1], "--batch-size", str(args.batch_size), "--amp", args.amp, *["--compile"] * compiled]
        settings = options.finish(options.training_parser(__file__, __doc__, case[1]), argv)
        crop_flip = augment.CropFlip(image_set.size)
        train = batches.DeviceBatches(image_set, args.batch_size, crop_flip, world, 0)
        data = batches.Data(train, None, None, len(image_set.classes), image_set.size)
        self.run = engine.Run(settings, world, model, objective, data)
        self.run.prepare()

    def round(self):
        """Train on every image once."""
        self.run.train_epoch(0, self)
        self.run.step_in_epoch = 0

    def agreed(self, *_):
        """Stand in for the engine's StopSignal: nothing asks to stop."""
        return False

    def flops(self):
        """Return the floating-point operations of one step, counted."""
        images, labels = next(self.run.data.train.epoch(0))
        with FlopCounterMode(display=False) as counter:
            self.run.step(images, labels, 0)
        return counter.get_total_flops()

    def shares(self, device):
        """Return part -> share of a round's time, with every part waited for."""
        spent = dict.fromkeys(["data", "forward", "backward", "optimizer", "metrics"], 0.0)

        def timed(name, function, within=None):
            def call(*args, **kwargs):
                began = now(device)
                result = function(*args, **kwargs)
                seconds = now(device) - began
                spent[name] += seconds
                if within:
                    spent[within] -= seconds
                return result

            return call

        run = self.run
        with (
            patch.object(run, "forward", timed("forward", run.forward)),
            patch.object(engine, "training_sums", timed("metrics", training_sums, within="forward")),
            patch.object(run.totals, "add", timed("metrics", run.totals.add)),
            patch.object(torch.Tensor, "backward", timed("backward", torch.Tensor.backward)),
            patch.object(run.scaler, "step", timed("optimizer", run.scaler.step)),
        ):
            began = now(device)
            self.round()
            whole = now(device) - began
        spent["data"] = whole - sum(spent.values())  # what is left: batches, and the loop itself
        return {name: seconds / whole for name, seconds in spent.items()}


def now(device):
    """Return the time at which everything asked of the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Peak:
    """Peak memory in MiB since its creation: the allocator's on a GPU, else the process's resident memory."""

    def __init__(self, device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # where it is not allowed, the peak is that of the whole process so far
                Path("/proc/self/clear_refs").write_text("5")

    def read(self):
        """Return the MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
