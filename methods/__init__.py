"""The distillation methods of a student script: their flags, constants, teacher and objective."""

import contextlib

import loading
import losses
import models
import options
import utils

# DPCD's clamp of beta by the teacher's family, as in its released code.
DPCD_BETA_RANGE = {"wrn": (5.0, 8.0), "vgg": (5.0, 8.0), "resnet32x4": (6.0, 10.0), "ResNet50": (6.0, 10.0)}
DPCD_BETA_RANGE_RESNET = (1.0, 4.0)
# DKD's beta by the teacher's family, 8 for the others: its authors' CIFAR-100 settings, which DPCD's clamps enclose.
DKD_BETA = {"wrn": 6.0, "vgg": 6.0, "resnet32x4": 8.0, "resnet8x4": 8.0, "resnet": 2.0}

# DKD's constants for ImageNet, its authors' too.
DKD_IMAGENET = {"kd_T": 1.0, "beta": 0.5, "loss_warmup": 1}

METHODS = {
    "hsakd": {},
    "kd": {"ce_weight": 0.1, "kd_weight": 0.9},
    "dkd": {"alpha": 1.0, "beta": None, "loss_warmup": 20},
    "dpcd": {
        "beta": 6.0,
        "beta_range": None,
        "loss_warmup": 20,
        "alpha_range": [0.5, 2.0],
        "ema": 0.9,
        "history": 2000,
        "threshold": 0.6,
        "quantile": 0.65,
        "slope": 18.0,
        "ced_beta": 8.0,
    },
}
KINDS = {None: "a plain backbone", 1: "DPCD (heads over classes)", 4: "HSAKD (heads over class and rotation)"}
PAIR = "HSSAKD (one network of a mutual pair)"
TEMPERATURE = {"hsakd": 3.0, "dpcd": 3.0, "kd": 4.0, "dkd": 4.0}


def add_arguments(parser, tarch="wrn_40_2_aux"):
    """Add the trained teacher, the method and the methods' constants to a student script's parser."""
    add = parser.add_argument_group("teacher and method").add_argument
    number = options.not_negative
    add("--tarch", type=options.architecture, default=tarch, help="architecture of the teacher")
    add("--tcheckpoint", type=options.path, required=True, help="trained weights of the teacher")
    options.add_net(add, "--tcheckpoint")
    add("--method", choices=list(METHODS), default="hsakd", help="what the student learns from the teacher")
    add("--kd_T", type=options.above_zero, help="temperature; default 3 for hsakd and dpcd, 4 for kd and dkd (1 on ImageNet)")
    add("--ce-weight", type=number, help="kd: weight of the cross-entropy (0.1)")
    add("--kd-weight", type=number, help="kd: weight of the KL term (0.9)")
    add("--alpha", type=number, help="dkd: weight of the target term (1)")
    add("--beta", type=number, help="non-target weight; dkd: by the teacher's family; dpcd: 6, before --beta-range")
    add("--loss-warmup", type=options.natural, help="dkd, dpcd: epochs over which the teacher's term fades in (20)")
    add("--beta-range", type=number, nargs=2, metavar=("LOW", "HIGH"), help="dpcd: clamp of beta (by family)")
    add("--alpha-range", type=number, nargs=2, metavar=("LOW", "HIGH"), help="dpcd: clamp of alpha (0.5 2)")
    add("--ema", type=options.below_one, help="dpcd: share of the old value in the moving confidence (0.9)")
    add("--history", type=options.positive, help="dpcd: confidences kept for the threshold (2000)")
    add("--threshold", type=number, help="dpcd: threshold until the history is full (0.6)")
    add("--quantile", type=options.share, help="dpcd: quantile of the history that is the threshold (0.65)")
    add("--slope", type=number, help="dpcd: slope of the sigmoid (18)")
    add("--ced-beta", type=number, help="dpcd: weight of the self path's non-target term (8)")


