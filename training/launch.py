"""The published flags of several processes (`--multiprocessing-distributed`): this script again, under torchrun."""

import contextlib
import logging
import os
import signal
import socket
from urllib.parse import urlparse

import torch
import torch.distributed as dist

import launcher
from utils import UserError, available_cores, first_line, warn


def gpu_count(gpu_id):
    """Return how many GPUs a --gpu-id value such as '0,1,2' names (1 for none)."""
    return len(gpu_id.split(",")) if gpu_id else 1


def host_and_port(url):
    """Return the host and the port of a --dist-url; UserError unless it is tcp://HOST:PORT of a known host."""
    address, usable = urlparse(url), False
    with contextlib.suppress(ValueError):  # a port out of range
        usable = address.scheme == "tcp" and address.hostname and address.port
    if not usable:
        raise UserError(f"--dist-url {url}: expected tcp://HOST:PORT")
    try:
        socket.getaddrinfo(address.hostname, address.port)
    except OSError as error:
        raise UserError(f"--dist-url {url}: {address.hostname}: {error.strerror}") from None
    return address.hostname, address.port


def relaunch(args, argv):
    """Start this script again under torchrun with one process per id of --gpu-id, as the published flags ask.

    Returns the exit status: that of the processes' mistake or preemption (2, 143) where one of them has it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as start

    if args.rank >= args.world_size:
        raise UserError(f"--rank {args.rank}: expected a machine's number below --world-size {args.world_size}")
    host, port = host_and_port(args.dist_url)
    processes = gpu_count(args.gpu_id)
    if not args.gpu_id and torch.cuda.is_available():
        processes = torch.cuda.device_count()
    logging.disable(logging.ERROR)  # torchrun's, of this parent alone: the processes tell what went wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(available_cores() // processes, 1)))
    os.environ[launcher.PID] = str(os.getpid())
    # torchrun hands SIGTERM on to its processes, but not in every version SIGUSR1.
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    flags = {
        "nnodes": args.world_size,
        "node-rank": args.rank,
        "nproc-per-node": processes,
        "master-addr": host,
        "master-port": port,
    }
    try:
        start([*(f"--{name}={value}" for name, value in flags.items()), *argv])
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        ended = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        for status in (2, 143):
            if status in ended.values():
                return status
        listed = ", ".join(f"process {rank} ended with status {status}" for rank, status in ended.items())
        warn(f"{os.path.basename(argv[0])}: error: {listed}")
        return 1
    except KeyboardInterrupt:  # the processes tell it
        return 130
    except RuntimeError as error:
        if not isinstance(error, dist.DistNetworkError) and "EADDRINUSE" not in str(error):  # as PyTorch 2.6 tells it
            raise
        reason = "its port is taken" if "EADDRINUSE" in str(error) else f"no connection there ({first_line(error)})"
        raise UserError(f"--dist-url {args.dist_url}: {reason}") from None
    finally:
        del os.environ[launcher.PID]
    return 0
