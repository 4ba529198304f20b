"""Several processes on the CPU: gradients, metrics, launchers, preemption and the death of a process."""

import contextlib
import fcntl
import functools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scripts import WORLD, run

import batches
import datasets
import distributed
import engine
import metrics
import models
import torchrun
import train_teacher_cifar
import utils
from losses import DPCDLoss, TeacherLoss

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FOLDER = "train_baseline_cifar_arch_resnet8_dataset_digits_seed0"


def free_port():
    """Return a TCP port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def baseline(checkpoints, *more):
    """Return the command line of a baseline on the digits, without launcher."""
    common = ["--dataset", "digits", "--arch", "resnet8", "--amp", "off", "--checkpoint-dir", str(checkpoints)]
    return ["train_baseline_cifar.py", *common, *map(str, more)]


def published(command):
    """Return the command with the published flags that start two processes."""
    flags = ["--multiprocessing-distributed", "--gpu", "0,1", "--dist-backend", "nccl", "--world-size", "1", "--rank", "0"]
    return [sys.executable, *command, *flags, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]


def launch(command, **more):
    """Start a command in the project's folder."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "bufsize": 1}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes, **more)


def small_run(world, accumulate=1, flags=()):
    """Return an engine.Run of a small teacher whose BatchNorms are in eval mode."""
    args = train_teacher_cifar.parse_args(["--arch", "resnet8_aux", "--dataset", "digits", "--amp", "off", *flags])
    args.accumulate = accumulate
    torch.manual_seed(0)
    made = engine.Run(args, world, models.create("resnet8_aux", 10), TeacherLoss(), SimpleNamespace(size=32))
    made.prepare()
    made.wrapped.eval()
    return made


def two_halves():
    """Return a batch of images and labels for each of two ranks."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(2, 4, 3, 32, 32, generator=draw)
    return list(zip(images, torch.randint(0, 10, (2, 4), generator=draw), strict=True))


def gradients(made, images, labels):
    """Return name -> gradient of one batch."""
    made.model.zero_grad()
    made.forward(images, labels, 0)[0].backward()
    return {name: p.grad.clone() for name, p in made.model.named_parameters()}


def rank_gradients(rank, folder, flags):
    """Save this rank's gradients, as DistributedDataParallel averages them; --compile captures graphs without new code."""
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    made = small_run(distributed.World(rank, 2, torch.device("cpu")), flags=flags)
    assert [distributed.count_over_ranks(count, made.world) for count in (True, rank == 0, 3)] == [2, 1, 6]
    torch.save(gradients(made, *two_halves()[rank]), f"{folder}/{rank}.pt")
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == made.args.compile
    dist.destroy_process_group()


@pytest.mark.parametrize("flags", [(), ("--compile", "--batch-size", "8")])
def test_averaged_gradients_of_two_ranks(tmp_path, flags):
    mp.spawn(rank_gradients, (str(tmp_path), flags), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    first, second = (gradients(small_run(WORLD), *half) for half in two_halves())
    for name, value in first.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], (value + second[name]) / 2, rtol=1e-4, atol=1e-6)


def dpcd_batches():
    """Return three batches of teacher logits (2, 4, N) and labels (2, 4), a half for each of two ranks."""
    draw = torch.Generator().manual_seed(2)
    return [(torch.randn(2, 4, 10, generator=draw) * 3, torch.randint(0, 10, (2, 4), generator=draw)) for _ in range(3)]


def rank_confidence(rank, folder):
    """Save DPCD's weights of three batches and its running state."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    objective = DPCDLoss(None, history=18)
    weights = [objective.weights(logits[rank], labels[rank]) for logits, labels in dpcd_batches()]
    torch.save((weights, objective.state_dict()), f"{folder}/{rank}.pt")
    os._exit(0)  # the end of a group that has no more users may hang in PyTorch 2.6


def test_dpcds_running_confidence_is_of_whole_batches(tmp_path):
    """Two ranks weight as one process does, before and after the history is full."""
    mp.spawn(rank_confidence, (str(tmp_path),), nprocs=2)
    objective = DPCDLoss(None, history=18)
    weights = [objective.weights(logits.flatten(0, 1), labels.flatten()) for logits, labels in dpcd_batches()]
    for rank in (0, 1):
        found_weights, found_state = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found_weights, weights)
        torch.testing.assert_close(found_state, objective.state_dict())


def rank_wrapped_anew(rank, folder):
    """Save the weights after three steps, and after three of which the last two are a resumed process's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    draw = torch.Generator().manual_seed(rank)
    images, labels = torch.randn(4, 3, 32, 32, generator=draw), torch.randint(0, 10, (4,), generator=draw)
    for resumed in (False, True):
        made = small_run(distributed.World(rank, 3, torch.device("cpu")))
        for step in range(3):
            if resumed and step == 1:
                made.wrapped = made.wrap()
            made.step(images, labels, 0)
        torch.save(made.model.state_dict(), f"{folder}/{rank}_{resumed}.pt")
    dist.destroy_process_group()


