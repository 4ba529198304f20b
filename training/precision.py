"""Which floating-point type the networks compute in."""

import torch


def resolve_precision(amp: str, device: torch.device, recorded: str | None = None) -> torch.dtype:
    """Return the dtype for `--amp`: auto, off, bf16 or fp16.

    `auto` takes the type that a run has recorded, or else 16 bits on hardware that computes in them: bfloat16 on GPUs
    of compute capability 8.0 and above and on processors with bfloat16 instructions, float16 on older GPUs.
    """
    if amp != "auto":
        return {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    if recorded is not None:
        return getattr(torch, recorded)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        found = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch before 2.9 cannot be asked
        fast = any(value for name, value in found.items() if name.endswith("bf16"))
        return torch.bfloat16 if fast else torch.float32
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which networks on `device` compute in `dtype`."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def type_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as an attribute of torch."""
    return str(dtype).removeprefix("torch.")
