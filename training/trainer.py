"""The training loop of every experiment: train one epoch, fit a run with checkpoints and logs."""

import contextlib
import inspect
import math
import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distributed
import fast
import launcher
import loading
import runs
import utils
from metrics import Totals, evaluate, peak_memory, summary, training_sums
from precision import TYPES, autocast, resolve_precision, type_name
from preemption import Preempted, StopSignal

HEADS_EVERY = 10  # epochs between tests of all auxiliary heads; the backbone is tested every epoch


class Run:
    """One training run: model, objective, optimizer and where they stand. `fit` drives it."""

    def __init__(self, args, world, model, objective, data):
        self.args, self.world, self.data = args, world, data
        self.model = model.to(world.device, memory_format=torch.channels_last)
        self.objective = objective.to(world.device)
        self.folder = runs.RunFolder(args.script, args)
        teacher = self.objective.teacher
        self.teacher_digest = utils.digest(teacher.state_dict()) if isinstance(teacher, torch.nn.Module) else None
        self.epoch, self.step_in_epoch = 0, 0
        self.totals = Totals(world.device)
        self.best, self.last_accuracy = {"acc": -1.0, "test": None, "epoch": 0, "net": None}, None
        # A probe may choose it: what the first rank finds holds for all.
        self.precision = distributed.gather_objects(resolve_precision(args.amp, world.device))[0]
        torch.backends.cudnn.benchmark = True  # nearly every step has the same shapes

    def prepare(self):
        """Wrap the model for several processes and build what trains it, once the starting weights are in place."""
        args, device = self.args, self.world.device
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained,
            lr=args.init_lr,
            momentum=0.9,
            weight_decay=args.weight_decay,
            nesterov=args.nesterov,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        if self.scaler.is_enabled():
            # A fused first step that the scaler skips would leave momentum that nothing has written.
            for parameter in trained:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        if device.type == "cpu":
            fast.keep_memory()
            if self.precision == torch.bfloat16:
                fast.suit_cpu(self.model)
        self.wrapped = self.wrap()
        if isinstance(self.objective.teacher, torch.nn.Module):
            self.objective.teacher = fast.inference_copy(self.objective.teacher, self.data.size, self.precision)
        self.forward = self.forward_eager
        if args.compile:
            usual = math.ceil(args.batch_size / self.world.size / args.accumulate)
            # DistributedDataParallel's hooks split the step into several graphs; CUDA graphs of these would hold their
            # gradients at fixed addresses, which its buckets replace.
            graphs = device.type == "cuda" and self.world.size == 1
            self.forward = fast.CompiledStep(self.forward_eager, usual, device, graphs, self.objective.state.values())

    def wrap(self):
        """Return the model as it is trained: itself in one process, in several one whose gradients are averaged."""
        if self.world.size == 1:
            return self.model
        model, device = self.model, self.world.device
        if self.args.sync_bn:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Training reads no running statistics, and evaluation shares the first process's: no broadcast in each step.
        names = inspect.signature(DistributedDataParallel).parameters
        broadcast = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # its older name
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{broadcast: False},
        )
        if device.type == "cpu":
            wrapped.register_comm_hook(self.world.size, distributed.average_in_rank_order)
        return wrapped

    def forward_eager(self, images, labels, epoch):
        """Return the loss of a batch and its training sums (name -> scalar)."""
        with autocast(images.device, self.precision):
            terms, predictions = self.objective.step(self.wrapped, images, labels, epoch)
        return sum(terms.values()), training_sums(terms, predictions, labels)

    @contextlib.contextmanager
    def single_image_explained(self, count):
        """Turn PyTorch's refusal of a single value a channel, in a batch of `count` images, into a UserError."""
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            problem = f"{self.args.arch} cannot train on a batch of {count} image of this size: its BatchNorm needs more than"
            raise utils.UserError(f"{problem} one value a channel; take another --batch-size") from None

    def step(self, images, labels, epoch):
        """Take one optimizer step on a batch, computed in `--accumulate` parts."""
        parts = min(self.args.accumulate, len(images))
        chunks = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
        if self.args.compile:
            torch.compiler.cudagraph_mark_step_begin()  # the last step's outputs may be overwritten from here on
        for number, (x, y) in enumerate(chunks, 1):
            waiting = self.world.size > 1 and number < len(chunks)
            unsynced = self.wrapped.no_sync() if waiting else contextlib.nullcontext()
            with unsynced, self.single_image_explained(len(x)), fast.compiler_explained():
                loss, sums = self.forward(x, y, epoch)
                self.scaler.scale(loss * (len(x) / len(images))).backward()
            self.totals.add(sums, len(x))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def train_epoch(self, epoch, stop):
        """Train from the step where the run stands to the end of `epoch`; save and raise Preempted when asked to."""
        batches, args = self.data.train, self.args
        self.wrapped.train()
        bar = tqdm(
            total=len(batches),
            initial=self.step_in_epoch,
            desc=f"epoch {epoch + 1}/{args.epochs}",
            disable=not (self.world.is_main and sys.stderr.isatty()),
        )
        with contextlib.closing(batches.epoch(epoch, self.step_in_epoch)) as left:
            for images, labels in left:
                rate = utils.learning_rate(args, epoch, (self.step_in_epoch + 1) / len(batches))
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                with stop.reaches_the_compiler() if args.compile else contextlib.nullcontext():
                    self.step(images, labels, epoch)
                self.step_in_epoch += 1
                bar.update()
                if not bar.disable and self.step_in_epoch % 20 == 0:
                    self.show_progress(bar)
                if stop.agreed(self.world, self.step_in_epoch, len(batches)):
                    self.check_finite(epoch)
                    self.save()
                    raise Preempted
        bar.close()
        self.check_finite(epoch)

    def check_finite(self, epoch):
        """Raise UserError where training has diverged, before anything of that is saved."""
        values = [value.isfinite().all() for value in self.model.state_dict().values() if value.is_floating_point()]
        # The scaler of float16 skips steps that are not finite: there the loss tells.
        if not (math.isfinite(self.totals.means()["loss"]) and torch.stack(values).all()):
            raise utils.UserError(f"training diverged in epoch {epoch + 1}: loss or weights not finite; lower --init-lr")

    def show_progress(self, bar):
        """Put this process's loss and accuracy so far, and the images/s of all, behind the progress bar."""
        means = self.totals.means(over_ranks=False)
        speed = self.args.batch_size * (bar.format_dict["rate"] or 0)
        shown = {"loss": means["loss"], **{k: v for k, v in means.items() if k.endswith("top1")}, "img/s": speed}
        bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})

    def test(self, epoch):
        """Return the flat record of `epoch`'s tests, and note whether it is the best so far."""
        heads = (epoch + 1) % HEADS_EVERY == 0 or epoch + 1 == self.args.epochs
        distributed.share_buffers(self.model)
        record, net = {}, None
        for name, batches in (("val", self.data.val), ("test", self.data.test)):
            if batches is not None:
                means = evaluate(self.model, batches, self.world.device, self.precision, heads, net)
                net = means.get("net")  # held-out images choose between the networks of a pair, too
                record.update({f"{name}/{key}": value for key, value in means.items()})
        chosen_on = "test" if self.data.val is None else "val"
        # Ties go to the later epoch: with a frozen backbone all epochs tie, while the heads keep improving.
        if record[f"{chosen_on}/top1"] >= self.best["acc"]:
            accuracies = {"acc": record[f"{chosen_on}/top1"], "test": record["test/top1"]}
            self.best = {**accuracies, "epoch": epoch + 1, "net": record.get(f"{chosen_on}/net")}
        record.update({"best/top1": self.best["acc"], "best/epoch": self.best["epoch"]})
        if self.best["net"] is not None:
            record["best/net"] = self.best["net"]
        return record

    def save(self, best=False):
        """Write the last checkpoint, and before it the best one where this is it."""
        state = runs.checkpoint_of(self)
        if self.world.is_main:
            if best:
                utils.save_checkpoint(state, self.folder.best)
            utils.save_checkpoint(state, self.folder.last)
        distributed.barrier()


