"""The process group: how a process joins it, the collectives of a run, and the check that all ranks train alike."""

import contextlib
import gc
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from utils import UserError, World, warn

START_TIMEOUT = timedelta(minutes=60)  # until training begins: the first process may download and unpack meanwhile


def setup(gpu_id: str | None = None, backend: str | None = None) -> World:
    """Join the process group that the environment describes (torchrun's variables), if any, and return the World.

    `gpu_id` is a list such as "0,1" of the GPUs of this machine; `backend` is "nccl", "gloo" or None for what suits the
    device. Raises UserError for GPUs that are not there.
    """
    if dist.is_initialized() and "RANK" not in os.environ:  # a group that the user has made
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        return World(dist.get_rank(), dist.get_world_size(), device)
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    size = int(os.environ.get("WORLD_SIZE", 1))
    world = World(rank, size, pick_device(gpu_id, local_rank, size))
    if "RANK" in os.environ and not dist.is_initialized():
        join((backend or "nccl") if world.device.type == "cuda" else "gloo", world.device)
    return world


def pick_device(gpu_id: str | None, local_rank: int, size: int) -> torch.device:
    """Return the device of a machine's process `local_rank`, in a run of `size` processes.

    That is a GPU of `gpu_id` if there are any, else Apple's mps for a single process, else the CPU, with a warning.
    """
    if not torch.cuda.is_available():
        if size == 1 and torch.backends.mps.is_available():
            return torch.device("mps")
        warn("no GPU found: running on the CPU")
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if gpu_id:
        ids = [int(number) for number in gpu_id.split(",")]
    else:
        ids = [torch.cuda.current_device()] if size == 1 else list(range(count))  # a notebook may have set its own
    if max(ids) >= count:
        raise UserError(f"--gpu-id {gpu_id}: no GPU {max(ids)} here, GPUs 0 to {count - 1} are")
    if size == 1 and gpu_id and len(ids) > 1:
        raise UserError(f"--gpu-id {gpu_id}: one process uses one GPU; add --multiprocessing-distributed for several")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if max(local_rank + 1, local_size) > len(ids):  # every process of the machine finds it, so that one can print it
        raise UserError(f"{local_size} processes on this machine, but only {len(ids)} of its GPUs to use")
    device = torch.device("cuda", ids[local_rank])
    torch.cuda.set_device(device)
    return device


def join(backend: str, device: torch.device) -> None:
    """Join the process group.

    The store of torchrun outlives its restarts: a new group that read the keys of the dead one would connect to
    processes that are gone. So each start has keys of its own.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    else:  # each machine counts the restarts that its own processes caused: here every rank counts its starts
        start = store.add(f"starts of {rank}", 1)
    store = dist.PrefixStore(f"start {start}", store)
    device_id = device if backend == "nccl" else None
    group = {"store": store, "rank": rank, "world_size": size, "device_id": device_id}
    dist.init_process_group(backend, timeout=START_TIMEOUT, **group)


def set_timeout(minutes: float) -> None:
    """Set how long the collectives wait for other processes from now on. Called once training begins."""
    if dist.is_initialized():
        # Its public name, `dist.set_timeout`, is newer than the oldest PyTorch that this project runs with.
        setter = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        setter(timedelta(minutes=minutes))


def leave() -> None:
    """Leave the process group and end its threads: one that outlives the interpreter would abort the process.

    They end once nothing refers to the group, so the trained model must be out of use.
    """
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel refers to the group, and is part of a cycle of references
        dist.destroy_process_group()


def first_to_print() -> bool:
    """Return whether this process is the first to report a failure, which usually all of them see.

    Before there is a group, it is the first process of each machine.
    """
    if not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    with contextlib.suppress(RuntimeError):  # the store's process has ended
        return dist.distributed_c10d._get_default_store().add("failures printed", 1) == 1
    return True


def check_same(settings: Mapping[str, Any], world: World) -> None:
    """Raise UserError, in every process, unless all of them have the same picklable `settings`.

    The line names the settings that differ, and the ranks on which they do.
    """
    first, *others = gather_objects(dict(settings))
    found = []
    for rank, other in enumerate(others, 1):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            listed = ", ".join(f"{name} {other.get(name)!s:.80} instead of {first.get(name)!s:.80}" for name in names)
            found.append(f"rank {rank} has {listed}")
    if found:
        raise UserError(f"the {world.size} processes must train alike: {'; '.join(found)}")


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` summed over all processes (the tensor itself without a process group)."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def any_over_ranks(flag: bool, world: World) -> bool:
    """Return whether `flag` is true in any process."""
    if world.size == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=world.device)))


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's picklable `value`, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Broadcast rank 0's buffers (BatchNorm statistics), which are those that a checkpoint holds."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
