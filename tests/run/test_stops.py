"""Stops, as launchers and people send them: the real commands in processes of their own.

EQM_STOPS=all takes the 40 stops of the README's table instead of three of them.
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from EqM import cli
from EqM.data import loader
from EqM.run import checkpoint, stops
from EqM.run.errors import UserError
from helpers import REPO, train_args

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
WAYS = ("alone", "every", "twice")  # to the launcher; to every process; to every process, and again at once
RUNS = [(ranks, workers, way) for ranks, workers in ((1, 0), (2, 2)) for way in WAYS]
RUNS += [(None, 2, way) for way in WAYS] + [(None, 0, "alone")]  # without torchrun
ALL = [(name, *run) for name in SIGNALS for run in RUNS]
FEW = [("SIGTERM", 2, 2, "twice"), ("SIGUSR1", 1, 0, "alone"), ("SIGHUP", None, 2, "every")]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]


def start(ranks, arguments):
    """EqM/train.py under torchrun with so many ranks, or without it for None."""
    launcher = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.Popen(
        [sys.executable, *launcher, REPO / "EqM/train.py", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_step(process, step):
    """Read what a run says until it is past a step."""
    for line in process.stdout:
        found = re.search(r"\(step=(\d+)\)", line)
        if found and int(found[1]) >= step:
            return
    raise AssertionError(process.communicate()[1])


def descendants(pid):
    """Process ids below one, parents first."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def send(number, pids):
    for pid in pids:
        with suppress(ProcessLookupError):  # it ended by the first
            os.kill(pid, number)


def assert_gone(pids, seconds):
    """A worker whose trainer was killed looks for its parent every few seconds."""
    end = time.monotonic() + seconds
    alive = pids
    while alive and time.monotonic() < end:
        alive = [pid for pid in alive if Path(f"/proc/{pid}").exists()]
        time.sleep(0.05)
    assert not alive


def assert_no_traceback_of_ours(err):
    """torchrun writes tracebacks of its own when it is stopped."""
    assert "EqM/" not in "".join(re.findall(r'^  File "(.*)"', err, re.M)), err
    assert "DataLoader worker" not in err and "Exception ignored" not in err, err


@pytest.mark.parametrize(("name", "ranks", "workers", "way"), ALL if os.environ.get("EQM_STOPS") == "all" else FEW)
def test_a_stop_saves_the_step_in_hand(image_folder, tmp_path, name, ranks, workers, way):
    number = getattr(signal, name)
    flags = ["--max-steps", 10**6, "--epochs", 10**6, "--log-every", 1, "--num-workers", workers]
    process = start(ranks, train_args(image_folder, tmp_path, *flags))
    wait_for_step(process, 5)
    below = descendants(process.pid)
    assert len(below) == (ranks or 0) + (ranks or 1) * workers
    send(number, [process.pid, *(below if way != "alone" else [])])
    if way == "twice":
        time.sleep(0.3)
        send(number, [process.pid, *below])
    out, err = process.communicate(timeout=60)

    (said,) = re.findall(r"Stopping after step (\d+), as the signal asked", out)
    (saved,) = tmp_path.glob("*/checkpoints/*.pt")
    assert checkpoint.load(saved)["step"] == int(said) >= 5 and "Done" in out
    # torchrun calls every stop of its own a failure: 1, or -6 where a second SIGINT meets it at its end.
    assert process.returncode in ((1, -signal.SIGABRT) if ranks else (0,))
    assert_no_traceback_of_ours(err)
    assert_gone(below, seconds=1)


