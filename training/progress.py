"""How far an epoch has come: a bar on a terminal, else a line every two minutes."""

import time
from collections.abc import Callable

from tqdm import tqdm

LINE_EVERY = 120  # seconds
BAR_EVERY = 20  # steps: reading the sums waits for the device


class Progress:
    """Shows the steps of an epoch in the first process; `measure` returns what is shown beside them."""

    def __init__(self, title: str, step: int, steps: int, is_main: bool, measure: Callable[[], dict[str, float]]):
        self.title, self.step, self.steps, self.measure = title, step, steps, measure
        self.bar = tqdm(total=steps, initial=step, desc=title, disable=None if is_main else True)  # None: on a terminal
        self.next_line = time.monotonic() + LINE_EVERY if is_main and self.bar.disable else float("inf")

    def update(self) -> None:
        """Count one step, and show it if it is time to."""
        self.step += 1
        self.bar.update()
        if not self.bar.disable and self.step % BAR_EVERY == 0:
            self.bar.set_postfix({name: f"{value:.2f}" for name, value in self.measure().items()})
        if time.monotonic() > self.next_line:
            self.next_line += LINE_EVERY
            listed = ", ".join(f"{name} {value:.2f}" for name, value in self.measure().items())
            print(f"{self.title}, step {self.step}/{self.steps}: {listed}", flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()
