"""How a run ends when it is asked to: it notes the signal, and all processes agree on the step after which they save."""

import contextlib
import signal

import torch

import distributed

POLL_EVERY = 10  # steps between agreements of several processes on whether to stop


class Preempted(Exception):
    """The run was asked to stop and has saved itself, unless the signal ended the compilation of its first step."""


class StopSignal:
    """Notes `signals`, so that the training loop can save before it ends."""

    def __init__(self, signals=(signal.SIGTERM, signal.SIGUSR1)):
        self.received = False
        for number in signals:
            signal.signal(number, self.note)

    def note(self, *_):
        """Signal handler: remember that a stop was asked for."""
        self.received = True

    @contextlib.contextmanager
    def reaches_the_compiler(self):
        """Turn what fails once a stop is asked for into Preempted: a compiler's processes are sent the signal too, and die."""
        try:
            yield
        except Exception:
            if self.received:
                raise Preempted from None
            raise

    def agreed(self, world, step, steps):
        """Return whether the run stops after `step` of `steps`: at once in one process, where all agree in several."""
        if world.size == 1:
            return self.received
        if step % POLL_EVERY and step < steps:
            return False
        return bool(distributed.sum_over_ranks(torch.tensor(float(self.received), device=world.device)).item())
