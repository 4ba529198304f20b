"""Run folders: their names, whose they are, their logs and checkpoints."""

import fcntl
import json
import os
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import utils
from objective import unwrap
from precision import TYPES, type_name

# Arguments that may differ between a run and its resumption: where and how it runs, how long, and paths, whose files may
# have moved. (That the teacher is the same one is checked by its weights, see `utils.digest`.)
FREE_ARGUMENTS = {
    "data", "checkpoint_dir", "num_workers", "gpu_id", "resume", "evaluate", "epochs", "dist_url", "dist_backend",
    "world_size", "rank", "multiprocessing_distributed", "decode", "tcheckpoint", "pretrained_backbone", "skip_bad_images",
}  # fmt: skip

LOCK_PATIENCE = 10  # seconds that --resume waits for a killed run to let go of its folder


def run_name(script, args):
    """Return a run's folder name, as the published commands spell it (`_imagenet` is said by the data set's name)."""
    parts = [script]
    for key in ("tarch", "arch"):
        if getattr(args, key, None):
            parts += [key, getattr(args, key).replace("_imagenet", "")]
    parts += ["dataset", args.dataset]
    if getattr(args, "few_ratio", None):
        parts += ["few_ratio", f"{args.few_ratio:g}"]
    return "_".join(parts) + f"_seed{args.manual_seed}" + (f"_{args.tag}" if args.tag else "")


def differences(old, new):
    """Return 'name old -> new' for each setting that shapes the result and differs.

    A flag that did not exist yet is one that is not given: None, False or 0.
    """
    new = json.loads(json.dumps(new))
    keys = sorted((old.keys() | new.keys()) - FREE_ARGUMENTS)
    return [f"{k} {old.get(k)} -> {new.get(k)}" for k in keys if (old.get(k) or None) != (new.get(k) or None)]


class RunFolder:
    """One run's folder: claimed by one process at a time, never overwritten by a run with other settings."""

    def __init__(self, script, args):
        self.path = Path(args.checkpoint_dir) / run_name(script, args)
        self.last = self.path / f"{args.arch}.pth.tar"
        self.best = self.path / f"{args.arch}_best.pth.tar"
        self.log = self.path / "log.jsonl"
        self.arguments = self.path / "args.json"
        self.settings = {"script": script, **vars(args)}
        self.lock = None

    def was_claimed_by(self, launch):
        """Return whether the launch of this name was among the last to claim the folder."""
        with suppress(OSError):
            return launch in (self.path / ".lock").read_text(errors="replace").splitlines()
        return False

    def claim(self, resume, launches=()):
        """Create or reopen the folder for `launches`, their names; UserError where it holds another run or one in progress."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "a")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise utils.UserError(f"cannot write the run folder {self.path}: {error.strerror}") from None
        # The data workers of a killed run hold its lock until they notice, some seconds later.
        patience = time.monotonic() + (LOCK_PATIENCE if resume else 0)
        while not self.locked():
            if time.monotonic() > patience:
                raise utils.UserError(f"{self.path}: another process is training in this folder")
            time.sleep(0.5)
        if self.last.exists() or self.best.exists() or read_log(self.log):
            self.check_continued(resume)
        self.lock.truncate(0)
        self.lock.write("\n".join(sorted(set(launches))))
        self.lock.flush()

    def check_continued(self, resume):
        """Raise UserError unless the run in the folder is this one, to be resumed from its last checkpoint."""
        if not resume:
            raise utils.UserError(f"{self.path} already holds a run: continue it with --resume or name this one with --tag")
        self.check_settings(self.written_settings())
        if not self.last.exists():  # it is written before the best one and the log
            raise utils.UserError(f"--resume: {self.last} is missing: put it back, or {self.recovery()}")

    def recovery(self):
        """Return what to do without a last checkpoint that can be read."""
        if self.best.exists():
            return f"copy {self.best.name} over it to go on from the best epoch, or start anew with --tag"
        return "start anew with --tag"

    def close(self):
        """Let go of the folder, so that this process too can open it again."""
        if self.lock:
            self.lock.close()

    def locked(self):
        """Try to lock the folder for this process; return whether it is."""
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def written_settings(self):
        """Return the settings of the run in the folder; UserError where they cannot be read."""
        with suppress(OSError, ValueError, RecursionError):
            settings = json.loads(self.arguments.read_text())
            if isinstance(settings, dict):
                return settings
        raise utils.UserError(f"--resume: {self.arguments} is missing or unreadable: put it back, or use --tag")

    def check_settings(self, old):
        """Raise UserError where `old`, an earlier run's settings, are not this run's."""
        changed = differences(old, self.settings)
        if changed:
            raise utils.UserError(f"--resume: {self.path} was run with other settings ({', '.join(changed)}): use --tag")

    def write_settings(self):
        """Write the run's settings."""
        with utils.replacing(self.arguments, "w") as file:
            file.write(json.dumps(self.settings, indent=1) + "\n")


