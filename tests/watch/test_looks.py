"""Looks give way to a stop, and what they are held against is found before a run is made."""

import pytest

from EqM.run import distributed
from EqM.watch.preview import Preview
from helpers import train_args


@pytest.fixture
def train(run_script, image_folder, tmp_path):
    """train(*flags): one run of two steps that looks after each; its outcome, with .folder."""

    def run(*flags):
        words = train_args(image_folder, tmp_path / "runs", "--epochs", 50, "--sample-every", 1, *flags)
        result = run_script("train", *words)
        result.folder = next(iter((tmp_path / "runs").glob("*-EqM-*")), None)
        return result

    return run


def test_a_stop_that_was_asked_for_comes_before_a_look(train, monkeypatch):
    monkeypatch.setattr(distributed.StopRequest, "agreed", lambda self: True)
    result = train()
    assert result.code == 0 and "Stopping after step 1" in result.out
    assert (result.folder / "checkpoints/0000001.pt").exists() and not (result.folder / "samples").exists()


def test_a_stop_in_the_middle_of_a_sheet_leaves_it_out_and_saves_the_step(train, monkeypatch):
    begun, stops = [], []
    take = Preview.__call__

    def stopped_after_two_updates(self, step):
        asked = self.is_stopped
        self.is_stopped = lambda: begun.append(step) or (len(begun) > 2 and asked())
        stops[0].asked = True
        take(self, step)

    monkeypatch.setattr(Preview, "__call__", stopped_after_two_updates)
    make = distributed.StopRequest.__init__
    monkeypatch.setattr(
        distributed.StopRequest, "__init__", lambda self, ranks: (make(self, ranks), stops.append(self))[0]
    )
    result = train()
    assert result.code == 0 and "Stopping after step 2" in result.out and len(begun) < 10
    assert (result.folder / "checkpoints/0000002.pt").exists() and not (result.folder / "samples").exists()


def test_held_out_clips_may_be_labelled_by_a_csv(run_script, clip_folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    rows = ["video_name,tag"]
    for path in clip_folder.rglob("*.mp4"):
        (flat / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
        rows.append(f"{path.parent.name}-{path.name},{path.parent.name}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    words = train_args(clip_folder, tmp_path / "runs", "--video", "--clip-len", 4, "--val-every", 1)
    result = run_script("train", *words, "--val-path", flat, "--val-csv", tmp_path / "labels.csv")
    assert result.code == 0 and "EMA Val Loss: " in result.out, result.err
    alone = run_script("train", *words, "--val-csv", tmp_path / "labels.csv")
    assert alone.code == 2 and "give both" in alone.err