def test_three_ranks_resume_to_the_bit(tmp_path):
    """DistributedDataParallel rearranges its buckets after a process's first step, which must not change any sum."""
    mp.spawn(rank_wrapped_anew, (str(tmp_path),), nprocs=3)
    expected, *found = (torch.load(tmp_path / f"{rank}_{resumed}.pt") for resumed in (False, True) for rank in range(3))
    for weights in found:
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def gloo_threads():
    """Return how many of this process's threads are the process group's."""
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())


def rank_stopped(rank, port):
    """Train a step under `distributed.run`, end it as a preempted run does, and check what is left of it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)

    def main(args, world):
        made = small_run(world)
        made.step(*two_halves()[rank], 0)
        assert gloo_threads() > 0
        sys.exit(143)

    with pytest.raises(SystemExit) as stop:
        distributed.run(lambda: SimpleNamespace(gpu_id=None), main)
    assert stop.value.code == 143
    assert not dist.is_initialized() and gloo_threads() == 0


@pytest.mark.skipif(sys.platform != "linux" or torch.__version__ < (2, 7), reason="reads the names of threads")
def test_the_process_groups_threads_end_with_the_run():
    """One that outlives the interpreter aborts the process now and then, after all is saved: status -6 for 0 or 143."""
    mp.spawn(rank_stopped, (free_port(),), nprocs=2)


def test_accumulated_parts_equal_the_large_batch():
    images, labels = (torch.cat(parts) for parts in zip(*two_halves(), strict=True))
    whole, parts = small_run(WORLD), small_run(WORLD, accumulate=3)
    for made in (whole, parts):
        made.step(images, labels, 0)
    for expected, found in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_sync_bn_keeps_weights_and_keys(monkeypatch):
    """Every BatchNorm takes its statistics over all processes; parameters, optimizer and checkpoint are the same."""
    monkeypatch.setattr(engine, "DistributedDataParallel", lambda model, **_: model)
    monkeypatch.setattr(torch.nn.Module, "register_comm_hook", lambda *_: None, raising=False)
    plain, synced = small_run(WORLD), small_run(WORLD._replace(size=2), flags=["--sync-bn"])
    norms = [m for m in synced.wrapped.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(type(norm) is torch.nn.SyncBatchNorm for norm in norms)
    assert synced.wrapped is synced.model and set(synced.model.state_dict()) == set(plain.model.state_dict())
    assert set(map(id, synced.optimizer.param_groups[0]["params"])) == set(map(id, synced.model.parameters()))


def test_sync_bn_of_one_process_or_on_the_cpu_is_told(monkeypatch, capsys):
    args = SimpleNamespace(gpu_id=None, sync_bn=True)
    assert distributed.setup(args) == WORLD and "--sync-bn has no effect in a single process" in capsys.readouterr().err
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    monkeypatch.setattr(os, "environ", os.environ | told)
    with pytest.raises(utils.UserError, match="--sync-bn needs GPUs"):
        distributed.setup(args)


def test_collectives_suit_the_device(capsys):
    """NCCL between GPUs unless gloo is asked for; between CPUs gloo, whatever is asked for, and a line where that is NCCL."""
    on_gpu = WORLD._replace(device=torch.device("cuda", 0))
    assert [distributed.backend(asked, on_gpu) for asked in (None, "nccl", "gloo")] == ["nccl", "nccl", "gloo"]
    assert [distributed.backend(asked, WORLD) for asked in (None, "gloo")] == ["gloo", "gloo"]
    assert capsys.readouterr().err == ""
    assert distributed.backend("nccl", WORLD) == "gloo" and "using gloo" in capsys.readouterr().err


@pytest.mark.parametrize("count", [20, 23])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_interrupted_epoch_visits_each_image_once(count, after):
    """Two processes up to step 2, then another number of them: every position once, but for the last batch's padding."""
    seen = []
    for step in range(batches.steps_of_epoch(count, 8, SimpleNamespace(size=1))):
        size = 2 if step < 2 else after
        seen += [p for rank in range(size) for p in batches.share_of_batch(step, 8, count, rank, size).tolist()]
    assert seen[:count] == list(range(count)) and len(seen) - count < max(after, 2)
    assert seen[count:] == list(range(len(seen) - count))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the checkpoint folder of three epochs of two processes, started by the published flags."""
    folder = tmp_path_factory.mktemp("published")
    command = baseline(folder, "--epochs", 3, "--milestones", 2, "--batch-size", 128)
    done = launch(published(command))
    assert "gloo" in done.communicate(timeout=150)[1] and done.returncode == 0
    return folder, command


def test_metrics_equal_a_hand_count(finished):
    folder = finished[0] / FOLDER
    model = models.create("resnet8", 10).eval()
    utils.load_weights(model, folder / "resnet8.pth.tar")
    test = datasets.load("digits", ".", False)
    images = batches.Normaliser(test.statistics, torch.device("cpu"))(test.images())
    with torch.no_grad():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(7), test.labels.split(7), strict=True))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert lines[-1]["test/top1"] == pytest.approx(100 * hits / len(test), abs=1e-4)


def test_torchrun_gives_the_same_weights(finished, tmp_path):
    command = [arg if arg != str(finished[0]) else str(tmp_path) for arg in finished[1]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = launch([*torchrun, *command])
    assert done.communicate(timeout=150) and done.returncode == 0
    found, expected = (utils.read_checkpoint(at / FOLDER / "resnet8.pth.tar")["net"] for at in (tmp_path, finished[0]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def on_machine(rank, port, style, command):
    """Return the command that starts one process on machine `rank` of two."""
    if style == "published":
        flags = ["--gpu", "0", "--world-size", "2", "--rank", str(rank), "--dist-url", f"tcp://127.0.0.1:{port}"]
        return [sys.executable, *command, "--multiprocessing-distributed", *flags]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run1"]
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting, *command]


@pytest.mark.parametrize("style", ["published", "torchrun"])
def test_two_machines_give_the_same_weights(finished, tmp_path, style):
    """Two launchers that meet at an address, here both on this machine, are the two processes of one launcher."""
    command, port = [arg if arg != str(finished[0]) else str(tmp_path) for arg in finished[1]], free_port()
    launchers = [launch(on_machine(rank, port, style, command)) for rank in (0, 1)]
    told = [launcher.communicate(timeout=150)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], told
    found, expected = (utils.read_checkpoint(at / FOLDER / "resnet8.pth.tar")["net"] for at in (tmp_path, finished[0]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_machines_that_do_not_see_one_checkpoint(tmp_path):
    """The second would begin anew while the first goes on, in one training."""
    at = [tmp_path / "first", tmp_path / "second"]
    run("train_baseline_cifar", *baseline(at[0], "--epochs", 1, "--milestones", 1, "--limit-batches", 2)[1:])
    port, flags = free_port(), ("--epochs", 2, "--milestones", 1, "--limit-batches", 2, "--resume")
    launchers = [launch(on_machine(rank, port, "published", baseline(at[rank], *flags))) for rank in (0, 1)]
    told = "".join(launcher.communicate(timeout=100)[1] for launcher in launchers)
    assert [launcher.returncode for launcher in launchers] == [2, 2]
    assert "not every process finds the same" in told
    assert utils.read_checkpoint(at[0] / FOLDER / "resnet8.pth.tar")["epoch"] == 1


def test_a_mistake_is_one_line_and_status_2(finished):
    done = launch(published(finished[1]))
    told = done.communicate(timeout=100)[1].splitlines()
    assert done.returncode == 2
    assert [line for line in told if "error" in line] == [line for line in told if "already holds a run" in line] != []
    assert sum("error" in line for line in told) == 1


def test_a_port_in_use_is_one_line_and_status_2(finished):
    """The published flags with the address of another run on this machine."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = published(finished[1])
        command[-1] = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        process = launch(command)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert [line for line in told.splitlines() if "error" in line] == [told.splitlines()[-1]]
    assert told.splitlines()[-1].endswith(": its port is taken")