def start(run):
    """Claim the run folder and bring the run to its starting point: fresh, or where its checkpoint stands."""
    args = run.args
    # After a failure torchrun starts the processes again, without --resume.
    here = launcher.name()
    launches, restarts, claimed = zip(
        *distributed.gather_objects((here, launcher.restarts(), run.folder.was_claimed_by(here))), strict=True
    )
    args.resume = args.resume or (any(restarts) and any(claimed))
    if run.world.is_main:
        run.folder.claim(args.resume, launches)
    distributed.barrier()
    if args.resume and run.folder.last.exists():
        runs.restore(run)
        say(run, f"resuming at epoch {run.epoch + 1}, step {run.step_in_epoch}")
    else:
        if args.resume:
            say(run, f"--resume: no checkpoint in {run.folder.path} yet, starting from the beginning")
        run.prepare()
    if len(set(distributed.gather_objects((run.epoch, run.step_in_epoch)))) > 1:
        raise utils.UserError(f"--resume: not every process finds the same {run.folder.last}: they need one --checkpoint-dir")
    if run.world.is_main:
        run.folder.write_settings()


def say(run, text):
    """Print a line from the main process."""
    if run.world.is_main:
        print(text, flush=True)


def fit(args, world, model, objective, data):
    """Train `model` with `objective` on `data` as `args` say, writing the run folder; return the best record.

    With --evaluate, test the folder's best weights instead and return their accuracies.
    Raises UserError for a folder that holds another run. SIGTERM or SIGUSR1 saves at the next step and exits with 143.
    """
    run = Run(args, world, model, objective, data)
    with contextlib.closing(data), contextlib.closing(run.folder):
        return report_best(run) if args.evaluate else train(run)


