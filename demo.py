"""The whole story in a few minutes on two CPU cores: teacher, student alone, student distilled, test.

    make demo

On scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels, scaled up). The teacher learns from all training
digits; both students see the same small stratified share of labelled ones. Every command run is printed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

TEACHER, STUDENT = "resnet20_aux", "resnet8_aux"
RATIO, SEEDS = 0.14, (0, 1)
TEACHER_SCHEDULE = ["--epochs", "5", "--milestones", "3", "4"]
STUDENT_SCHEDULE = ["--epochs", "30", "--milestones", "20", "26"]


def run(script, *arguments, quiet=True):
    """Print and run a script of this project; stop where it fails; return what it printed."""
    command = [sys.executable, script, *map(str, arguments)]
    print("$ python " + " ".join(command[1:]), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        sys.exit(f"{script} ended with status {done.returncode}")
    if not quiet:
        print(done.stdout)
    return done.stdout


def only(folder, pattern):
    """Return the one file below `folder` that matches `pattern`."""
    return next(folder.glob(pattern))


def accuracy(weights, arch):
    """Return the test top-1, in percent, that test_model.py measures for weights on the digits."""
    return json.loads(run("test_model.py", "--arch", arch, "--dataset", "digits", "--student-weights", weights, "--json"))[
        "top1"
    ]


def main():
    """Train the three networks and print their table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        common = ["--dataset", "digits", "--checkpoint-dir", folder]
        run("train_teacher_cifar.py", "--arch", TEACHER, *TEACHER_SCHEDULE, *common)
        teacher = only(folder, f"train_teacher*/{TEACHER}.pth.tar")
        found = {"alone": [], "distilled": []}
        for seed in SEEDS:
            few = ["--few-ratio", RATIO, "--manual_seed", seed, *STUDENT_SCHEDULE, *common]
            run("train_baseline_cifar.py", "--arch", STUDENT, *few)
            run("train_student_few_shot.py", "--arch", STUDENT, "--tarch", TEACHER, "--tcheckpoint", teacher, *few)
            plain = STUDENT.removesuffix("_aux")
            found["alone"].append(accuracy(only(folder, f"train_baseline*seed{seed}/{plain}.pth.tar"), plain))
            found["distilled"].append(accuracy(only(folder, f"train_student*seed{seed}/{STUDENT}.pth.tar"), STUDENT))
        print("\nTop-1 on the 360 test digits, after the last epoch. Both students saw the same 201 labelled digits, the")
        print("teacher all 1,437: with little labelled data a teacher helps most.\n")
        print(f"{'network':32}" + "".join(f"seed {seed:<6}" for seed in SEEDS) + "mean")
        print(f"{'teacher ' + TEACHER:32}{accuracy(teacher, TEACHER):.2f}")
        for name, values in found.items():
            shown = "".join(f"{value:<11.2f}" for value in values)
            print(f"{'student ' + plain + ' ' + name:32}{shown}{mean(values):.2f}")


if __name__ == "__main__":
    main()