def finish(parser, argv=None):
    """Parse a student script's command line and fill in the method's constants; reject those of other methods."""
    args = options.finish(parser, argv)
    constants = METHODS[args.method]
    for name in sorted(set().union(*METHODS.values()) - set(constants)):
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} has no part in --method {args.method}")
    defaults = {"kd_T": TEMPERATURE[args.method], **constants}
    if args.method == "dkd" and models.is_imagenet(args.arch):
        defaults |= DKD_IMAGENET
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name in ("arch", "tarch"):
        if models.is_pair(getattr(args, name)):
            parser.error(f"--{name} {getattr(args, name)} is a mutual pair: name one of its networks")
    if args.method == "dpcd" and args.accumulate > 1:
        parser.error("--accumulate has no part in --method dpcd: its running confidence is of whole batches")
    if args.method in ("kd", "dkd"):
        # These losses use class logits alone, so the name of an auxiliary network stands for its backbone.
        args.arch = models.backbone_name(args.arch)
    else:
        options.require_aux(parser, args, *(["arch", "tarch"] if args.method == "hsakd" else ["arch"]))
    teacher_family = models.backbone_name(args.tarch)
    if args.method == "dkd" and args.beta is None:
        args.beta = by_family(DKD_BETA, teacher_family, 8.0)
    if args.method == "dpcd" and args.beta_range is None:
        args.beta_range = list(by_family(DPCD_BETA_RANGE, teacher_family, DPCD_BETA_RANGE_RESNET))
    for name in ("alpha_range", "beta_range"):
        low_high = getattr(args, name)
        if low_high and low_high[0] > low_high[1]:
            parser.error(f"--{name.replace('_', '-')}: {low_high[0]:g} is above {low_high[1]:g}")
    return args


def method_of(content, rotations):
    """Return the method that a checkpoint's dict names, if it is one known here, else what the weights' heads tell."""
    method = content.get("method")
    if isinstance(method, str) and method in METHODS:
        return method
    with contextlib.suppress(ValueError, TypeError, AttributeError):  # a foreign file may say anything
        if models.is_pair(content.get("arch")):
            return PAIR
    return KINDS[rotations]


def by_family(table, name, default):
    """Return the entry of `table` whose key is the longest prefix of an architecture's name."""
    keys = [key for key in table if name.startswith(key)]
    return table[max(keys, key=len)] if keys else default


def load_teacher(args, images):
    """Return the teacher of `--tarch` of the classes of `images` (batches of them), with the weights of `--tcheckpoint`.

    For HSAKD with its auxiliary classifiers, for the other methods its backbone, whose class logits are all they use.
    Raises UserError where the weights do not fit.
    """
    known, rotations = utils.weights_layout(args.tcheckpoint)
    if known != len(images.classes):
        raise utils.UserError(f"{args.tcheckpoint}: a teacher of {known} classes, but {args.dataset} has {len(images.classes)}")
    if args.method == "hsakd" and rotations == 1:
        raise utils.UserError(f"{args.tcheckpoint}: hsakd needs a teacher whose heads tell 4 rotations apart, not 1")
    teacher = models.create(args.tarch if args.method == "hsakd" else models.backbone_name(args.tarch), known)
    content = utils.load_weights(teacher, args.tcheckpoint, args.net)
    loading.warn_of_other_data(content, images, args.tcheckpoint)
    return teacher


def create_pair(args, images):
    """Return (student, objective) of `--method` for the classes of `images` (batches); UserError where they do not fit."""
    teacher = load_teacher(args, images)
    student = models.create(args.arch, len(images.classes), 1 if args.method == "dpcd" else 4)
    if args.method == "kd":
        return student, losses.KDLoss(teacher, args.kd_T, args.ce_weight, args.kd_weight)
    if args.method == "dkd":
        return student, losses.DKDLoss(teacher, args.kd_T, args.alpha, args.beta, args.loss_warmup)
    if args.method == "dpcd":
        renamed = {"temperature": args.kd_T, "warmup_epochs": args.loss_warmup}
        constants = {name: getattr(args, name) for name in METHODS["dpcd"] if name != "loss_warmup"}
        return student, losses.DPCDLoss(teacher, **constants, **renamed)
    heads = [network.auxiliary_classifier.num_branches for network in (student, teacher)]
    if heads[0] != heads[1]:
        raise utils.UserError(f"hsakd pairs heads one to one, but {args.arch} has {heads[0]}, {args.tarch} {heads[1]}")
    return student, losses.HSAKDLoss(teacher, args.kd_T)