def train(run):
    """Train from the run's starting point to its last epoch; return the best record."""
    args, world, data = run.args, run.world, run.data
    start(run)
    stop = StopSignal()
    log = runs.RunLog(run.folder, run.epoch) if world.is_main else None
    say(run, f"{run.folder.path}: lr {args.init_lr}, {type_name(run.precision)}, {data.num_classes} classes, "
             f"{data.size} x {data.size} pixels, {len(data.train)} steps an epoch")  # fmt: skip
    try:
        for epoch in range(run.epoch, args.epochs):
            record = one_epoch(run, epoch, stop)
            if log:
                log.write(record)
            run.save(best=run.best["epoch"] == epoch + 1)
            say(run, summary(record, args.epochs))
    except Preempted:
        say(run, f"stopped by a signal at epoch {run.epoch + 1}, step {run.step_in_epoch}: go on with --resume")
        sys.exit(143)
    if run.last_accuracy is not None:
        chosen_on = "the test set" if data.val is None else f"held-out training images, {run.best['acc']:.2f} there"
        at = f"epoch {run.best['epoch']}" + (f" of network {run.best['net']}" if run.best["net"] else "")
        say(run, f"best top-1 {run.best['test']:.2f} at {at} (selected on {chosen_on}), last {run.last_accuracy:.2f}")
    return run.best


def one_epoch(run, epoch, stop):
    """Train and test one epoch and return its flat record."""
    began, seen_before = time.perf_counter(), run.totals.count.item()
    run.train_epoch(epoch, stop)
    images = (run.totals.count.item() - seen_before) * run.world.size  # read here, it waits for the device as well
    seconds = time.perf_counter() - began
    trained = {f"train/{name}": value for name, value in run.totals.means().items()}
    run.save()  # the test may take longer than a launcher or a scheduler waits after a signal
    run.totals, run.step_in_epoch, run.epoch = Totals(run.world.device), 0, epoch + 1
    record = {"epoch": epoch + 1, "lr": run.optimizer.param_groups[0]["lr"], **trained, **run.test(epoch)}
    run.last_accuracy = record["test/top1"]
    # A run resumed after an epoch's last step has trained on nothing in this one.
    record.update({"images_per_second": images / seconds or None, "seconds": time.perf_counter() - began})
    record["peak_memory_mib"] = peak_memory(run.world.device)
    return record


def report_best(run):
    """Test the run folder's best weights with all heads, print and return the accuracies."""
    path = run.folder.best if run.folder.best.exists() else run.folder.last
    if not path.exists():
        raise utils.UserError(f"--evaluate: nothing has been trained in {run.folder.path} yet")
    content = utils.load_weights(run.model, path)
    loading.warn_of_other_data(content, run.data.test, path)
    if run.args.amp == "auto":
        run.precision = TYPES.get(content.get("precision"), run.precision)
    net = (content.get("best") or {}).get("net") if run.args.val_split else None
    means = evaluate(run.model, run.data.test, run.world.device, run.precision, heads=True, net=net)
    listed = (f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in means.items())
    say(run, f"{path}, {type_name(run.precision)}: {', '.join(listed)}")
    return means
