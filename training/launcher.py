"""What has started this process: torchrun, or a user's shell, and whether it is still there. Imports nothing slow."""

import ctypes
import os
import socket
import sys

PID = "TRAINING_LAUNCHER_PID"  # of the published flags' launcher, which may have ended before its processes begin
PARENT = int(os.environ.get(PID, os.getppid()))


def is_torchrun():
    """Return whether torchrun, or the published flags by way of it, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def name():
    """Return what names the torchrun that has started this process, whose restarts keep it; "" without torchrun."""
    return f"{socket.gethostname()} {PARENT}" if is_torchrun() else ""


def restarts():
    """Return how often torchrun has started the processes again after one of this machine failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def end_with_parent(number, parent):
    """Get the signal `number`, on Linux, when the `parent` process ends: one that is killed cannot end its children itself.

    Where it has ended already, this process ends now: it would wait for the others, or take part in a later launch.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1  # prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
    if os.getppid() != parent:
        os._exit(143)
