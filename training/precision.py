"""Which floating-point type the networks compute in."""

import time

import torch

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_precision(amp, device):
    """Return the dtype for `--amp`: float32, bfloat16 or float16; `auto` takes bfloat16 where it is fast.

    On a GPU that is hardware of compute capability 8.0 and above; on a CPU a short probe measures it.
    """
    if amp != "auto":
        return {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    with torch.random.fork_rng(devices=[]):
        return torch.bfloat16 if cpu_bfloat16_gain() > 1.2 else torch.float32


def autocast(device, dtype):
    """Return the context in which networks on `device` compute in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def type_name(dtype):
    """Return a dtype's name, a key of `TYPES`."""
    return str(dtype).removeprefix("torch.")


def cpu_bfloat16_gain(rounds=20):
    """Return how many times faster a small training convolution is in bfloat16 than in float32 on this CPU."""
    images = torch.randn(16, 32, 32, 32).to(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(32, 32, 3, padding=1).to(memory_format=torch.channels_last)
    times = {torch.float32: [], torch.bfloat16: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several, which wait for each other, would measure what else the cores do
    for _ in range(rounds + 1):
        for dtype, found in times.items():
            began = time.perf_counter()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                layer(images).sum().backward()
            found.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    # The first round warms up; the fastest of the others is the least disturbed.
    return min(times[torch.float32][1:]) / min(times[torch.bfloat16][1:])
