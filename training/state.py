"""A Trainer's whole state as a dict, the content of a checkpoint, and its restoration."""

from typing import TYPE_CHECKING, Any

import torch

import utils
from models import state_dicts
from training import distributed, launch
from training.optim import DEFAULTS, load_state
from training.precision import type_name
from training.run_folder import FREE_ARGUMENTS, json_form
from utils import Checkpoint, UserError, print_main

if TYPE_CHECKING:
    from training.trainer import Trainer


def to_cpu(value: Any) -> Any:
    """Return `value` with every tensor in its dicts and lists copied to the CPU."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: to_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_cpu(v) for v in value]
    return value


def default_settings(trainer: "Trainer") -> dict[str, Any]:
    """Return the settings of a Trainer that is made without a command line, which a resumed run must share."""
    names = ("lr", "weight_decay", "momentum", "nesterov", "milestones", "warmup", "seed", "optimizer", "schedule")
    settings = {name: getattr(trainer, name) for name in (*names, "epochs", "ema_decay")}
    by_name = DEFAULTS.get(trainer.optimizer, {}) if isinstance(trainer.optimizer, str) else {}
    settings |= {name: value for name, value in by_name.items() if settings[name] is None}
    objective = trainer.objective
    settings |= {name: getattr(objective, name) for name in ("label_smoothing", *objective.constants())}
    named = {name: getattr(v, "__qualname__", type(v).__name__) if callable(v) else v for name, v in settings.items()}
    return {"method": trainer.objective.name, **json_form(named)}


def shaping(trainer: "Trainer") -> dict[str, Any]:
    """Return what must be equal in all processes: else their results are silently wrong."""
    settings = {name: value for name, value in trainer.settings.items() if name not in FREE_ARGUMENTS}
    data = {"epochs": trainer.epochs, "steps an epoch": len(trainer.train), "images": trainer.info.get("images")}
    data["classes"] = trainer.info.get("class_names")
    data |= {"resume": trainer.resume, "teacher": trainer.teacher_digest, "torch": str(torch.__version__)}
    return {**settings, **data}


def claim(trainer: "Trainer") -> Checkpoint | None:
    """Claim the run folder; return the checkpoint to resume from, if there is one."""
    resumed, run = trainer.resume or launch.restarted(), trainer.run
    if trainer.world.is_main:
        run.claim(resumed)
    distributed.barrier()
    if resumed and run.last.exists():
        return Checkpoint(run.last, key="net")
    if resumed:
        print_main(f"--resume: no checkpoint in {run.path} yet, starting from the beginning")
    return None


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """Return a Trainer's whole state; all processes of a group take part."""
    model = utils.unwrap(trainer.model)
    state = {
        "net": model.state_dict(),
        "acc": trainer.last_top1,
        "epoch": trainer.epoch,
        "optimizer": trainer.step.optimizer.state_dict(),
        "arch": trainer.arch,
        "num_classes": getattr(model, "num_classes", None) or len(trainer.info.get("class_names", ())) or None,
        "rotations": getattr(model, "rotations", None),
        "info": json_form(trainer.info),
        "dataset": trainer.info.get("dataset"),
        "method": trainer.objective.name,
        "args": json_form(trainer.settings),
        "versions": utils.versions(),
        "rng": {"torch": torch.get_rng_state()},
        "order": {"seed": trainer.seed, "epoch": trainer.epoch, "step": trainer.step_in_epoch},
        "seconds": trainer.seconds,
        "objective": trainer.objective.state_dict(),
        "teacher_digest": trainer.teacher_digest,
        "totals": trainer.totals.state_dict() if trainer.step_in_epoch else {},
        "scaler": trainer.step.scaler.state_dict(),
        "precision": type_name(trainer.precision),
        "best": trainer.best,
        "best_by": trainer.objective.best_by(model),
        **(trainer.ema.state_dict() if trainer.ema else {}),
    }
    return to_cpu(state) if trainer.world.is_main else {}


def load(trainer: "Trainer", state: dict[str, Any]) -> None:
    """Copy a state into the Trainer's own tensors; ValueError or KeyError if it does not fit."""
    state_dicts.load(utils.unwrap(trainer.model), state["net"])
    load_state(trainer.step.optimizer, trainer.factory, state["optimizer"])
    if state["scaler"]:  # a run in another precision has none
        trainer.step.scaler.load_state_dict(state["scaler"])
    trainer.objective.load_state_dict(state["objective"])
    if trainer.ema:
        trainer.ema.load_state_dict(state)
    trainer.epoch, trainer.step_in_epoch = state["order"]["epoch"], state["order"]["step"]
    before, now = (settings.get("batch_size") for settings in (state["args"], trainer.settings))
    if before and now:  # --override batch_size=N: the images seen so far are those of another number of steps
        trainer.step_in_epoch = trainer.step_in_epoch * before // now
    trainer.seconds = state.get("seconds", 0.0)
    trainer.totals.load_state_dict(state["totals"], trainer.world.is_main)
    trainer.best, trainer.last_top1 = {name: state["best"][name] for name in trainer.best}, state["acc"]
    torch.set_rng_state(state["rng"]["torch"])


def resume(trainer: "Trainer", saved: Checkpoint) -> None:
    """Restore a run from its last checkpoint; UserError if that is another run's."""
    folder = trainer.run.path
    now, then = json_form(trainer.info), saved.info  # which may be older than what is recorded now
    if {name: now.get(name) for name in then} != then:
        raise UserError(f"--resume: the run in {folder} has other training images: use --tag")
    if saved.content.get("teacher_digest") != trainer.teacher_digest:
        raise UserError(f"--resume: the run in {folder} has a teacher of other weights: use --tag")
    try:
        load(trainer, saved.content)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = utils.first_line(error)
        raise UserError(f"{saved.path}: no checkpoint of this run to resume from ({reason})") from None
    begun = trainer.epoch + (trainer.step_in_epoch > 0)
    if begun > trainer.epochs:
        raise UserError(f"--epochs {trainer.epochs}: the run in {folder} is in epoch {begun} already")
    print_main(f"resuming at epoch {trainer.epoch + 1}, step {trainer.step_in_epoch}")
