"""Speed-ups that change results by rounding alone: freed memory is kept, the teacher gets an inference copy, convolutions that
are slow in a CPU's bfloat16 stay in float32, the step is compiled."""

import copy
import ctypes
from collections import Counter
from contextlib import contextmanager, suppress

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from utils import UserError, first_line


class TensorUses(TorchFunctionMode):
    """Counts, by id, how many torch functions that return tensors took each tensor as an argument."""

    def __init__(self):
        super().__init__()
        self.counts, self.kept = Counter(), []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Questions such as `x.dim()` return no tensor: they are no use of the values.
        if torch.is_tensor(result) or (isinstance(result, (tuple, list)) and any(map(torch.is_tensor, result))):
            flat = [v for a in args for v in (a if isinstance(a, (tuple, list)) else [a]) if torch.is_tensor(v)]
            self.counts.update({id(v) for v in flat})
            self.kept += flat  # an id stays a tensor's own only while the tensor lives
        return result


def foldable(network, images):
    """Return (convolution's name, BatchNorm's name) for each convolution whose output one BatchNorm alone takes.

    Found by watching one forward pass of `images`: names cannot tell, since in the thinnest WRNs the stem's output
    also goes past the BatchNorm, and torch.fx does not trace networks that branch on a tensor's shape or layout.
    """
    produced, pairs, hooks = {}, [], []

    def after_convolution(name):
        return lambda module, args, output: produced.update({id(output): (name, output)})

    def before_norm(name):
        return lambda module, args: pairs.append((id(args[0]), name))

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_convolution(name)))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm(name)))
    with torch.no_grad(), TensorUses() as uses:
        network(images)
    for hook in hooks:
        hook.remove()
    return [(produced[at][0], norm) for at, norm in pairs if at in produced and uses.counts[at] == 1]


def fold_batchnorm(network, size):
    """Return a copy of an eval-mode network for images of `size` whose BatchNorms are, where they can be, in the
    preceding convolution's weights: the same function up to float32 rounding."""
    network = copy.deepcopy(network).eval()
    device = next(network.parameters()).device
    for conv, norm in foldable(network, torch.zeros(1, 3, size, size, device=device)):
        fused = nn.utils.fuse_conv_bn_eval(network.get_submodule(conv), network.get_submodule(norm))
        network.set_submodule(conv, fused)
        network.set_submodule(norm, nn.Identity())
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def inference_copy(teacher, size, dtype):
    """Return a frozen copy of a teacher, for images of `size`, that only serves to be run under autocast to `dtype`.

    BatchNorm is folded where it can be, and the weights that autocast would convert in every step are converted here.
    """
    network = fold_batchnorm(teacher, size)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return network


def keep_memory():
    """Let glibc keep the memory that tensors free: handed back and asked for again, its pages cost more than the
    arithmetic done in them (a BatchNorm of 60 MB: 122 ms against 9). Elsewhere nothing changes."""
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 2**26)):
            mallopt(option, value)


class Float32Conv2d(nn.Conv2d):
    """A convolution in float32 also under autocast; the result has the input's type."""

    def forward(self, x):
        """Return the convolution of x (B, C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


def suit_cpu(model):
    """Train strided depthwise convolutions in float32: on the CPU their bfloat16 backward pass takes 10 to 50 times as long."""
    for module in model.modules():
        depthwise = type(module) is nn.Conv2d and module.groups == module.in_channels > 1
        if depthwise and max(module.stride) > 1 and module.weight.requires_grad:
            module.__class__ = Float32Conv2d


class CompiledStep:
    """A function (images, labels, epoch) compiled for `size` images, with `graphs` as CUDA graphs.

    Another number of images, such as an epoch's last one, runs uncompiled. `state` are tensors that the function
    updates in place.
    """

    def __init__(self, function, size, device, graphs=False, state=()):
        self.uncompiled, self.size = function, size
        self.compiled = torch.compile(function, mode="reduce-overhead" if graphs else None, dynamic=False)
        for value in state:
            torch._dynamo.mark_static_address(value)  # else no CUDA graph is made of a step that changes them
        # As a plain number the epoch would be a constant of the compiled code, which each epoch would compile anew.
        self.epoch = torch.zeros((), device=device)

    def __call__(self, images, labels, epoch):
        if len(images) != self.size:
            return self.uncompiled(images, labels, epoch)
        return self.compiled(images, labels, self.epoch.fill_(epoch))


@contextmanager
def compiler_explained():
    """Turn what torch.compile lacks on this machine, in a forward or backward pass, into a UserError."""
    try:
        yield
    except getattr(torch._dynamo.exc, "ShortenTraceback", torch._dynamo.exc.BackendCompilerFailed) as error:
        # No C++ compiler, no Triton, a GPU that is too old for it.
        raise UserError(f"--compile: {first_line(getattr(error, 'inner_exception', error))}") from None
