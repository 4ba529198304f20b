"""Train a teacher, a student alone and a distilled student in a few minutes on two CPU cores, and compare them.

    make demo

The data are scikit-learn's handwritten digits, 1,797 images of 8 x 8 pixels, scaled up. The teacher trains on all 1,437
training digits, both students on the same stratified 201 of them. Every command is printed before it runs.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEACHER, STUDENT = "resnet14_aux", "resnet8_aux"
TEACHER_SCHEDULE = ["--epochs", "4", "--milestones", "3", "--batch-size", "32"]
STUDENT_SCHEDULE = ["--epochs", "12", "--milestones", "8", "10", "--batch-size", "16"]


def run(script, *arguments):
    """Print and run a script of this project; exit if it fails."""
    words = [script, *map(str, arguments)]
    print("$ python " + " ".join(words), flush=True)
    if status := subprocess.run([sys.executable, *words], cwd=ROOT).returncode:
        sys.exit(status)


def main():
    """Train, test, and print the table of the three networks."""
    with tempfile.TemporaryDirectory() as folder:
        common = ["--dataset", "digits", "--checkpoint-dir", folder]
        run("train_teacher_cifar.py", "--arch", TEACHER, *TEACHER_SCHEDULE, *common)
        (teacher,) = Path(folder).glob(f"train_teacher*/{TEACHER}.pth.tar")
        for seed in (0, 1):
            few = ["--few-ratio", 0.14, "--manual_seed", seed, *STUDENT_SCHEDULE, *common]
            run("train_baseline_cifar.py", "--arch", STUDENT, *few)
            run("train_student_few_shot.py", "--arch", STUDENT, "--tarch", TEACHER, "--tcheckpoint", teacher, *few)
        (student,) = Path(folder).glob(f"train_student*seed1/{STUDENT}.pth.tar")
        run("test_model.py", "--arch", STUDENT, "--dataset", "digits", "--student-weights", student)
        run("report.py", folder)


if __name__ == "__main__":
    main()
