"""One process or many, by PyTorch's own launcher: the world of a run, its collectives and its entry point."""

import contextlib
import errno
import gc
import os
import signal
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import launcher  # isort: skip - before what takes seconds to import: it notes the parent, which may be killed meanwhile

import torch
import torch.distributed as dist

import torchrun
from utils import UserError, first_line, is_first_process, warn

TIMEOUT = timedelta(minutes=30)  # of a collective, such as the others' wait for the first one's download
GRACE = 5  # seconds a process leaves the launcher to end it, before it tells what another has told already


class World(NamedTuple):
    """This process's place in the run: `rank` of `size` processes, computing on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        """Whether this process writes files and prints."""
        return self.rank == 0


def pick_device(gpu_id, local_rank):
    """Return the device of a local rank; raise UserError for a GPU that is not there."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ids = [int(i) for i in gpu_id.split(",")] if gpu_id else list(range(torch.cuda.device_count()))
    missing = [i for i in ids if i >= torch.cuda.device_count()]
    if missing:
        raise UserError(f"--gpu-id {gpu_id}: no GPU {missing[0]} here, GPUs 0 to {torch.cuda.device_count() - 1} are")
    if local_rank >= len(ids):
        raise UserError(f"process {local_rank} of this machine has no GPU left in --gpu-id {gpu_id}")
    device = torch.device("cuda", ids[local_rank])
    torch.cuda.set_device(device)
    return device


def setup(args):
    """Join the process group that the environment describes (torchrun's variables) and return the World."""
    check_environment(args)
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")) if "RANK" in os.environ else (0, 1)
    device = pick_device(args.gpu_id, int(os.environ.get("LOCAL_RANK", 0)))
    world = World(rank, size, device)
    if world.is_main and device.type == "cpu":
        warn("no GPU found: running on the CPU")
    elif world.is_main and torchrun.gpu_count(args.gpu_id) > size:
        raise UserError(f"--gpu-id {args.gpu_id}: one process uses one GPU; several train with --multiprocessing-distributed")
    if getattr(args, "sync_bn", False):
        if size == 1:
            warn("--sync-bn has no effect in a single process")
        elif device.type == "cpu":
            raise UserError("--sync-bn needs GPUs: PyTorch has no such BatchNorm on the CPU")
    if launcher.is_torchrun():
        launcher.end_with_parent(signal.SIGTERM, launcher.PARENT)
    if "RANK" in os.environ and not dist.is_initialized():
        chosen = backend(getattr(args, "dist_backend", None), world)
        join(chosen, device if chosen == "nccl" else None)
    return world


def check_environment(args):
    """Raise UserError where flags or environment describe only part of a process group."""
    if "RANK" not in os.environ:
        if getattr(args, "world_size", 1) > 1 or getattr(args, "rank", 0):
            raise UserError("--world-size and --rank need --multiprocessing-distributed")
        return
    environment = {"LOCAL_RANK": "0", **os.environ}
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    texts = [environment.get(name, "") for name in names]
    rank, size, local_rank, port = (int(text) if text.isdecimal() else -1 for text in texts)
    possible = (rank >= 0, size > rank, local_rank >= 0, 0 < port < 2**16, environment.get("MASTER_ADDR"))
    for name, fits in zip((*names, "MASTER_ADDR"), possible, strict=True):
        if not fits:
            value = environment.get(name, "")
            raise UserError(f"RANK is set, so this is one process of several, but {name} is {value!r}: start it by torchrun")


def join(chosen, device):
    """Join the process group; where torchrun may restart it, under keys that the dead processes have not written."""
    # Imported before there is a group: its functions' default arguments would keep the group alive after `leave`.
    from torch.distributed import nn  # noqa: F401

    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environment.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        dist.init_process_group(chosen, timeout=TIMEOUT, device_id=device)
        return
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    # Each machine counts the restarts that its own processes caused: of several, every rank counts its starts.
    one_machine = environment["LOCAL_WORLD_SIZE"] == environment["WORLD_SIZE"]
    start = launcher.restarts() if one_machine else store.add(f"starts of {rank}", 1)
    store = dist.PrefixStore(f"start {start}", store)
    dist.init_process_group(chosen, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device)


def backend(asked, world):
    """Return the collectives' backend: the one asked for where the device can have it, else what suits the device."""
    if world.device.type == "cuda":
        return asked or "nccl"
    if asked == "nccl" and world.is_main:
        warn("--dist-backend nccl needs GPUs: using gloo")
    return "gloo"


