"""The stream of batches, and what is told of bad files, on one rank and on two."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from EqM.data import loader
from EqM.run.errors import UserError
from helpers import PYTHONPATH, labelled_files


def test_a_class_without_a_good_file_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/a.png").write_text("nothing")
    with pytest.raises(UserError, match="no file of class 'cat' can be read"):
        next(loader.read(labelled_files(tmp_path), [[(0, 0)]], num_workers=0, pin_memory=False))


def test_bad_files_are_told_once_and_too_many_stop_the_run(image_folder):
    files, told = labelled_files(image_folder), []
    bad = loader.BadFiles(files, 0.4, told.append)
    bad.note(torch.tensor([-1, 2, 2]))
    bad.note(torch.tensor([2, 4, -1]))
    assert len(told) == 2 and files.path(2) in told[0]
    with pytest.raises(UserError, match="3 of 6 files do not decode.*--max-bad-fraction 0.4.*dog"):
        bad.note(torch.tensor([5]))


def stream(rank=0, world_size=1, batch_size=4, length=10, seed=0, first_batch=0):
    return iter(loader.Stream(length, batch_size, rank, world_size, seed, first_batch))


def test_every_epoch_is_a_new_permutation_without_a_seam():
    keys = [key for batch in itertools.islice(stream(), 10) for key in batch]
    epochs = [[index for epoch, index in keys if epoch == n] for n in range(4)]
    assert [epoch for epoch, _ in keys] == sorted(epoch for epoch, _ in keys)
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 4


@pytest.mark.parametrize("first", [1, 3, 7])
def test_a_stream_that_starts_later_is_the_rest_of_one_that_started_at_0(first):
    whole = list(itertools.islice(stream(), 12))
    assert list(itertools.islice(stream(first_batch=first), 12 - first)) == whole[first:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_that_one_rank_would_have(world_size):
    alone = itertools.islice(stream(batch_size=8), 5)
    ranks = [stream(rank, world_size, 8 // world_size) for rank in range(world_size)]
    together = [sum((next(rank) for rank in ranks), []) for _ in range(5)]
    assert together == list(alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(image_folder, workers):
    state = torch.get_rng_state()
    batches = itertools.islice(loader.read(labelled_files(image_folder), stream(length=6), workers, False), 4)
    pixels, labels, bad = (torch.cat(parts) for parts in zip(*batches, strict=True))
    files = labelled_files(image_folder)
    expected = [files[key] for batch in itertools.islice(stream(length=6), 4) for key in batch]
    assert torch.equal(pixels, torch.stack([item[0] for item in expected]))
    assert labels.tolist() == [item[1] for item in expected] and bad.eq(-1).all()
    assert torch.equal(torch.get_rng_state(), state), "reading draws nothing from the step's own numbers"


class Dies(torch.utils.data.Dataset):
    def __getitem__(self, key):
        os._exit(3)


def test_a_worker_that_dies_is_told():
    with pytest.raises(UserError, match="a data worker died.*--num-workers"):
        next(loader.read(Dies(), [[(0, 0)]], num_workers=1, pin_memory=False))


def test_a_file_that_may_not_be_opened_is_told_with_the_reason(image_folder, monkeypatch):
    files, told = labelled_files(image_folder), []

    def refuse(path, *more):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)
    loader.BadFiles(files, 0.4, told.append).note(torch.tensor([2]))
    assert told == [f"{files.path(2)} cannot be opened (Permission denied); another file of its class stands in"]


RANK_THAT_FINDS = """
import json, sys
import torch, torch.distributed as dist
from EqM.data import loader
from EqM.run.errors import UserError
from helpers import labelled_files

rank, store, folder, batches = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
told, error = [], None
bad_files = loader.BadFiles(labelled_files(folder), 0.5, told.append)
for batch in batches[rank]:
    try:
        bad_files.note(torch.tensor(batch))
    except UserError as raised:
        error = str(raised)
    dist.barrier()
bad_files.agree()
print(json.dumps([told, error]))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("batches", "found", "stopped"),
    [
        ([[[1, -1], [-1, 1]], [[-1, -1], [2, 1]]], [1, 2], []),  # the same file twice counts once
        ([[[0, 1], [-1, -1]], [[-1, 3], [4, -1]]], [0, 1, 3, 4], [1]),  # 2 and 2 of 6 are more than half
    ],
)
def test_bad_files_are_counted_over_ranks_and_named_by_the_first(tmp_path, image_folder, batches, found, stopped):
    command = [sys.executable, "-c", RANK_THAT_FINDS]
    given = [str(tmp_path / "store"), str(image_folder), json.dumps(batches)]
    paths = {**os.environ, "PYTHONPATH": PYTHONPATH}
    ranks = [
        subprocess.Popen([*command, str(rank), *given], stdout=subprocess.PIPE, text=True, env=paths) for rank in (0, 1)
    ]
    results = [json.loads(process.communicate(timeout=60)[0]) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    files = labelled_files(image_folder)
    assert sorted(line.split(" does not")[0] for line in results[0][0]) == [files.path(index) for index in found]
    assert results[1][0] == [], "the main rank tells"
    assert [rank for rank in (0, 1) if results[rank][1]] == stopped
    assert not stopped or "4 of 6 files do not decode" in results[1][1]


def test_a_name_that_no_terminal_takes_is_told(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff\n.png", "wb"):
        pass
    files, told = labelled_files(tmp_path), []
    loader.BadFiles(files, 1, told.append).note(torch.tensor([0]))
    assert told[0].endswith(r"caf\udce9/\udcff\n.png does not decode; another file of its class stands in")
    with pytest.raises(UserError, match="no file of class .*caf.*can be read") as raised:
        next(loader.read(files, [[(0, 0)]], num_workers=0, pin_memory=False))
    (told[0] + str(raised.value)).encode("ascii")


class Broken(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, key):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("a bug of ours"), ValueError("another bug")])
def test_a_bug_in_a_dataset_keeps_its_traceback(workers, error):
    with pytest.raises(type(error), match="bug"):
        next(loader.read(Broken(error), [[(0, 0)]], workers, False))