def test_a_worker_that_is_killed_is_named_in_one_line_and_the_checkpoint_stays(image_folder, tmp_path):
    flags = ["--max-steps", 10**6, "--epochs", 10**6, "--log-every", 1, "--ckpt-every", 5, "--num-workers", 2]
    process = start(None, train_args(image_folder, tmp_path, *flags, "--keep-checkpoints", 2))
    wait_for_step(process, 7)
    workers = descendants(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    told = [line for line in err.splitlines() if "error: " in line]
    assert process.returncode == 2 and len(told) == 1 and "Traceback" not in err, err
    assert f"pid {workers[0]}) is killed by signal: Killed" in told[0] and "fewer --num-workers" in told[0]
    assert checkpoint.load(max(tmp_path.glob("*/checkpoints/*.pt")))["step"] >= 5
    assert_gone(workers, seconds=1)


class Squares(torch.utils.data.Dataset):
    """Takes keys as the loader gives them; a negative one keeps its worker busy until it is killed."""

    def __len__(self):
        return 8

    def __getitem__(self, key):
        if key[1] < 0:
            time.sleep(60)
        return torch.tensor(key[1] ** 2), 0, -1


def squares(*numbers):
    """A stream of two workers over batches of one number each."""
    return loader.read(Squares(), [[(0, number)] for number in numbers], 2, False)


def workers_below():
    return descendants(os.getpid())


def test_workers_end_with_their_stream_even_busy_ones():
    before = set(workers_below())
    streams = {"read to its end": squares(1, 2, 3), "closed": squares(1, 2, 3, 4), "busy": squares(1, 2, 3, -1, -1)}
    for how, stream in streams.items():
        assert next(stream)[0].tolist() == [1]
        assert len(set(workers_below()) - before) == 2, how
        if how == "read to its end":
            assert [batch[0].item() for batch in stream] == [4, 9]
        start = time.monotonic()
        stream.close()
        assert set(workers_below()) <= before and time.monotonic() - start < 4, how


def test_a_worker_that_dies_is_told_at_the_next_batch_and_nowhere_else():
    before = set(workers_below())
    stream = squares(*range(8))
    next(stream)
    for worker in set(workers_below()) - before:
        os.kill(worker, signal.SIGKILL)
    time.sleep(0.5)  # a step, in which PyTorch's handler would raise
    with pytest.raises(UserError, match=r"pid \d+\) is killed by signal: Killed.*fewer --num-workers"):
        list(stream)
    assert [batch[0].item() for batch in squares(1, 2, 3)] == [1, 4, 9], "the next stream is none the worse"


LOADER = """
import sys, test_stops
stream = test_stops.squares(1, 2, {busy})
held = [stream]  # in a cycle, as the frames of an exception are: nothing closes it before the interpreter ends
held.append(held)
next(stream)
print(*test_stops.workers_below(), flush=True)
{end}
"""


def test_workers_end_with_their_trainer_and_say_nothing():
    """At the end of the interpreter, where busy ones would be waited for; with EQM_STOPS=all also after kill -9.

    After a kill PyTorch's watchdog ends them, as a rule within seconds; once in some fifteen runs it took a minute.
    """
    ends = {0: LOADER.format(busy=-1, end="")}
    if os.environ.get("EQM_STOPS") == "all":
        ends[-9] = LOADER.format(busy=3, end="import os; os.kill(os.getpid(), 9)")
    path = os.pathsep.join([str(REPO), str(REPO / "tests"), str(REPO / "tests/run")])
    trainers = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
        )
        for script in ends.values()
    ]  # fmt: skip
    for trainer, status in zip(trainers, ends, strict=True):
        out, err = trainer.communicate(timeout=60)
        workers = [int(pid) for pid in out.split()]
        assert trainer.returncode == status and len(workers) == 2 and err == "", err
        assert_gone(workers, seconds=1 if status == 0 else 15)


@pytest.mark.parametrize("name", SIGNALS)
def test_where_nothing_hears_stops_a_signal_is_one_line_and_its_status(capfd, name):
    """Sampling, encoding, and training before its first step."""
    number = getattr(signal, name)
    before = [signal.getsignal(each) for each in stops.SIGNALS]

    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), number)  # the same stop, passed on by a launcher

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    err = capfd.readouterr().err
    assert end.value.code == 128 + number and err.count("\n") == 1, err
    assert f": interrupted by {name}: run the same command again to go on" in err
    assert before == [signal.getsignal(each) for each in stops.SIGNALS]


@pytest.mark.parametrize("command", ["train", "score"])
def test_a_stop_while_a_command_imports_is_one_line(tmp_path, command):
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    words = [sys.executable, REPO / "EqM" / f"{command}.py"]
    with subprocess.Popen(
        words, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        err = process.communicate()[1]
    assert process.returncode == 130
    assert err == f"{command}.py: interrupted by SIGINT: run the same command again\n"


HEARS = """
import ctypes, time
from EqM.run import stops
stops.GRACE = 0.4
stops.handle(lambda number: print("heard", number, flush=True))
print("ready", flush=True)
"""
# Where a library waits for what never comes, the main thread hears no signal.
STUCK = "lock = ctypes.create_string_buffer(256); [ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in range(2)]"


def hears(wait, *before):
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HEARS + wait],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    return process


@pytest.mark.parametrize("wait", ["time.sleep(60)", STUCK])
def test_a_second_signal_that_comes_later_ends_a_run_at_once(wait):
    process = hears(wait)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert process.poll() is None, "a repeat within the grace is the same stop"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130 and err == "-c: stopped at once, by a second SIGINT\n", err
    assert out == ("" if wait == STUCK else "heard 15\n")


def test_nohup_stays_in_force():
    process = hears("time.sleep(60)", "nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.kill()
    assert process.communicate()[0] == "heard 15\n"


@pytest.mark.parametrize(
    ("srun", "status", "queued"),
    [("trap 'exit 1' USR1; kill -USR1 $PPID; sleep 5 & wait", 0, "requeue 7\n"), ("exit 0", 0, ""), ("exit 2", 2, "")],
)
def test_the_slurm_script_queues_again_after_a_warning_alone(tmp_path, srun, status, queued):
    """srun and scontrol are stand-ins."""
    for name, body in {"srun": srun, "scontrol": f'[ "$1" = show ] && echo node1 || echo "$@" >> {tmp_path}/q'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_GPUS_PER_NODE": "1", "SLURM_JOB_NODELIST": "node1"}
    result = subprocess.run(
        ["bash", REPO / "configs/slurm.sbatch"], timeout=20,
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert result.returncode == status
    assert "".join(path.read_text() for path in tmp_path.glob("q")) == queued
