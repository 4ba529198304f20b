"""The scripts' entry: from the command line to `main(args, world)`, in one process or many, and to its exit status."""

import argparse
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from training import distributed, speed
from utils import UserError, World, available_cores, first_line

POLL_EVERY = 10  # steps after which several processes agree on whether to stop
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)]
NOT_WRITABLE = {errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EMFILE}
NOT_WRITABLE |= {errno.ENOSPC, errno.ENOTDIR, errno.EPIPE, errno.EROFS}


def stop_signals() -> list[int]:
    """Return the signals that ask this process to stop, without those that it was started to ignore, as by nohup."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


class Preempted(SystemExit):
    """The run was asked to stop and saved what can be resumed: exit status 143, or 130 after Ctrl-C."""


class StopSignal:
    """Within a `with` block, notes the signals that ask a run to stop, so that training can save before it ends.

    After Ctrl-C the next one raises KeyboardInterrupt: torchrun sends its processes SIGTERM for a second Ctrl-C.
    """

    def __init__(self):
        self.received = self.interrupted = False

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.note) for number in stop_signals()}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _: Any) -> None:
        """Signal handler: remember that a stop was asked for."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.received, self.interrupted = True, number == signal.SIGINT


def restarted() -> bool:
    """Return whether torchrun has started the processes again after one of them failed."""
    return any(map(int, distributed.gather_objects(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))))


def run(parse_args: Callable[[], argparse.Namespace], main: Callable[[argparse.Namespace, World], Any]) -> None:
    """Run `main(args, world)` of a script: parse, start the processes that are asked for, join their group.

    What the user can mend is one line on stderr. Exit status: 2 then, 1 for a lost process, 130 after Ctrl-C, 143 after
    another signal to stop.
    """
    for number in stop_signals():
        if number not in (signal.SIGINT, signal.SIGTERM):  # they end the process as SIGTERM does: nothing to save yet
            signal.signal(number, lambda *_: os._exit(143))
    status = None
    try:
        args = parse_args()
        check_launch(args)
        if getattr(args, "multiprocessing_distributed", False) and "RANK" not in os.environ:
            sys.exit(relaunch(args, sys.argv))
        world = distributed.setup(getattr(args, "gpu_id", None), getattr(args, "dist_backend", None))
        if world.device.type == "cpu":
            speed.keep_memory()
        main(args, world)
    except SystemExit as stop:
        status = stop.code
    except UserError as error:
        fail(error, 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except (MemoryError, RuntimeError, OSError) as error:
        known = explained(error)
        if not known:
            raise
        fail(*known)
    distributed.leave()
    sys.exit(status)


def check_launch(args: argparse.Namespace) -> None:
    """Raise UserError if the flags or the scheduler ask for processes that nothing would connect."""
    if "RANK" in os.environ or "world_size" not in args:
        return
    if args.rank >= args.world_size:
        raise UserError(f"--rank {args.rank}: expected a machine's number below --world-size {args.world_size}")
    if args.multiprocessing_distributed:
        return
    if args.world_size > 1:
        raise UserError("--world-size needs --multiprocessing-distributed")
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))  # set by srun alone: sbatch's --ntasks may count cores
    if tasks > 1:
        raise UserError(f"srun started {tasks} tasks that nothing connects: start one, which runs torchrun")


def relaunch(args: argparse.Namespace, argv: list[str]) -> int:
    """Run the script again under torchrun, one process for each id of --gpu-id, as the published flags ask.

    Returns the exit status: a mistake's or a stop's (2, 130, 143) if one of the processes ended with it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    address = re.fullmatch(r"tcp://([^:/]+):(\d{1,4}|[1-6]\d{4})", args.dist_url)
    if not address:
        raise UserError(f"--dist-url {args.dist_url}: expected tcp://HOST:PORT")
    processes = len(args.gpu_id.split(",")) if args.gpu_id else max(torch.cuda.device_count(), 1)
    where = [f"--nnodes={args.world_size}", f"--node-rank={args.rank}", f"--nproc-per-node={processes}"]
    where += [f"--master-addr={address[1]}", f"--master-port={address[2]}"]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(available_cores() // processes, 1)))
    logging.disable(logging.ERROR)  # torchrun's own: the processes print what went wrong
    if hasattr(signal, "SIGHUP") and signal.SIGHUP not in stop_signals():  # nohup: torchrun would handle it again
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    if hasattr(signal, "SIGUSR1"):  # torchrun hands SIGTERM on to its processes, but not always SIGUSR1
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        torchrun([*where, *argv])
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 143
    except ChildFailedError as error:
        ended = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        killed = [f"process {rank} ended by signal {-status}" for rank, status in ended.items() if status < 0]
        known = [status for status in (2, 130, 143) if status in ended.values()]
        if killed and not known:
            print_failure(", ".join(killed))
        return known[0] if known else 1
    except RuntimeError as error:
        raise UserError(f"--dist-url {args.dist_url}: {first_line(error)}") from None
    return 0


def explained(error: Exception) -> tuple[str, int] | None:
    """Return (line, exit status) for what the machine lacks and for a lost process; None for other errors."""
    text = first_line(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return f"{text}: lower --batch-size, or compute it in parts with --accumulate", 2
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        if error.errno == errno.EPIPE:  # else what is still to be printed fails again when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"{error.filename or 'output'}: {error.strerror}", 2
    if isinstance(error, dist.DistError) or "gloo/" in str(error):
        silent = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        said = "did not answer within --dist-timeout" if silent else "has ended, or cannot be reached"
        return f"another process {said} ({' '.join(str(error).split())[-300:]})", 1  # NCCL's cause is its last line
    return None


def print_failure(text: object) -> None:
    """Print one line on stderr, with the script's name before it."""
    print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(text).splitlines())}", file=sys.stderr, flush=True)


def fail(text: object, status: int) -> NoReturn:
    """Print one line, unless another process has printed its own, and end with `status`."""
    if distributed.first_to_print():
        print_failure(text)
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)  # an orderly end would wait for the other processes
    sys.exit(status)