def run(parse_args, main):
    """Run `main(args, world)` of a script: parse, launch, join, and turn a user's mistake into one line and status 2."""
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(143))  # nothing to save yet: as SIGTERM ends it
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # as of `train_x.py >&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - to the end of the process
    sys.stdout.reconfigure(errors="backslashreplace")  # folder names need not be text
    status = None
    try:
        args = parse_args()
        if getattr(args, "multiprocessing_distributed", False) and "RANK" not in os.environ:
            sys.exit(torchrun.relaunch(args, sys.argv))
        world = setup(args)
        main(args, world)
    except SystemExit as stop:  # preempted, or a launcher's status
        status = stop.code
    except UserError as error:
        fail(error, 2)
    except KeyboardInterrupt:  # a terminal interrupts all processes
        if not is_first_process():
            os._exit(130)
        fail("interrupted", 130)
    except (MemoryError, RuntimeError, OSError) as error:
        fault = machines_fault(error)
        if not fault and lost_peer(error):
            fail("another process of this run has ended", 1, wait=True)
        if not fault:
            raise
        fail(*fault)
    leave()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # all is done: what a scheduler asks for now must not kill
        signal.signal(number, signal.SIG_IGN)
    if status is not None:
        sys.exit(status)


def leave():
    """Leave the process group, and end its threads: one that outlived the interpreter would abort the process.

    They end once nothing refers to the group, so call it where the model that was trained is no longer in use.
    """
    if dist.is_initialized():
        gc.collect()  # the model's wrapper holds the group, and is part of a cycle of references
        dist.destroy_process_group()


def machines_fault(error):
    """Return (line, exit status) for an error that tells what the machine lacks; None for others."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return f"{first_line(error)}: lower --batch-size, or compute it in parts with --accumulate", 2
    if "DataLoader worker (pid" in str(error):  # without the number, it is what a worker has raised
        return f"a process that reads images has ended ({first_line(error)}): with fewer --num-workers they take less memory", 1
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return f"{error.strerror}: fewer --num-workers need fewer", 2
    if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):
        with contextlib.suppress(OSError):  # else what is still to be printed fails once more, when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"cannot write: {error.strerror}", 2
    return None


def lost_peer(error):
    """Return whether a collective failed because another process is gone."""
    words = ("Connection closed", "Connection reset", "Broken pipe", "ncclRemoteError", "communicator was aborted")
    return dist.is_initialized() and any(word in str(error) for word in words)


def fail(text, status, wait=False):
    """Print one line and end with `status`.

    Most mistakes are seen by all processes: the first tells it, the others wait for the launcher to end them.
    """
    if wait or not is_first_process():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE)
    if not (wait and launcher.is_torchrun()):  # it tells which process ended
        warn(f"{os.path.basename(sys.argv[0])}: error: {text}")
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(status)  # an orderly end would wait for the other processes
    sys.exit(status)


def share_buffers(model):
    """Give every rank the first one's buffers (BatchNorm statistics), which is what a checkpoint holds."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def sum_over_ranks(tensor):
    """Return `tensor` summed over all processes (the tensor itself where there is one process)."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather_rows(tensor):
    """Return the rows of all processes' `tensor`, of one shape in each, joined in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:  # CUDA graphs of one process need no collective in them
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def average_in_rank_order(size, bucket):
    """Return a future of a DistributedDataParallel bucket's gradients averaged over `size` ranks, added in their order.

    gloo's own order of summation depends on a value's place in its bucket, and the buckets change after a process's first
    step: with three ranks or more a resumed run would not match the uninterrupted one to the bit.
    """
    parts = [torch.empty_like(bucket.buffer()) for _ in range(size)]
    gathered = dist.all_gather(parts, bucket.buffer(), async_op=True)

    def average(_):
        first, *others = parts
        for part in others:
            first += part
        return first.div_(size)

    return gathered.get_future().then(average)


def count_over_ranks(count, world):
    """Return the sum over all processes of a whole number or truth value."""
    return int(sum_over_ranks(torch.tensor(int(count), device=world.device)))


def gather_objects(value):
    """Return the list of every rank's picklable `value`, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_alone(world):
    """Run the block in the first process, and in the others only when it is through there."""
    if not world.is_main:
        barrier()
    yield
    if world.is_main:
        barrier()


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