def read_log(path):
    """Return the epochs of a log.jsonl in order, the later line where one was repeated, without lines cut off by a kill."""
    epochs = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            entry = json.loads(line)
            if type(entry["epoch"]) is int:
                epochs[entry["epoch"]] = entry
    return [epochs[number] for number in sorted(epochs)]


def leave_to_the_main_thread(failure):
    """Hook of a thread's exception: TensorBoard's threads hand what fails on to the main thread, which tells it."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)


class RunLog:
    """A run's `log.jsonl` (one line an epoch) and TensorBoard events."""

    def __init__(self, folder, epochs_done=0):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder.log
        kept = [entry for entry in read_log(self.path) if entry["epoch"] <= epochs_done]
        if len(kept) < epochs_done:
            missing = epochs_done - len(kept)
            utils.warn(f"warning: {self.path}: {missing} of the {epochs_done} epochs trained so far are missing")
        with utils.replacing(self.path, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in kept)
        threading.excepthook = leave_to_the_main_thread
        try:
            self.events = SummaryWriter(str(folder.path), purge_step=epochs_done + 1)
        except OSError as error:
            raise utils.UserError(f"cannot write TensorBoard's events in {folder.path}: {error.strerror}") from None

    def write(self, record):
        """Append one epoch's flat record; a number that is not finite becomes null, which every JSON reader knows."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(utils.json_ready(record)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "epoch":
                    self.events.add_scalar(key, value, record["epoch"])
            self.events.flush()
        except OSError as error:
            raise utils.UserError(f"cannot write {self.path}: {error.strerror}") from None


def checkpoint_of(run):
    """Return everything that the checkpoint of an engine.Run holds, in the first process; the others take part."""
    totals = run.totals.state_dict() if run.step_in_epoch else {}
    if not run.world.is_main:
        return None
    model = unwrap(run.model)
    return utils.to_cpu(
        {
            "net": model.state_dict(),
            "acc": run.last_accuracy,
            "epoch": run.epoch,
            "optimizer": run.optimizer.state_dict(),
            "arch": run.args.arch,
            "num_classes": run.data.num_classes,
            "size": run.data.size,
            "data": run.data.about,
            "rotations": getattr(model, "rotations", None),
            "dataset": run.args.dataset,
            "method": getattr(run.args, "method", None),
            "args": json.loads(json.dumps(vars(run.args))),
            "versions": utils.versions(),
            "rng": {"torch": torch.get_rng_state()},
            "order": {"seed": run.args.manual_seed, "epoch": run.epoch, "step": run.step_in_epoch},
            "objective": run.objective.state_dict(),
            "teacher_digest": run.teacher_digest,
            "totals": totals,
            "scaler": run.scaler.state_dict(),
            "precision": type_name(run.precision),
            "best": run.best,
        }
    )


@contextmanager
def foreign_checkpoint_explained(path):
    """Turn what fails in reading the content of a checkpoint that another program wrote into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError) as error:
        reason = utils.first_line(error)
        raise utils.UserError(f"{path}: no checkpoint of this project to resume from ({reason})") from None


def check_same_run(run, content):
    """Raise UserError where a checkpoint's dict is another run's: of other settings, training images or teacher."""
    if isinstance(content.get("args"), dict):
        run.folder.check_settings(content["args"])
    if content.get("data", run.data.about) != run.data.about:
        both = f"{content['data']}, here {run.data.about}"
        raise utils.UserError(f"--resume: the run in {run.folder.path} has other training images: {both}")
    if content.get("teacher_digest") != run.teacher_digest:
        raise utils.UserError(f"--resume: the run in {run.folder.path} has a teacher of other weights: use --tag")


def whole(value, most):
    """Return `value`; ValueError unless it is a whole number from 0 to `most`."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value} is no whole number from 0 to {most}")
    return value


def restore(run):
    """Bring an engine.Run to where its folder's last checkpoint stands; UserError where that is another run's."""
    try:
        content = utils.load_weights(run.model, run.folder.last)
    except utils.UserError as error:
        raise utils.UserError(f"--resume: {error}; {run.folder.recovery()}") from None
    with foreign_checkpoint_explained(run.folder.last):
        check_same_run(run, content)
        run.precision = TYPES[content["precision"]]
    run.prepare()
    with foreign_checkpoint_explained(run.folder.last):
        run.optimizer.load_state_dict(content["optimizer"])
        if any(state["momentum_buffer"].shape != parameter.shape for parameter, state in run.optimizer.state.items()):
            raise ValueError("momentum of another shape")  # a fused step would read beyond it
        run.scaler.load_state_dict(content["scaler"])
        run.objective.load_state_dict(content["objective"])
        run.epoch = whole(content["order"]["epoch"], sys.maxsize)
        run.step_in_epoch = whole(content["order"]["step"], len(run.data.train))
        run.totals.load_state_dict(content["totals"], run.world.is_main)
        run.best, run.last_accuracy = {name: content["best"][name] for name in run.best}, content["acc"]
        torch.set_rng_state(content["rng"]["torch"])
    done = run.epoch + (run.step_in_epoch > 0)
    if done > run.args.epochs:
        raise utils.UserError(f"--epochs {run.args.epochs}: the run in {run.folder.path} is in epoch {done} already")
