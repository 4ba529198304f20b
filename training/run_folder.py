"""Run folders: their ownership, settings, logs and checkpoints."""

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock

from utils import UserError, read_json, replacing, warn

# Arguments that may differ between a run and its resumption: where and how it runs, how long, and paths, whose files
# may have moved. (That the teacher is the same one is checked by its weights.)
FREE_ARGUMENTS = {
    *("data", "checkpoint_dir", "num_workers", "gpu_id", "resume", "evaluate", "epochs", "save_minutes", "digests"),
    *("dist_url", "dist_backend", "dist_timeout", "world_size", "rank", "multiprocessing_distributed"),
    *("tcheckpoint", "teacher_cache", "pretrained_backbone", "skip_bad_images"),
    *("override", "overrides", "image_set", "tested"),
}
# Those that change a result by rounding alone: they may differ too.
ROUNDING_ARGUMENTS = {"accumulate", "compile", "amp"}
LOCK_PATIENCE = 10  # seconds that a resumed run waits: the data workers of a killed one hold its lock until they notice


def read_log(path: Path) -> list[dict]:
    """Return the epochs of a log.jsonl in order; of repeated ones the later, without a line cut off by a kill."""
    epochs = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            epochs[entry["epoch"]] = entry
    return [epochs[number] for number in sorted(epochs)]


def json_form(value: Any) -> Any:
    """Return `value` as it is once written as JSON and read again: tuples are lists."""
    return json.loads(json.dumps(value))


def differences(old: dict, new: dict, free: set[str]) -> list[str]:
    """Return 'name old -> new' for each setting that shapes the result and differs.

    A flag that did not exist yet is one that is not given: None, False or 0.
    """
    new = json_form(new)
    keys = sorted((old.keys() | new.keys()) - free)
    return [f"{k} {old.get(k)} -> {new.get(k)}" for k in keys if (old.get(k) or None) != (new.get(k) or None)]


def acquired(lock: filelock.BaseFileLock, patience: float) -> bool:
    """Return whether the lock is held after so many seconds; on a file system without locks it counts as held."""
    try:
        lock.acquire(timeout=patience)
    except filelock.Timeout:
        return False
    except (OSError, NotImplementedError):
        warn(f"warning: {lock.lock_file}: its file system has no locks; see to it that no other run writes there")
    return True


class RunFolder:
    """One run's folder: claimed by one process at a time, never overwritten by a run with other settings."""

    def __init__(self, path: str | os.PathLike, arch: str, settings: dict):
        arch = arch.replace("/", "-").replace(":", "-")
        self.path = Path(path)
        self.last = self.path / f"{arch}.pth.tar"
        self.best = self.path / f"{arch}_best.pth.tar"
        self.log = self.path / "log.jsonl"
        self.arguments = self.path / "args.json"
        self.settings, self.before = settings, {}
        self.lock = filelock.FileLock(self.path / ".lock", fallback_to_soft=False)

    def claim(self, resume: bool) -> None:
        """Create or reopen the folder; UserError if it holds another run, or one in progress."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not acquired(self.lock, LOCK_PATIENCE if resume else 0):
            raise UserError(f"{self.path}: another process, or another Trainer of this one, is training in this folder")
        if self.last.exists() or self.best.exists() or read_log(self.log):
            self.check_continued(resume)

    def check_continued(self, resume: bool) -> None:
        """Raise UserError unless the run in the folder is this one, to be resumed from its last checkpoint."""
        if not resume:
            raise UserError(f"{self.path} already holds a run: continue it with --resume or name this one with --tag")
        settings = read_json(self.arguments) or {}
        # Other schedules end with the last epoch, so their number shapes the whole run.
        fixed = {"epochs"} if self.settings.get("schedule") not in (None, "multistep") else set()
        free = (FREE_ARGUMENTS | ROUNDING_ARGUMENTS) - fixed | set(self.settings.get("override") or ())
        changed = differences(settings, self.settings, free)
        if changed:
            listed = ", ".join(changed)
            raise UserError(f"--resume: {self.path} was run with other settings ({listed}): use --tag or --override")
        for change in differences(settings, self.settings, FREE_ARGUMENTS - {"num_workers"}):
            warn(f"--resume: {change}")
        self.before = settings
        # The first one is written after the log: a run killed between them starts over.
        if not self.last.exists() and len(read_log(self.log)) != 1:
            raise UserError(f"--resume: {self.last} is missing: put it back, or start anew with --tag")

    def write_settings(self, epoch: int = 0, opening: dict | None = None) -> None:
        """Write the run's settings, and what was found before its first step: `opening`.

        `overrides` lists the settings that --override changed, each with the epoch, from 1, in which it began to hold.
        """
        new, before = json_form(self.settings), self.before
        changed = [name for name in new.get("override") or () if before and before.get(name) != new[name]]
        overrides = [{"epoch": epoch + 1, "name": name, "from": before.get(name), "to": new[name]} for name in changed]
        kept = {name: before[name] for name in ("tested", "overrides") if name in before}
        if overrides:
            kept["overrides"] = [*kept.get("overrides", []), *overrides]
        content = {**new, **(opening or {}), **kept}
        with replacing(self.arguments, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")


class RunLog:
    """A run's `log.jsonl` (one line an epoch) and TensorBoard events."""

    def __init__(self, folder: RunFolder, epochs_done: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder.log
        kept = [entry for entry in read_log(self.path) if entry["epoch"] <= epochs_done]
        with replacing(self.path, "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in kept)
        threading.excepthook = _tensorboard_is_silent
        self.events = SummaryWriter(str(folder.path), purge_step=epochs_done + 1)

    def write(self, record: dict) -> None:
        """Append one epoch's flat record."""
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for key, value in record.items():
            if isinstance(value, (int, float)) and key != "epoch":
                self.events.add_scalar(key, value, record["epoch"])
        self.events.flush()


def _tensorboard_is_silent(failure: threading.ExceptHookArgs) -> None:
    """Hook of a thread's exception: on a full disk TensorBoard's thread fails, and hands that on to the main thread."""
    if not type(failure.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failure)
