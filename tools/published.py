"""The published number that belongs to a run, found from what its args.json says."""

import json
import re
from contextlib import suppress
from pathlib import Path

import models

TABLE = Path(__file__).resolve().parent / "results" / "published_results.json"


def read_json(path):
    """Return the dict in a JSON file, or None if there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def plain(arch):
    """Return the published name of an architecture: no auxiliary heads, one network of a mutual pair."""
    name = str(arch)
    with suppress(ValueError):  # one that is unknown here
        name = models.backbone_name(name)
    return name.removesuffix("_imagenet").removesuffix("_bn")


def source_args(path):
    """Return the settings of the run that wrote the weights at `path`, from its args.json or else the path."""
    known = read_json(Path(path).parent / "args.json")
    if known is not None:
        return {"freezed": "freezed" in path, **known}
    names = re.search(r"(train_\w+?)(?:_tarch_(\w+?))?_arch_(\w+)_dataset_([a-z0-9]+)", path)
    script, tarch, arch, dataset = names.groups() if names else (None,) * 4
    return {"script": script, "tarch": tarch, "arch": arch, "dataset": dataset, "freezed": "freezed" in path}


def is_joint(args):
    """Tell whether a student's teacher was trained jointly: it has auxiliary heads, no --freezed, and is no baseline."""
    path = args.get("tcheckpoint")
    if not path or not args["tarch"].endswith("_aux"):
        return False
    source = source_args(path)
    return not source.get("freezed") and source.get("script") != "train_baseline_cifar"


def cell(block, row, name, side=None):
    """Return the published value of an architecture in a row of a block, or None; `side` picks an end of the pairs."""
    columns = [column if side is None else column.split("->")[side] for column in block["columns"]]
    return block[row][columns.index(name)] if name in columns and row in block else None


def published_student(label, args, table):
    """Return (value, whether its teacher was trained jointly) for a distilled student, or (None, None)."""
    method, joint = label.method.rstrip("*"), label.method.endswith("*")
    pair = f"{plain(args.get('tarch'))}->{plain(args.get('arch'))}"
    row = {"hsakd": "HSAKD_joint" if joint else "HSAKD", "kd": "KD", "dpcd": "DPCD"}.get(method, method)
    if args.get("few_ratio") is not None:
        block = table.get(f"cifar100_few_shot_{pair}", {"ratio": []})
        values = block.get(row.removesuffix("_joint"), [None] * len(block["ratio"]))
        ratios = dict(zip(block["ratio"], values, strict=True))
        return ratios.get(float(args["few_ratio"])), method == "hsakd"
    if args.get("dataset") == "imagenet":
        return table.get(f"imagenet_{pair}", {}).get(row, [None])[0], row == "HSAKD_joint"
    return cell(table["dpcd_cifar100" if row == "DPCD" else "cifar100_offline"], row, pair), row == "HSAKD_joint"


def published_transfer(args, table):
    """Return the published accuracy of a linear classifier on frozen CIFAR-100 features, or None."""
    origin, block = source_args(args.get("s_path") or ""), table["transfer_mobilenetV2_from_vgg13"]
    name = re.sub("[^a-z0-9]", "", str(args.get("dataset")).lower())
    column = {"stl10": "STL-10", "tinyimagenet": "TinyImageNet"}.get(name)
    if plain(args.get("arch")) != "mobilenetV2" or origin.get("dataset") != "cifar100":
        return None
    if origin.get("tarch") is None:
        return cell(block, "student", column)
    row = {"hsakd": "HSAKD", "kd": "KD"}.get(origin.get("method") or "hsakd", "")
    return cell(block, row, column) if plain(origin["tarch"]) == "vgg13" else None


def published_single(label, args, table):
    """Return the published accuracy of a teacher, baseline or mutual pair, or None."""
    arch, imagenet = plain(args.get("arch")), table["imagenet_resnet34->resnet18"]
    offline, online, dpcd = (table[name] for name in ("cifar100_offline", "cifar100_online", "dpcd_cifar100"))
    kind = next((kind for kind in ("teacher", "baseline", "online") if kind in label.script), "")
    row = "teacher_joint" if label.method == "joint" else "teacher"
    # Neither teachers with one-view heads nor baselines on a share of the training images were published.
    if args.get("rotations", 4) != 4 or args.get("few_ratio") not in (None, 1):
        return None
    if args.get("dataset") == "imagenet":
        rows = {
            ("teacher", "resnet34"): row,
            ("baseline", "resnet18"): "student",
            ("online", "resnet18"): "HSSAKD_online_resnet18",
        }
        return imagenet.get(rows.get((kind, arch)), [None])[0]
    if kind == "teacher":
        return cell(offline, row, arch, 0)
    if kind == "online":
        return cell(online, "HSSAKD", arch)
    found = (cell(offline, "student", arch, 1), cell(online, "baseline", arch), cell(dpcd, "student", arch, 1))
    return next((value for value in found if value is not None), None)


def lookup(label, args, table):
    """Return the published top-1 of a row as text, empty where there is none."""
    note = ""
    if label.script == "eval_rep":
        value = published_transfer(args, table)
    elif args.get("dataset") not in ("cifar100", "imagenet"):
        value = None
    elif args.get("tarch"):
        value, joint = published_student(label, args, table)
        if joint != label.method.endswith("*"):
            note = " (jointly trained teacher)" if joint else " (plain teacher)"
    else:
        value = published_single(label, args, table)
    if value is None:
        return ""
    return ("{:.2f}±{:.2f}".format(*value) if isinstance(value, list) else f"{value:.2f}") + note