def test_an_interrupted_launcher_tells_it_once(tmp_path):
    """Ctrl-C reaches the launcher and all processes."""
    command = published(baseline(tmp_path, "--epochs", 50, "--milestones", 40))
    process = launch(command, start_new_session=True)
    wait_for(process, "epoch 1/50")
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and told.count("interrupted") == 1 and "Traceback" not in told


def test_a_rank_without_any_image_takes_part_in_the_means(monkeypatch):
    """Where every image of its share is unreadable, the other's sums are the whole."""
    seen, unseen = (metrics.Totals(torch.device("cpu")) for _ in range(2))
    seen.add({"top1": torch.tensor(150.0)}, 2)
    monkeypatch.setattr(metrics, "gather_objects", lambda names: [["top1"], []])
    monkeypatch.setattr(metrics, "sum_over_ranks", lambda values: torch.tensor([150.0, 2.0]).to(values))
    assert seen.means() == unseen.means() == {"top1": 75.0}
    assert unseen.means(over_ranks=False) == {}


def test_one_process_downloads_before_the_others_look(monkeypatch):
    """The first runs the block and then lets the others through; they wait, and then run it."""
    events = []
    monkeypatch.setattr(distributed, "barrier", lambda: events.append("barrier"))
    for rank in (0, 1):
        with distributed.first_alone(WORLD._replace(rank=rank, size=2)):
            events.append(f"block {rank}")
    assert events == ["block 0", "barrier", "barrier", "block 1"]


