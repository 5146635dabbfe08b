"""What a run tells: the log line, metrics.csv, run folders, meters."""

import csv
import math
import os
import re
import sys
import threading
import types
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from EqM.run import log as run_log
from EqM.run.errors import UserError

CPU = torch.device("cpu")


def args(root, **more):
    settings = {"path_type": "Linear", "prediction": "velocity", "loss_weight": "None", "wandb": False}
    return Namespace(**{"results_dir": root, "model": "EqM-S/4", "tensorboard": False, **settings, **more})


def test_run_folders_are_numbered_and_named_as_published(tmp_path):
    first = run_log.new_run_folder(args(tmp_path))
    assert first.name == "000-EqM-S-4-Linear-velocity-None" and (first / "checkpoints").is_dir()
    (tmp_path / "026-EqM-other").mkdir()
    (tmp_path / "README.md").touch()
    assert run_log.new_run_folder(args(tmp_path)).name.startswith("027-")


def test_runs_that_start_at_the_same_moment_get_numbers_of_their_own(tmp_path):
    """Of one kind or of several, which used to share a number."""
    for kinds in (["EqM-S/4"] * 40, [f"EqM-S/{i}" for i in range(40)]):
        root, ready = tmp_path / kinds[-1].replace("/", "-"), threading.Barrier(40)

        def start(kind, root=root, ready=ready):
            ready.wait()
            return run_log.new_run_folder(args(root, model=kind))

        with ThreadPoolExecutor(40) as pool:
            folders = list(pool.map(start, kinds))
        assert len({folder.name.split("-")[0] for folder in folders}) == 40
        assert sorted(root.iterdir()) == sorted(folders) and all((f / "checkpoints").is_dir() for f in folders)


def test_a_results_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--results-dir .* cannot be written"):
        run_log.new_run_folder(args(tmp_path / "file"))


def test_the_log_line_keeps_its_published_form(tmp_path):
    log = run_log.RunLog(tmp_path, args(tmp_path))
    log.step(100, {"Train Loss": 0.12341, "Train Steps/Sec": 1.2345, "Samples": 25600})
    line = re.sub(r"^\[.+?\] ", "", (tmp_path / "log.txt").read_text())
    assert line == "(step=0000100) Train Loss: 0.1234, Train Steps/Sec: 1.23, Samples: 25600\n"


def test_a_name_that_is_not_utf_8_can_be_logged(tmp_path):
    run_log.RunLog(tmp_path, args(tmp_path)).info(f"Going on from {os.fsdecode(b'caf' + bytes([0xE9]))}")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("Going on from caf\\udce9\n")


def test_metrics_have_one_header_and_a_row_a_log_also_across_runs(tmp_path):
    for step in (100, 200):
        run_log.RunLog(tmp_path, args(tmp_path)).step(step, {"Train Loss": step / 1000, "Scale": 65536.0})
    with open(tmp_path / "metrics.csv") as file:
        assert list(csv.DictReader(file)) == [
            {"step": "100", "Train Loss": "0.1", "Scale": "65536.0"},
            {"step": "200", "Train Loss": "0.2", "Scale": "65536.0"},
        ]


def test_other_ranks_keep_silent(tmp_path, capsys):
    log = run_log.RunLog(None, args(tmp_path, wandb=True))
    log.info("hello")
    log.step(1, {"Train Loss": 0.0})
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_told(tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=f"--{tracker} needs the {tracker} package: pip install {tracker}"):
        run_log.RunLog(tmp_path, args(tmp_path, **{tracker: True}))
    with pytest.raises(UserError, match=f"--{tracker} needs the {tracker} package: pip install {tracker}"):
        run_log.check_trackers(args(tmp_path, **{tracker: True}))
    assert run_log.check_trackers(args(tmp_path)) is None


def test_wandb_gets_every_figure_and_no_environment_variable(tmp_path, monkeypatch):
    seen = []
    fake = types.SimpleNamespace(init=lambda **settings: seen.append(settings), log=lambda f, s: seen.append((f, s)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = run_log.RunLog(tmp_path, args(tmp_path, wandb=True))
    log.step(5, {"Train Loss": 0.5})
    assert seen[0]["config"]["model"] == "EqM-S/4"
    assert seen[1] == ({"Train Loss": 0.5}, 5)


def test_a_run_folder_is_one_wandb_run_however_often_it_is_resumed(tmp_path, monkeypatch):
    seen = []
    fake = types.SimpleNamespace(init=lambda **settings: seen.append(settings), log=None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        run_log.RunLog(tmp_path / name, args(tmp_path, wandb=True))
    first, again, other = (settings["id"] for settings in seen)
    assert first == again != other and all(settings["resume"] == "allow" for settings in seen)


def test_wandb_that_is_not_logged_in_is_told_before_anything_is_made(tmp_path, monkeypatch):
    def init(**settings):
        raise fake.errors.Error("No API key configured.")

    fake = types.SimpleNamespace(
        init=init, login=init, errors=types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match="No API key.*wandb login"):
        run_log.RunLog(tmp_path, args(tmp_path, wandb=True))
    assert not (tmp_path / "wandb-id.txt").exists()
    with pytest.raises(UserError, match="No API key.*wandb login"):
        run_log.check_trackers(args(tmp_path, wandb=True))


def test_curves_are_drawn_from_all_that_was_logged(tmp_path):
    log = run_log.RunLog(tmp_path, args(tmp_path))
    log.draw()
    assert not (tmp_path / "loss.png").exists(), "nothing was logged"
    pictures = []
    for step, loss in [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.0)]:  # the last as after a resume
        log.step(step, {"Train Loss": loss, "Grad Norm": 1.0})
        log.draw()
        pictures.append(np.asarray(Image.open(tmp_path / "loss.png")))
    assert not np.array_equal(pictures[1], pictures[2])
    assert np.array_equal(pictures[2], pictures[3])
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("4,0.")  # cut by a kill
    log.draw()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "loss.png")), pictures[3])


def test_a_meter_averages_by_weight_and_starts_anew():
    meter = run_log.Meter(CPU)
    for value, weight in [(1.0, 1.0), (5.0, 1.0), (math.inf, 0.0), (math.nan, 0.0)]:
        meter.add("loss", torch.tensor(value), torch.tensor(weight))
    assert meter.means() == {"loss": 3.0}
    meter.add("loss", torch.tensor(math.inf), torch.tensor(0.0))
    assert math.isnan(meter.means()["loss"])


def test_a_meter_goes_on_where_it_was_saved():
    meter, resumed, whole = (run_log.Meter(CPU) for _ in range(3))
    for value in (0.1, 0.2, 0.7):
        whole.add("loss", torch.tensor(value))
    for value in (0.1, 0.2):
        meter.add("loss", torch.tensor(value))
    resumed.load_state_dict(meter.state_dict(), rank=0)
    resumed.add("loss", torch.tensor(0.7))
    assert resumed.means() == whole.means()


def test_the_clock_counts_since_the_last_question(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now[0])
    clock = run_log.Clock()
    for _ in range(6):
        clock.tick()
    now[0] = 2.0
    assert clock.rate() == 3.0
    clock.tick()
    now[0] = 4.0
    assert clock.rate() == 0.5
