"""Train a teacher, a student alone and a distilled student in a few minutes on two CPU cores, and compare them.

    make demo

The data are scikit-learn's handwritten digits, 1,797 images of 8 x 8 pixels, scaled up. The teacher trains on all
training digits, both students on the same small stratified share of them. Every command is printed before it runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
TEACHER, STUDENT = "resnet14_aux", "resnet8_aux"
RATIO, SEEDS = 0.14, (0, 1)
TEACHER_SCHEDULE = ["--epochs", "4", "--milestones", "3", "--batch-size", "32"]
STUDENT_SCHEDULE = ["--epochs", "12", "--milestones", "8", "10", "--batch-size", "16"]


def run(script, *arguments):
    """Print and run a script of this project and return its output; exit if it fails."""
    command = [sys.executable, script, *map(str, arguments)]
    print("$ python " + " ".join(command[1:]), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{script} ended with status {done.returncode}: {done.stderr}")
    return done.stdout


def last_accuracy(folder, pattern):
    """Return the last epoch's test top-1 of the run in `folder` that matches `pattern`."""
    log = next(folder.glob(f"{pattern}/log.jsonl"))
    return json.loads(log.read_text().splitlines()[-1])["test/top1"]


def train_all(folder):
    """Train all networks; return {name: accuracies by seed} and the path of the last distilled student's weights."""
    common = ["--dataset", "digits", "--checkpoint-dir", folder]
    run("train_teacher_cifar.py", "--arch", TEACHER, *TEACHER_SCHEDULE, *common)
    teacher = next(folder.glob(f"train_teacher*/{TEACHER}.pth.tar"))
    found = {f"teacher {TEACHER}": [last_accuracy(folder, "train_teacher*")]}
    found |= {"student alone": [], "student distilled": []}
    for seed in SEEDS:
        few = ["--few-ratio", RATIO, "--manual_seed", seed, *STUDENT_SCHEDULE, *common]
        run("train_baseline_cifar.py", "--arch", STUDENT, *few)
        run("train_student_few_shot.py", "--arch", STUDENT, "--tarch", TEACHER, "--tcheckpoint", teacher, *few)
        found["student alone"].append(last_accuracy(folder, f"train_baseline*seed{seed}"))
        found["student distilled"].append(last_accuracy(folder, f"train_student*seed{seed}"))
    return found, next(folder.glob(f"train_student*seed{SEEDS[-1]}/{STUDENT}.pth.tar"))


def main():
    """Train, test, and print the table of the three networks."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found, student = train_all(Path(temporary))
        print(run("test_model.py", "--arch", STUDENT, "--dataset", "digits", "--student-weights", student))
    print("Top-1 in percent on the 360 test digits after the last epoch. Both students (ResNet-8) trained on the same")
    print("201 digits for 12 epochs, the teacher on all 1,437. A teacher helps most where labelled images are few.\n")
    print(f"{'network':24}" + "".join(f"seed {seed:<5}" for seed in SEEDS) + "mean")
    for name, values in found.items():
        print(
            f"{name:24}"
            + "".join(f"{value:<10.2f}" for value in values)
            + (f"{mean(values):.2f}" if values[1:] else "")
        )


if __name__ == "__main__":
    main()
