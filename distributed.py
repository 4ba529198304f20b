"""One process or many, by PyTorch's own launcher: the world of a run, its collectives and its entry point."""

import os
import sys
from typing import NamedTuple
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from utils import UserError


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
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.gpu_id, int(os.environ.get("LOCAL_RANK", 0)))
    rank = int(os.environ.get("RANK", 0))
    world = World(rank, size, device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if world.is_main and device.type == "cpu":
        print("no GPU found: running on the CPU", file=sys.stderr, flush=True)
    elif world.is_main and gpu_count(args.gpu_id) > size:
        raise UserError(f"--gpu-id {args.gpu_id} names several GPUs for one process: add --multiprocessing-distributed")
    return world


def gpu_count(gpu_id):
    """Return how many GPUs a --gpu-id value such as '0,1,2' names (1 for none)."""
    return len(gpu_id.split(",")) if gpu_id else 1


def relaunch(args, argv):
    """Start this script again under torchrun with one process per id of --gpu-id, as the published flags ask."""
    from torch.distributed.run import main as torchrun

    address = urlparse(args.dist_url)
    if address.scheme != "tcp" or not address.port:
        raise UserError(f"--dist-url {args.dist_url}: expected tcp://HOST:PORT")
    processes = gpu_count(args.gpu_id)
    if not args.gpu_id and torch.cuda.is_available():
        processes = torch.cuda.device_count()
    torchrun(
        [
            f"--nnodes={args.world_size}",
            f"--node-rank={args.rank}",
            f"--nproc-per-node={processes}",
            f"--master-addr={address.hostname}",
            f"--master-port={address.port}",
            *argv,
        ]
    )


def run(parse_args, main):
    """Run `main(args, world)` of a script: parse, launch, join, and turn a user's mistake into one line and status 2."""
    try:
        args = parse_args()
        if getattr(args, "multiprocessing_distributed", False) and "RANK" not in os.environ:
            relaunch(args, sys.argv)
            return
        world = setup(args)
        main(args, world)
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor):
    """Return `tensor` summed over all processes (the tensor itself where there is one process)."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value):
    """Return the list of every rank's picklable `value`, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
