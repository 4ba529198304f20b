"""The one training loop: epochs, tests, the choice of the best, saves and resumption."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import nn

import utils
from methods import Batch, Objective
from training import distributed, launch, speed, start, state, teacher_cache
from training.ema import Average
from training.metrics import Totals, best_line, evaluate, is_finite, peak_memory, summary
from training.optim import Factory, optimizer_factory, rate_factor, set_rate
from training.precision import resolve_precision, type_name
from training.progress import Progress
from training.run_folder import RunFolder, RunLog
from training.step import TrainingStep
from utils import UserError, World, print_main

HEADS_EVERY = 10  # epochs between tests of all auxiliary heads; the backbone is tested every epoch


@dataclass(eq=False)
class Trainer:
    """Trains `model` by `objective`: complete once made, and `fit` runs it.

    Images are (B, 3, H, W) float32, labels and indices (B,) int64. The batches of `imagesets` can be entered at any
    step, so a run on them resumes inside an epoch; on a plain DataLoader it resumes at its last finished epoch.
    Settings of an optimizer or a schedule by name are refused with a callable (ValueError); None: the value in
    optim.DEFAULTS. UserError for a folder that holds another run.
    """

    model: nn.Module
    objective: Objective
    _: KW_ONLY
    train: Iterable  # with a length: (images, labels) or (images, labels, index)
    test: Iterable  # (images, labels)
    epochs: int
    val: Iterable | None = None  # chooses the best epoch in place of `test`
    optimizer: str | Factory = "sgd"  # "sgd", "adamw", or a callable of the parameters
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    schedule: str | Callable[[float], float] = "multistep"  # "multistep", "cosine", or a callable of progress 0 to 1
    milestones: Iterable[int] = ()  # epochs after the warm-up at which the rate is x0.1
    warmup: int = 0  # epochs
    seed: int = 0
    amp: str = "auto"  # precision: auto, off, bf16, fp16
    ema_decay: float | None = None  # share of the old value in a moving average of the weights; None: no average
    accumulate: int = 1  # parts that a batch is computed in
    compile: bool = False
    sync_bn: bool = False
    folder: str | os.PathLike | None = None  # for checkpoints and logs; None writes nothing
    resume: bool = False
    evaluate: bool = False  # `fit` tests the folder's best weights instead of training
    save_minutes: float = 15  # between saves inside an epoch
    dist_timeout: float = 10  # minutes that a process waits for the others, once training has begun
    settings: dict = field(default_factory=dict)  # what the run folder stores, and compares when a run is resumed
    teacher_cache: str | os.PathLike | None = None  # folder of stored teacher's outputs; needs batches of fixed views
    cache_dtype: str = "exact"  # of stored outputs: that in which the teacher computes them, or float16
    info: dict = field(default_factory=dict)  # what a checkpoint says of its data: class names, size, mean, std
    world: World | None = None

    def __post_init__(self):
        self.world = self.world or distributed.setup()
        self.objective = self.objective.fresh()  # the state of this run is its own
        self.milestones = tuple(self.milestones)
        if callable(self.schedule) and (self.milestones or self.warmup):
            raise ValueError("milestones and warmup belong to schedules by name; a callable sets its own")
        if self.objective.whole_batches and self.accumulate > 1:
            raise UserError(f"--accumulate has no part in {self.objective.name}, whose terms are of whole batches")
        given = {name: getattr(self, name) for name in ("lr", "weight_decay", "momentum", "nesterov")}
        self.factory = optimizer_factory(self.optimizer, **given)
        self.settings = self.settings or state.default_settings(self)
        model = utils.unwrap(self.model)
        self.arch = getattr(model, "arch", type(model).__name__)
        self.run = RunFolder(self.folder, self.arch, self.settings) if self.folder else None
        self.epoch, self.step_in_epoch, self.seconds, self.last_top1 = 0, 0, 0.0, None  # seconds of an epoch cut short
        self.resumable = callable(getattr(self.train, "epoch", None))  # at any step of an epoch
        self.best = {"epoch": 0, "value": -1.0, "top1": None, "net": None}
        self.totals = Totals(self.world.device)
        teacher = self.objective.teacher
        self.teacher_digest = utils.digest(teacher.state_dict()) if isinstance(teacher, nn.Module) else None
        distributed.check_same(state.shaping(self), self.world)
        try:
            self.begin()
        except BaseException:  # else a corrected call in a notebook would find the folder in use
            if self.run:
                self.run.lock.release()
            raise

    def begin(self) -> None:
        """Claim the run folder, build what trains the networks, and resume or test what the run starts from."""
        saved = state.claim(self) if self.run and not self.evaluate else None
        recorded = saved and saved.content.get("precision")  # of the run that is resumed
        self.precision = resolve_precision(self.amp, self.world.device, recorded)
        self.build()
        if saved:
            state.resume(self, saved)
        distributed.check_same({"epoch": self.epoch, "step": self.step_in_epoch}, self.world)  # one folder for all
        self.cache = teacher_cache.find(self) if self.teacher_cache and not self.evaluate else None
        opening = start.opening(self, test=not (saved or self.evaluate))
        if self.run and not self.evaluate and self.world.is_main:
            self.run.write_settings(self.epoch, opening)
        if self.cache:
            teacher_cache.prepare(self.cache, self)

    def build(self) -> None:
        """Move the networks to the device, and build what trains them."""
        device, objective = self.world.device, self.objective
        # On CPUs, channels-last BatchNorm sums with a larger error: `amp="off"` takes the contiguous format.
        exact = device.type == "cpu" and self.amp == "off"
        networks = [part for part in (self.model, objective.teacher) if isinstance(part, nn.Module)]
        layout = speed.common_layout(networks, self.test)
        self.layout = torch.contiguous_format if exact else layout
        self.model.to(device, memory_format=self.layout)
        objective.to(device)
        objective.adapt(self.model)
        if type(objective).prepare is not Objective.prepare:
            self.model.eval()  # a look at its features leaves BatchNorm's statistics as they are
            count = getattr(self.train, "num_images", 0) or len(getattr(self.train, "dataset", ()))
            images = next(iter(self.train))[0][:2].to(device, memory_format=self.layout)
            try:
                objective.prepare(self.model, images, count)
            except ValueError as error:  # networks that it cannot teach
                raise UserError(f"{objective.name}: {error}") from None
            objective.to(device)
        self.step = TrainingStep(self)
        self.ema = Average(self.model, self.step.optimizer, self.ema_decay) if self.ema_decay is not None else None
        torch.backends.cudnn.benchmark = True  # nearly every step has the same shapes

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, which is what a checkpoint holds; all processes of a group take part."""
        return state.state_of(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Copy a state into this Trainer's own tensors; ValueError or KeyError if it does not fit."""
        state.load(self, saved)

    def fit(self) -> dict[str, Any]:
        """Train to the last epoch; return the best epoch's record: `epoch`, `top1`, `value` of what chose it, `net`.

        With `evaluate`, return the best weights' accuracies. With a folder, SIGTERM, SIGUSR1, SIGHUP or Ctrl-C saves,
        if resumable, and raises launch.Preempted.
        """
        with contextlib.ExitStack() as stack:
            if self.run:
                stack.callback(self.run.lock.release)  # another run of this process may open the folder
            if self.evaluate:
                return start.test_best(self)
            distributed.set_timeout(self.dist_timeout)
            stop = stack.enter_context(launch.StopSignal()) if self.run else None
            log = RunLog(self.run, self.epoch) if self.run and self.world.is_main else None
            name = f"{self.run.path}: " if self.run else ""
            rate = self.step.optimizer.param_groups[0]["lr"]
            print_main(f"{name}lr {rate:g}, {type_name(self.precision)}, {len(self.train)} steps an epoch")
            for epoch in range(self.epoch, self.epochs):
                record = self.one_epoch(epoch, stop)
                if log:
                    log.write(record)
                if self.run:
                    self.save(best=self.best["epoch"] == epoch + 1)
                print_main(summary(record, self.epochs))
        if self.last_top1 is not None:
            last = self.ema.top1 if self.ema else self.last_top1
            print_main(best_line(self.best, self.objective.best_by(self.model), self.val is not None, last))
        return self.best

    def one_epoch(self, epoch: int, stop: launch.StopSignal | None) -> dict[str, Any]:
        """Train and test one epoch and return its flat record."""
        if not self.resumable:  # an epoch cut short, as by Ctrl-C in a notebook, begins anew
            self.totals, self.step_in_epoch, self.seconds = Totals(self.world.device), 0, 0.0
        began, seen_before = time.perf_counter(), self.totals.count.item()
        self.began = began - self.seconds
        self.train_epoch(epoch, stop)
        images = (self.totals.count.item() - seen_before) * self.world.size  # this waits for the device as well
        seconds = time.perf_counter() - began
        trained = {f"train/{name}": value for name, value in self.totals.means().items()}
        self.totals, self.step_in_epoch, self.seconds, self.epoch = Totals(self.world.device), 0, 0.0, epoch + 1
        rate = self.step.optimizer.param_groups[0]["lr"]
        record = {"epoch": epoch + 1, "lr": rate, **trained, **self.test_epoch(epoch)}
        # A run resumed after an epoch's last step has trained on nothing in this one.
        record.update({"images_per_second": images / seconds or None, "seconds": time.perf_counter() - self.began})
        record["peak_memory_mib"] = peak_memory(self.world.device)
        return record

    def train_epoch(self, epoch: int, stop: launch.StopSignal | None) -> None:
        """Train from the step where the run stands to the end of `epoch`; save and raise Preempted when asked to."""
        if self.step_in_epoch == 0:  # of networks with dropout, and of a DataLoader's order
            torch.manual_seed((self.seed + epoch * 0x9E3779B97F4A7C15) % 2**63)
        self.step.optimizer.zero_grad(set_to_none=True)  # those of a step that was interrupted
        title, steps = f"epoch {epoch + 1}/{self.epochs}", len(self.train)
        self.saved_at = time.monotonic()
        self.step.wrapped.train()
        progress = Progress(title, self.step_in_epoch, steps, self.world.is_main, self.totals.shown)
        with contextlib.closing(progress), contextlib.closing(self.batches(epoch)) as batches:
            for batch in batches:
                factor = rate_factor(
                    self.schedule, epoch, self.step_in_epoch, steps, self.epochs, self.milestones, self.warmup
                )
                set_rate(self.step.optimizer, factor)
                self.step(batch, self.totals)
                self.step_in_epoch += 1
                progress.update()
                if self.run:
                    self.save_if_due(epoch, stop)
        self.check_finite(epoch)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of `epoch` that are left, as an objective takes them."""
        sampler = getattr(self.train, "sampler", None)
        if hasattr(sampler, "set_epoch"):  # DistributedSampler
            sampler.set_epoch(epoch)
        left = self.train.epoch(epoch, self.step_in_epoch) if self.resumable else iter(self.train)
        for item in left:
            index = item[2] if len(item) > 2 else None
            if index is None and self.objective.needs_index:
                raise UserError(f"{self.objective.name} needs the images' numbers: (images, labels, index)")
            taught = self.cache.rows(index, item[3]) if self.cache else None
            yield Batch(item[0], item[1], epoch, index, taught)

    def save_if_due(self, epoch: int, stop: launch.StopSignal) -> None:
        """Save inside the epoch if a signal asks for it, then raise Preempted, or if the last save is long ago."""
        last = self.step_in_epoch == len(self.train)
        if self.world.size > 1 and self.step_in_epoch % launch.POLL_EVERY and not last:
            return
        late = time.monotonic() - self.saved_at > 60 * self.save_minutes and self.resumable and not last
        stopped = distributed.any_over_ranks(stop.received, self.world)
        late = distributed.any_over_ranks(late and self.world.is_main, self.world)
        if not (stopped or late):
            return
        self.check_finite(epoch)
        self.seconds = time.perf_counter() - self.began
        if self.resumable:
            self.save()
            self.saved_at = time.monotonic()
        if stopped:
            step = self.step_in_epoch if self.resumable else 0
            print_main(f"stopped by a signal; --resume continues at epoch {epoch + 1}, step {step}")
            raise launch.Preempted(130 if stop.interrupted else 143)

    def check_finite(self, epoch: int) -> None:
        """Raise UserError if training has diverged, before anything of that is saved."""
        if not is_finite(self.model, self.totals):
            advice = "lower --init-lr, or --resume --override init_lr=RATE"
            raise UserError(f"training diverged in epoch {epoch + 1}: {advice}")

    def tests(self, model: nn.Module, heads: bool = False) -> dict[str, dict[str, float]]:
        """Return what `evaluate` finds on the images that are held out, `val`, if there are any, and on `test`."""
        distributed.share_buffers(model)
        found, net = {}, None
        for name, batches in (("val", self.val), ("test", self.test)):
            if batches is not None:
                found[name] = evaluate(model, batches, self.world.device, self.precision, heads, net)
                net = found[name].get("net")  # held-out images choose between the networks of a pair, too
        return found

    def test_epoch(self, epoch: int) -> dict[str, Any]:
        """Return the flat record of an epoch's tests, and note whether it is the best so far: the first of equals.

        Tests the averaged weights if there are any; `raw_top1` is then the accuracy of the weights themselves.
        """
        rule = self.objective.best_by(self.model)
        heads = rule == "joint" or (epoch + 1) % HEADS_EVERY == 0 or epoch + 1 == self.epochs
        record = {}
        for name, means in self.tests(self.ema.model if self.ema else self.model, heads).items():
            joint = [value for key, value in means.items() if key.endswith("_joint")]
            record.update({f"{name}/{key}": value for key, value in means.items()})
            record.update({f"{name}/joint": max(joint)} if joint else {})
        self.last_top1 = record["test/top1"]
        if self.ema:
            self.ema.top1 = self.last_top1
            self.last_top1 = record["test/raw_top1"] = self.tests(self.model)["test"]["top1"]
        chosen_on = "test" if self.val is None else "val"
        value = round(record[f"{chosen_on}/{rule}"], 2)  # as the released codes compare them
        if value > self.best["value"]:
            self.best = {"epoch": epoch + 1, "value": value, "top1": record["test/top1"], "net": record.get("test/net")}
        record.update({"best/top1": self.best["top1"], "best/epoch": self.best["epoch"]})
        if self.best["net"] is not None:
            record["best/net"] = self.best["net"]
        return record

    def save(self, best: bool = False) -> None:
        """Write the last checkpoint, and before it the best one if this is it."""
        content = self.state_dict()
        if self.world.is_main:
            if best:
                utils.save_checkpoint(content, self.run.best)
            utils.save_checkpoint(content, self.run.last)
        distributed.barrier()
