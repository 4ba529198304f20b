"""The ways of training that are timed, each in a process of its own, and the clock and memory meter they are timed with."""

import multiprocessing
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from unittest.mock import patch

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import augment  # noqa: E402
import batches  # noqa: E402
import datasets  # noqa: E402
import distributed  # noqa: E402
import engine  # noqa: E402
import loading  # noqa: E402
import losses  # noqa: E402
import models  # noqa: E402
import options  # noqa: E402
from metrics import multiply_adds, peak_memory, training_sums  # noqa: E402
from precision import type_name  # noqa: E402
from preemption import StopSignal  # noqa: E402


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
        crop = [transforms.RandomCrop(image_set.size, padding=4), *[transforms.RandomHorizontalFlip()] * image_set.flip]
        self.transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(*image_set.statistics)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class Reference:
    """The published scripts' training loop; `pair` is a (model, objective) to train instead of the case's, from seed 0."""

    def __init__(self, args, case, image_set, world, pair=None, sampler=None):
        self.device = world.device
        torch.backends.cudnn.benchmark = True  # as in the engine, so that the ratio is not of this
        self.model, self.objective = pair or networks(case, len(image_set.classes))
        self.model.to(self.device)
        self.objective.to(self.device)
        self.loader = DataLoader(PublishedImages(image_set), args.batch_size, shuffle=sampler is None, sampler=sampler)
        nesterov = not models.is_imagenet(case[1])
        parameters = self.model.parameters()
        decay = getattr(args, "weight_decay", 5e-4)
        self.optimizer = torch.optim.SGD(parameters, 0.05, 0.9, weight_decay=decay, nesterov=nesterov)

    def round(self, epoch=0):
        """Train on every image once, or on those of the sampler."""
        self.model.train()
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            terms, predictions = self.objective.step(self.model, images, labels, epoch)
            sum(terms.values()).backward()
            self.optimizer.step()
            for value in training_sums(terms, predictions, labels).values():
                value.item()


class Ours:
    """The engine's own epoch; nothing is written."""

    def __init__(self, args, case, image_set, world, compiled=False):
        self.case = case
        model, objective = networks(case, len(image_set.classes))
        argv = ["--arch", case[1], "--batch-size", str(args.batch_size), "--amp", args.amp, *["--compile"] * compiled]
        settings = options.finish(options.training_parser(__file__, __doc__, case[1]), argv)
        crop_flip = augment.CropFlip(image_set.size)
        train = batches.DeviceBatches(image_set, args.batch_size, crop_flip, world, 0)
        data = loading.Data(train, None, None, len(image_set.classes), image_set.size, {})
        self.run = engine.Run(settings, world, model, objective, data)
        self.run.prepare()

    def round(self):
        """Train on every image once."""
        self.run.train_epoch(0, StopSignal(signals=()))
        self.run.step_in_epoch = 0

    def facts(self):
        """Return the step's precision and arithmetic, the rates of matrix products, and the shares of a round's time."""
        device, precision = self.run.world.device, self.run.precision
        rates = {type_name(dtype): matmul_rate(device, dtype) / 1e9 for dtype in (torch.float32, precision)}
        arithmetic = {"gflop_a_step": self.flops() / 1e9, "matmul_gflops": rates}
        return {"precision": type_name(precision), **arithmetic, "shares": self.shares(device)}

    def flops(self):
        """Return the floating-point operations of one step: the teacher's forward pass, three times the trained network's.

        Those of a backward pass are not counted: torch's counter takes a grouped convolution's for a dense one's.
        """
        teacher, name = self.case
        rotations = 4  # every objective of these cases sees all of them
        classes, size = self.run.data.num_classes, self.run.data.size
        forward = 3 * multiply_adds(models.create(name, classes), size)
        forward += multiply_adds(models.create(teacher, classes), size) if teacher else 0
        return 2 * forward * rotations * self.run.args.batch_size

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


def spread(values):
    """Return median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high]}


def ranged(found, digits):
    """Return a spread as text."""
    low, high = found["quartiles"]
    return f"{found['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


class Peak:
    """Peak memory in MiB: of a GPU's allocator since the process began, else the resident memory since this was made."""

    def __init__(self, device):
        self.device = device
        if device.type != "cuda":
            with suppress(OSError):  # where it is not allowed, the peak is that of the whole process so far
                Path("/proc/self/clear_refs").write_text("5")

    def read(self):
        """Return the MiB."""
        status = Path("/proc/self/status")
        if self.device.type == "cuda" or not status.exists():
            return peak_memory(self.device)
        return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def matmul_rate(device, dtype):
    """Return the FLOP/s of a large matrix product, on a GPU as precise as convolutions are there: the median of five."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times, before = [], torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    for _ in range(7):
        began = now(device)
        torch.mm(left, right)
        times.append(now(device) - began)
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / median(times[2:])


class Apart:
    """A path in a process of its own, so that neither its memory nor its allocator's habits are another path's.

    `start_seconds`: from the process's start to the end of its first round, imports and all.
    """

    def __init__(self, name, args, case):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, args, case), daemon=True)
        began = time.perf_counter()
        self.process.start()
        theirs.close()
        self.ask("timed_round")
        self.start_seconds = time.perf_counter() - began

    def ask(self, question):
        """Return what the process answers; it asks its path, or times a round of it."""
        self.pipe.send(question)
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit("a path's process has ended: see its error above")

    def close(self):
        """End the process."""
        self.pipe.close()
        self.process.join()


def serve(pipe, name, args, case):
    """Answer an Apart: the seconds and the peak MiB of a timed round, or the path's own facts."""
    world = distributed.World(0, 1, distributed.pick_device(args.gpu_id, 0))
    kinds = {"reference": Reference, "default": Ours, "compile": partial(Ours, compiled=True)}
    path = kinds[name](args, case, synthetic(args, case), world)
    with suppress(EOFError):  # the other end is closed
        while question := pipe.recv():
            if question == "timed_round":
                peak, began = Peak(world.device), now(world.device)
                path.round()
                pipe.send((now(world.device) - began, peak.read()))
            else:
                pipe.send(getattr(path, question)())