def ranks_of(launcher):
    """Return rank -> process id of a launcher's processes."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # one that has ended
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found.update({int(v.removeprefix("RANK=")): int(pid) for v in variables if v.startswith("RANK=")})
    return found


def wait_for(process, text):
    """Read a process's output up to a line with `text`."""
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"ended with status {process.wait()}: {process.stderr.read()}")


def test_a_killed_rank_ends_all_and_the_run_resumes(tmp_path):
    command = baseline(tmp_path, "--epochs", 2, "--milestones", 1, "--batch-size", 16)
    killed = launch(published(command))
    wait_for(killed, "epoch 1/2")
    time.sleep(0.3)
    os.kill(ranks_of(killed)[1], signal.SIGKILL)
    began = time.monotonic()
    told = killed.communicate(timeout=60)[1]
    assert time.monotonic() - began < 60 and killed.returncode == 1 and "process 1 ended with status -9" in told
    run("train_baseline_cifar", *command[1:], "--resume")
    assert len((tmp_path / FOLDER / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process of its parent's end")
def test_processes_of_a_killed_launcher_save_and_end(tmp_path):
    command = baseline(tmp_path, "--epochs", 50, "--milestones", 40, "--batch-size", 16)
    killed = launch(published(command))
    wait_for(killed, "epoch 1/50")
    killed.kill()
    killed.communicate(timeout=60)  # ends when its processes, which share its output, have ended
    assert (tmp_path / FOLDER / "log.jsonl").read_text().count("\n") < 50
    with open(tmp_path / FOLDER / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError where a process holds it
    order = utils.read_checkpoint(tmp_path / FOLDER / "resnet8.pth.tar")["order"]
    assert order["step"] > 0 and order["epoch"] >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process of its parent's end")
def test_processes_whose_launcher_is_killed_before_they_know_it_end(tmp_path):
    """They are still importing; left alone they would wait for it, or take part in the next launch with its address."""
    killed = launch(published(baseline(tmp_path, "--epochs", 50, "--milestones", 40)))
    while len(ranks_of(killed)) < 2:
        assert killed.poll() is None
    killed.kill()
    told, _ = killed.communicate(timeout=60)  # ends when its processes, which share its output, have ended
    assert "epoch 1/50" not in told


def test_what_the_machine_lacks_is_one_line():
    """A data worker killed for memory and a full disk; of other errors the traceback is wanted."""
    worker = RuntimeError("DataLoader worker (pid(s) 1234) exited unexpectedly")
    assert "fewer --num-workers" in distributed.machines_fault(worker)[0]
    assert distributed.machines_fault(PermissionError(13, "Permission denied", "data")) == ("data: Permission denied", 2)
    raised = RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback: shape mismatch")
    for error in (RuntimeError("shape mismatch"), OSError(2, "no file"), raised):
        assert distributed.machines_fault(error) is None


def test_a_closed_output_is_one_line():
    """As of `train_x.py | head -1`; nothing fails once more when the interpreter ends."""
    code = """from types import SimpleNamespace as Args; import distributed
def main(args, world):
    while True: print("epoch", flush=True)
distributed.run(lambda: Args(gpu_id=None), main)"""
    process = launch([sys.executable, "-c", code])
    process.stdout.close()
    assert process.stderr.read().splitlines()[1:] == ["-c: error: cannot write: Broken pipe"]
    assert process.wait(timeout=60) == 2
    without = [sys.executable, "-c", code.replace("while True: ", "")]
    done = subprocess.run(f"{shlex.join(without)} >&-", shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.splitlines()) == (0, ["no GPU found: running on the CPU"])


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"RANK": "0"}, "RANK is set, so this is one process of several, but WORLD_SIZE is ''"),
        ({"RANK": "x"}, "but RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "but MASTER_ADDR is ''"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "but WORLD_SIZE is '2'"),
        ({"RANK": "0", "WORLD_SIZE": "0", "MASTER_PORT": "1"}, "but WORLD_SIZE is '0'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"}, "but MASTER_PORT is '99999'"),
    ],
)
def test_an_environment_that_describes_no_group(changed, said, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(utils.UserError, match=said):
        distributed.setup(SimpleNamespace(gpu_id=None))


@pytest.mark.parametrize("flags", [("--world-size", "2"), ("--rank", "1")])
def test_published_flags_without_the_one_that_starts_them(flags):
    args = train_teacher_cifar.parse_args(["--arch", "resnet8_aux", "--dataset", "digits", *flags])
    with pytest.raises(utils.UserError, match="need --multiprocessing-distributed"):
        distributed.setup(args)


def test_an_unknown_host_is_one_line():
    args = SimpleNamespace(rank=0, world_size=1, dist_url="tcp://nowhere.invalid:2222", gpu_id="0,1")
    with pytest.raises(utils.UserError, match="--dist-url tcp://nowhere.invalid:2222: nowhere.invalid: "):
        torchrun.relaunch(args, ["train.py"])


def test_torchrun_restarts_a_killed_rank_and_the_run_goes_on(tmp_path):
    """With --max-restarts the processes start again by themselves and resume from the last checkpoint."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    running = launch([sys.executable, *torchrun, *baseline(tmp_path, "--epochs", 3, "--milestones", 2, "--batch-size", 32)])
    wait_for(running, "epoch 1/3")
    os.kill(ranks_of(running)[1], signal.SIGKILL)
    wait_for(running, "resuming at epoch 2, step 0")
    assert running.communicate(timeout=100) and running.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / FOLDER / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]


def test_two_machines_restart_together(tmp_path):
    """Only the machine whose process was killed counts a restart; both start again, meet and resume."""
    command, port = baseline(tmp_path, "--epochs", 3, "--milestones", 2, "--batch-size", 32), free_port()
    machines = [on_machine(rank, port, "torchrun", ["--max-restarts", "2", *command]) for rank in (0, 1)]
    launchers = [launch(machine) for machine in machines]
    log, patience = tmp_path / FOLDER / "log.jsonl", time.monotonic() + 100
    while not (log.exists() and log.read_text().count("\n")):
        assert time.monotonic() < patience and all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.05)
    os.kill({rank: pid for launcher in launchers for rank, pid in ranks_of(launcher).items()}[1], signal.SIGKILL)
    told = [launcher.communicate(timeout=150) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], told
    assert "resuming at epoch" in "".join(output for output, _ in told)
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2, 3]


def test_a_preempted_run_goes_on_with_one_process(tmp_path, monkeypatch):
    command = baseline(tmp_path, "--epochs", 1, "--milestones", 1, "--batch-size", 8)
    stopped = launch(published(command))
    wait_for(stopped, "steps an epoch")
    stopped.send_signal(signal.SIGUSR1)
    stopped.communicate(timeout=60)
    assert stopped.returncode == 143
    step = utils.read_checkpoint(tmp_path / FOLDER / "resnet8.pth.tar")["order"]["step"]
    assert 0 < step < 180
    seen, share = [], batches.share_of_batch

    def spy(*args):
        seen.append(share(*args))
        return seen[-1]

    monkeypatch.setattr(batches, "share_of_batch", spy)
    run("train_baseline_cifar", *command[1:], "--resume")
    assert torch.cat(seen).tolist() == list(range(8 * step, 1437))
    record = json.loads((tmp_path / FOLDER / "log.jsonl").read_text())
    assert record["epoch"] == 1 and record["peak_memory_mib"] > 0
