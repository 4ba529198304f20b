"""Networks of torchvision and timm by name (`torchvision/NAME`, `timm/NAME`), the user's own by `FILE.py:FUNCTION`."""

import difflib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torchvision
from torch import Tensor, nn

from models.tracer import first_line

DEFAULT_SIZE = 224
_LIBRARIES = ("torchvision", "timm")
# Families of torchvision whose networks are made for one size of image, and the argument that names it.
_SIZE_ARGUMENT = {"vit": "image_size", "maxvit": "input_size"}
_OWN_HEADS = ("googlenet", "inception_v3")  # torchvision's, with auxiliary classifiers of another kind


def is_external(name: str) -> bool:
    """Say whether `name` has the form of a library's network or of a file's, known or not."""
    return name.partition("/")[0] in _LIBRARIES or is_file(name)


def is_file(name: str) -> bool:
    """Say whether `name` is `FILE.py:FUNCTION`: to create it runs the file, so take it from the command line alone."""
    return name.rpartition(":")[0].endswith(".py")


def check(name: str) -> None:
    """Raise ValueError, in one line, if its library has no network of this name; files are not looked at."""
    if is_file(name):
        return
    library, _, bare = name.partition("/")
    if library == "timm":
        timm = _timm(name)
        if timm.is_model(bare) and ("." not in bare or timm.is_model_pretrained(bare)):
            return
        known = timm.list_models() + timm.list_pretrained()
    else:
        known = torchvision.models.list_models(torchvision.models)
        if bare in known:
            return
    nearest = difflib.get_close_matches(bare.lower(), known, n=5, cutoff=0.0)
    raise ValueError(f"unknown network {name!r}; nearest: {', '.join(f'{library}/{other}' for other in nearest)}")


def base_name(name: str) -> str:
    """Return a plain network's name without library, folder or the tag of weights: one network has several names."""
    library, _, last = name.rpartition("/")
    return last.partition(".")[0] if library == "timm" else last


def default_size(name: str, size: int | None = None) -> int:
    """Return the image size that a network was made for; `size`, if given, for one that can be built for any size."""
    if is_file(name):
        return size or DEFAULT_SIZE
    if size is not None and _size_argument(name, size):
        return size
    library, _, bare = name.partition("/")
    if library == "timm":
        return _timm(name).get_pretrained_cfg(bare).input_size[-1]
    weights = list(torchvision.models.get_model_weights(bare))
    return weights[-1].transforms().crop_size[0] if weights else DEFAULT_SIZE


def builder(name: str, num_classes: int, size: int | None = None) -> Callable[[], nn.Module]:
    """Return a function that makes a newly initialised network; `size` reaches those that are made for one size."""
    check(name)
    library, _, bare = name.partition("/")
    if is_file(name):
        return _of_file(name, num_classes)
    arguments = _size_argument(name, size)
    if library == "timm":
        timm = _timm(name)
        return lambda: timm.create_model(bare, num_classes=num_classes, **arguments)
    if bare in _OWN_HEADS:
        # Their weights were trained on images that the networks normalise once more.
        arguments |= {"aux_logits": False, "init_weights": True, "transform_input": True}
    return lambda: torchvision.models.get_model(bare, weights=None, num_classes=num_classes, **arguments)


def hub_weights(name: str) -> dict[str, Tensor]:
    """Return the state dict of the library's own weights, downloaded if need be; ValueError if that fails."""
    name = name.removesuffix("_aux")
    library, _, bare = name.partition("/")
    if library not in _LIBRARIES:
        raise ValueError(f"{name} is in no hub: its weights come from a file")
    check(name)
    try:
        if library == "timm":
            return _timm(name).create_model(bare, pretrained=True).state_dict()
        return torchvision.models.get_model_weights(bare).DEFAULT.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, ValueError) as error:  # what urllib, torch.hub and huggingface_hub raise
        reason = first_line(error).rstrip(" .")
        advice = "give a file of them instead"
        raise ValueError(f"the weights of {name} cannot be downloaded ({reason}): {advice}") from None


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and std that the library's own weights expect of images in [0, 1]; None for other networks."""
    found = _images_of(name)
    return found and (tuple(found.mean), tuple(found.std))


def margin(name: str) -> float:
    """Return the ratio of the resized side to the crop in the library's preprocessing, such as 256 / 224."""
    found = _images_of(name)
    return 1 / found.crop_pct if name.startswith("timm/") else found.resize_size[0] / found.crop_size[0]


def _images_of(name: str) -> Any:
    """Return the library's description of the images that its own weights expect; None of a file."""
    name = name.removesuffix("_aux")
    library, _, bare = name.partition("/")
    if library not in _LIBRARIES:
        return None
    check(name)
    if library == "timm":
        return _timm(name).get_pretrained_cfg(bare)
    return torchvision.models.get_model_weights(bare).DEFAULT.transforms()


def _size_argument(name: str, size: int | None) -> dict:
    """Return the argument that makes a network for images of `size`, if it is of those made for one size."""
    library, _, bare = name.partition("/")
    if size is None or is_file(name):
        return {}
    if library == "timm":
        return {"img_size": size} if _timm(name).get_pretrained_cfg(bare).fixed_input_size else {}
    argument = _SIZE_ARGUMENT.get(bare.partition("_")[0])
    return {argument: (size, size) if argument == "input_size" else size} if argument else {}


def _timm(name: str) -> ModuleType:
    """Return the package timm; ValueError if it is missing."""
    try:
        import timm
    except ImportError:
        raise ValueError(f"{name} needs timm: pip install timm") from None
    return timm


def load_file(path: str) -> ModuleType:
    """Run a Python file, which may import its neighbours, and return it as a module.

    FileNotFoundError if it is missing, ValueError if it imports what is not there.
    """
    name = f"file_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import would: classes are looked up by their module's name
    if (folder := str(Path(path).resolve().parent)) not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:  # such as `from utils import x`: utils is a module of this project
        raise ValueError(f"{path}: {first_line(error)}") from None
    return module


def _of_file(name: str, num_classes: int) -> Callable[[], nn.Module]:
    """Return a function that calls FUNCTION of FILE.py with the number of classes."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    module = load_file(path)
    if not callable(found := getattr(module, function, None)):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        raise ValueError(f"{path} has no function {function}, but {', '.join(known) or 'none at all'}")
    return functools.partial(found, num_classes=num_classes)
