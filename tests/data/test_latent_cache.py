"""The latent cache: what it holds, what it refuses, and what signals, full disks and changed files leave of it."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from EqM.data import autoencoder as latents
from EqM.data import files as data
from EqM.data import latent_cache, loader
from EqM.engine.precision import Precision
from EqM.run import resume, seeds
from EqM.run.errors import UserError
from helpers import REPO


@pytest.fixture
def encode(run_script, clip_folder, tiny_vae, tmp_path):
    """encode(*flags): extract_latents.py on the small clips; the cache folder and the script's outcome."""

    def run(*flags):
        out = tmp_path / "cache"
        return out, run_script(
            "extract_latents", "--data-path", clip_folder, "--out", out, "--vae", tiny_vae, "--image-size", 16,
            "--video", "--clip-len", 2, "--num-workers", 0, "--device", "cpu", "--batch-size", 3, *flags,
        )  # fmt: skip

    return run


@pytest.fixture
def clips(clip_folder, tmp_path):
    """A copy of the small clips, to be changed."""
    return shutil.copytree(clip_folder, tmp_path / "clips")


def cache_args(tiny_vae, **more):
    settings = {"vae": tiny_vae, "image_size": 16, "video": True, "clip_len": 2, "flip": True, "global_seed": 0}
    return Namespace(**{**settings, **more})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}


def told(result):
    assert result.code == 0, result.err
    return json.loads(result.out.strip().splitlines()[-1])


def assert_one_line(result, *words):
    assert result.code == 2 and result.err.count("\n") == 1 and "Traceback" not in result.err, result.err
    assert all(word in result.err for word in words), result.err


COUNT, SHARD_ITEMS, SHAPE = 10, 4, (2, 2, 4, 2, 4, 4)


@pytest.fixture
def lay_out(tiny_vae, tmp_path, monkeypatch):
    """lay_out(): a cache of COUNT clips, 4 to a shard, without encoding; (Layout, indices left, its moments)."""
    monkeypatch.setattr(latent_cache, "SHARDS", 3)
    files = np.zeros(COUNT, [("name", "S4"), ("size", "<i8"), ("time", "<i8"), ("label", "<i8")])
    files["name"], files["label"] = np.arange(COUNT), np.arange(COUNT) % 2
    meta = {"vae": tiny_vae, "image_size": 16, "video": True, "clip_len": 2, "class_names": ["a", "b"]}
    moments = torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(0)).half()

    def run(**more):
        layout, left, _ = latent_cache.create(tmp_path / "cache", meta | more, files, SHAPE)
        return layout, [int(index) for shard in left for index in shard], moments

    return run


@pytest.fixture
def whole(lay_out):
    """A folder of such a cache that is finished."""
    layout, left, moments = lay_out()
    with latent_cache.Writer(layout) as writer:
        writer.write(left, moments)
    assert lay_out()[1] == []
    return layout.folder


def make_old(folder):
    """Turn a cache into one as an earlier version wrote it."""
    meta = json.loads((folder / "cache.json").read_text())
    shards = sorted(folder.glob("[0-9]*.npy"))
    np.save(folder / "moments.npy", np.concatenate([np.load(path) for path in shards]))
    np.save(folder / "labels.npy", np.load(folder / "files.npy")["label"])
    np.save(folder / "done.npy", np.ones(meta["files"], bool))
    for path in [*shards, folder / "files.npy"]:
        path.unlink()
    old = {name: value for name, value in meta.items() if name not in ("item_shape", "shard_items", "flip")}
    (folder / "cache.json").write_text(json.dumps(old))


def test_cache_holds_the_posteriors_of_plain_and_mirrored_files(encode, clip_folder, tiny_vae):
    folder, result = encode()
    assert told(result)["encoded"] == 4
    cache = latent_cache.LatentCache(folder, cache_args(tiny_vae))
    paths, labels, names = data.find_files(clip_folder, clips=True)
    files = data.LabelledFiles(paths, labels, names, 16, clip_len=2, flip=True)
    vae = latents.load(tiny_vae, Precision("fp32", torch.device("cpu"), "test"))
    assert (cache.class_names, list(cache.labels)) == (["jump", "run"], [0, 0, 1, 1])
    assert {path.name for path in folder.iterdir()} - {"run.lock"} == {
        "cache.json",
        "files.npy",
        *(f"00000{i}.npy" for i in range(4)),
    }
    for epoch in range(3):
        for index in range(4):
            moments, label, bad = cache[epoch, index]
            clip, expected_label, _ = files[epoch, index]
            expected = vae.posterior(latents.to_pixels(clip[None]))[0]
            assert (label, bad) == (expected_label, -1) and moments.dtype == torch.float16
            torch.testing.assert_close(moments.float(), expected, rtol=2e-3, atol=2e-4)


def test_bytes_per_item_are_those_of_the_arrays(encode):
    folder, result = encode("--no-flip")
    assert told(result)["items"] == 4
    assert sum(np.load(path).nbytes for path in folder.glob("0*.npy")) == 4 * 1 * 2 * (4 * 2 * 4 * 4) * 2
    assert told(result)["bytes_per_item"] == sum(path.stat().st_size for path in folder.iterdir()) // 4


def test_items_are_found_across_shards_in_whatever_order_they_came(lay_out, tiny_vae):
    layout, left, moments = lay_out()
    assert [len(layout.items(shard)) for shard in layout.shards] == [4, 4, 2] and left == list(range(COUNT))
    with latent_cache.Writer(layout) as writer:
        for batch in ([9, 0, 5], [1, 8, 2, 3, 4], [6, 7]):
            writer.write(batch, moments[batch])
    cache = latent_cache.LatentCache(layout.folder, cache_args(tiny_vae, flip=False))
    assert len(cache) == COUNT and not list(layout.folder.glob("*.part.npy"))
    for index in range(COUNT):
        item, label, _ = cache[0, index]
        assert torch.equal(item, moments[index, 0]) and label == index % 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_its_items_whatever_shards_they_lie_in(whole, lay_out, tiny_vae, workers):
    cache = latent_cache.LatentCache(whole, cache_args(tiny_vae, global_seed=3))
    moments = lay_out()[2]
    keys = [[(epoch, index) for index in (9, 0, 5, 4, 0)] for epoch in range(4)]
    copies = set()
    for batch, (items, labels, bad) in zip(keys, loader.read(cache, keys, workers, False), strict=True):
        flips = [int(seeds.coin(3, *key)) for key in batch]
        expected = [moments[index, flip] for (_, index), flip in zip(batch, flips, strict=True)]
        assert torch.equal(items, torch.stack(expected)) and items.dtype == torch.float16
        assert labels.tolist() == [1, 0, 1, 0, 0] and bad.tolist() == [-1] * 5
        assert labels.dtype == bad.dtype == torch.int64
        copies |= set(flips)
    assert copies == {0, 1}


def test_shards_are_neither_too_few_for_many_ranks_nor_too_many_to_be_open_at_once(tmp_path, monkeypatch):
    meta = {"vae": "ema", "image_size": 16, "video": False, "clip_len": 2, "class_names": ["a"]}
    for count, shard_bytes, shards in [(3, 1 << 20, 3), (6400, 1 << 20, 64), (6400, 50 * 16, 128), (6400, 1, 493)]:
        monkeypatch.setattr(latent_cache, "SHARD_BYTES", shard_bytes)
        files = np.zeros(count, [("name", "S4"), ("size", "<i8"), ("time", "<i8"), ("label", "<i8")])
        layout, left, _ = latent_cache.create(tmp_path / f"{count}-{shard_bytes}", meta, files, (1, 2, 4, 1, 1))
        assert len(layout.shards) == len(left) == shards
        assert np.array_equal(np.concatenate(left), np.arange(count))


def test_a_worker_maps_the_files_itself(whole, tiny_vae):
    cache = latent_cache.LatentCache(whole, cache_args(tiny_vae))
    sent = pickle.dumps(cache)
    assert len(sent) < 3000, "the arrays themselves do not travel"
    assert torch.equal(pickle.loads(sent)[0, 2][0], cache[0, 2][0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_what_was_finished_before_an_end_of_any_kind_is_kept_and_gone_on_from(lay_out, tiny_vae, error):
    layout, left, moments = lay_out()
    with pytest.raises(error), latent_cache.Writer(layout) as writer:
        writer.write(left[:3], moments[:3])
        writer.write(left[3:6], moments[3:6])
        raise error
    with pytest.raises(UserError, match="unfinished, 6 of 10 items: run extract_latents.py again"):
        latent_cache.LatentCache(layout.folder, cache_args(tiny_vae))
    before = contents(layout.folder)
    layout, left, _ = lay_out()
    assert left == [6, 7, 8, 9] and contents(layout.folder) == before
    with latent_cache.Writer(layout) as writer:
        writer.write(left, moments[6:])
    cache = latent_cache.LatentCache(layout.folder, cache_args(tiny_vae, flip=False))
    assert all(torch.equal(cache[0, index][0], moments[index, 0]) for index in range(COUNT))
    assert len(contents(layout.folder)) == 2 + 3


def test_a_kill_while_a_shard_is_written_costs_that_shard_alone(lay_out, monkeypatch):
    layout, left, moments = lay_out()
    real, seen = os.replace, []

    def killed(source, target):
        if seen:
            raise MemoryError  # nothing after this is written: as near to kill -9 as one process gets
        seen.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(type(layout.folder), "unlink", lambda *args, **more: None)
        with pytest.raises(MemoryError), latent_cache.Writer(layout) as writer:
            writer.write(left, moments)
    assert list(layout.folder.glob("*.writing"))
    assert lay_out()[1] == list(range(4, COUNT)) and not list(layout.folder.glob("*.writing"))


@pytest.mark.parametrize("shards_before", [0, 2])
def test_a_full_disk_is_one_line_and_what_was_finished_is_kept(encode, clip_folder, monkeypatch, shards_before):
    real, written = os.fsync, []

    def full(file):
        if len(written) >= 2 + shards_before:  # after files.npy and cache.json
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        folder, result = encode()
    assert result.code == 2 and "Traceback" not in result.err
    assert "cannot be written (No space left on device); what is finished is kept" in result.err.splitlines()[-1]
    assert len(contents(folder)) == 2 + shards_before
    assert told(encode()[1])["encoded"] == 4 - shards_before


def test_a_disk_that_is_really_full_is_told(lay_out, tmp_path):
    (tmp_path / "cache").mkdir()
    if shutil.which("mount") is None or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", tmp_path / "cache"], capture_output=True
    ).returncode:  # fmt: skip
        pytest.skip("may not mount")
    try:
        layout, left, moments = lay_out()
        with pytest.raises(UserError, match="No space left"), latent_cache.Writer(layout) as writer:
            for start in (0, 4):
                writer.write(left[start : start + 4], moments[start : start + 4])
                writer.write([], moments[:0])
                (layout.folder / "ballast").write_bytes(bytes(shutil.disk_usage(layout.folder).free - 4096))
        (layout.folder / "ballast").unlink()
        assert lay_out()[1] == list(range(4, COUNT))
    finally:
        subprocess.run(["umount", "-l", tmp_path / "cache"], check=True)


def test_a_second_process_that_writes_is_refused_in_one_line(encode):
    folder, _ = encode()
    hold = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(), input()"
    resume._held.pop(folder.resolve() / "run.lock").close()
    with subprocess.Popen(
        [sys.executable, "-uc", hold, folder / "run.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        assert_one_line(encode()[1], "is being written by another process", "another --out")
        other.communicate(b"\n")
    assert told(encode()[1])["encoded"] == 0


def test_too_little_room_is_told_before_anything_is_encoded(encode, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    assert_one_line(encode()[1], "needs 0.0 MiB more", "make room")


def test_a_file_that_changed_is_encoded_again_and_only_that(encode, clips, clip_folder, tiny_vae):
    folder, first = encode("--data-path", clips)
    before = contents(folder)
    assert told(first)["encoded"] == 4 and told(encode("--data-path", f"{clips}/.")[1])["encoded"] == 0
    shutil.copy(clip_folder / "run" / "0.mp4", clips / "jump" / "1.mp4")
    os.utime(clips / "jump" / "1.mp4", ns=(0, 7))
    folder, again = encode("--data-path", clips)
    assert told(again)["encoded"] == 1 and "1 of 4 files have changed" in again.err
    after = contents(folder)
    assert {name for name in before if before[name] != after[name]} == {"files.npy", "000001.npy"}
    cache = latent_cache.LatentCache(folder, cache_args(tiny_vae))
    assert torch.equal(cache[0, 1][0], cache[0, 1][0]) and list(cache.labels) == [0, 0, 1, 1]
    np.testing.assert_allclose(np.load(folder / "000001.npy"), np.load(folder / "000002.npy"), atol=1e-2)


def test_a_changed_item_of_a_shard_leaves_the_others_alone_even_if_that_is_interrupted(whole, lay_out, monkeypatch):
    old = np.load(whole / "000001.npy")
    layout = lay_out()[0]
    for _ in range(2):  # the second time as after a kill before files.npy told of it
        layout.forget(1, np.array([5, 9]))
        assert layout.left(1).tolist() == [5] and lay_out()[1] == [5]
    with latent_cache.Writer(layout) as writer:
        writer.write([5], torch.zeros(1, *SHAPE))
    new = np.load(whole / "000001.npy")
    assert np.array_equal(new[[0, 2, 3]], old[[0, 2, 3]]) and not new[1].any()


def test_a_checkpoint_can_tell_that_the_files_behind_a_cache_changed(whole, tiny_vae):
    def digest():
        return latent_cache.LatentCache(whole, cache_args(tiny_vae)).digest()

    digests, files = [digest()], np.load(whole / "files.npy")
    for field, value in [("time", 5), ("size", 7), ("name", b"x"), ("label", 1)]:
        files[field][2] = value
        np.save(whole / "files.npy", files)
        digests.append(digest())
    assert digests[0] == digests[1] and len({each["digest"] for each in digests}) == 4


@pytest.mark.parametrize("change", ["renamed", "other class", "one more"])
def test_another_data_set_is_refused_and_the_cache_left_alone(encode, clips, change):
    folder, _ = encode("--data-path", clips)
    before = contents(folder)
    if change == "renamed":
        (clips / "run" / "1.mp4").rename(clips / "run" / "2.mp4")
    elif change == "other class":
        (clips / "run" / "0.mp4").rename(clips / "jump" / "2.mp4")
    else:
        shutil.copy(clips / "run" / "1.mp4", clips / "run" / "2.mp4")
    result = encode("--data-path", clips)[1]
    assert_one_line(result, "holds another", "choose another --out")
    assert contents(folder) == before


def test_labels_that_changed_in_the_table_are_another_data_set(encode, clips, tmp_path):
    for name in ("jump", "run"):
        for path in sorted((clips / name).iterdir()):
            path.rename(clips / f"{name}{path.name}")
        (clips / name).rmdir()
    tags = {"jump0.mp4": "a", "jump1.mp4": "a", "run0.mp4": "b", "run1.mp4": "b"}
    for expected in (0, 2):
        lines = ["video_name,tag", *(f"{name},{tag}" for name, tag in tags.items())]
        (tmp_path / "tags.csv").write_text("\n".join(lines))
        result = encode("--data-path", clips, "--csv", tmp_path / "tags.csv")[1]
        assert result.code == expected
        tags["jump1.mp4"], tags["run0.mp4"] = "b", "a"
    assert_one_line(result, "2 of 4 files have another name or label, first 'jump1.mp4'")


def test_names_that_are_not_utf8_are_kept_told_and_refused(run_script, image_folder, tiny_vae, tmp_path):
    folder = shutil.copytree(image_folder, tmp_path / "data")
    (folder / "cat" / os.fsdecode(b"\xff.png")).write_text("no picture")
    words = ["--data-path", folder, "--out", tmp_path / "cache", "--vae", tiny_vae, "--image-size", 16]
    words += ["--num-workers", 0, "--device", "cpu"]
    result = run_script("extract_latents", *words)
    assert told(result)["encoded"] == 7 and "does not decode" in result.err and result.out.count("\n") == 1
    assert b"cat/\xff.png" in np.load(tmp_path / "cache" / "files.npy")["name"]
    (folder / "cat" / os.fsdecode(b"\xff.png")).rename(folder / "cat" / os.fsdecode(b"\xfe.png"))
    assert_one_line(run_script("extract_latents", *words), "1 of 7 files have another name or label")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 32}, "--image-size 16, not 32"),
        ({"clip_len": 4}, "--clip-len 2, not 4"),
        ({"video": False}, "--video True, not False"),
        ({"vae": "ema"}, "--vae .*, not ema"),
    ],
)
def test_a_cache_of_something_else_is_refused(whole, tiny_vae, change, message):
    with pytest.raises(UserError, match=message):
        latent_cache.LatentCache(whole, cache_args(tiny_vae, **change))


def test_the_same_autoencoder_may_be_named_otherwise(whole, tiny_vae):
    for name in (tiny_vae + "/", os.path.relpath(tiny_vae)):
        assert len(latent_cache.LatentCache(whole, cache_args(name))) == COUNT


def test_a_cache_without_mirrored_copies_asks_for_no_flip(encode, tiny_vae):
    folder, _ = encode("--no-flip")
    with pytest.raises(UserError, match="--no-flip"):
        latent_cache.LatentCache(folder, cache_args(tiny_vae))
    plain = latent_cache.LatentCache(folder, cache_args(tiny_vae, flip=False))
    assert torch.equal(plain[0, 1][0], plain[5, 1][0])


@pytest.mark.parametrize("flags", [["--clip-len", 4], ["--no-flip"], ["--use-bf16"]])
def test_a_folder_that_holds_another_cache_is_left_alone(encode, flags):
    folder, _ = encode()
    before = contents(folder)
    assert_one_line(encode(*flags)[1], "holds another cache (")
    assert contents(folder) == before


def test_what_is_no_cache_is_told(whole, tmp_path, tiny_vae, lay_out):
    with pytest.raises(UserError, match="not a latent cache.*extract_latents.py"):
        latent_cache.LatentCache(tmp_path, cache_args(tiny_vae))
    (whole / "cache.json").unlink()
    with pytest.raises(UserError, match="shards but no cache.json"):
        lay_out()


def test_a_cache_of_an_earlier_version_reads_the_same(whole, tiny_vae, lay_out):
    args = cache_args(tiny_vae)
    now = latent_cache.LatentCache(whole, args)
    items = [now[epoch, index] for epoch in range(3) for index in range(COUNT)]
    make_old(whole)
    old = latent_cache.LatentCache(whole, args)
    for (epoch, index), (moments, label, _) in zip(np.ndindex(3, COUNT), items, strict=True):
        assert torch.equal(old[epoch, index][0], moments) and old[epoch, index][1] == label
    with pytest.raises(UserError, match="earlier version.*another --out"):
        lay_out()
    done = np.arange(COUNT) != 3
    np.save(whole / "done.npy", done)
    with pytest.raises(UserError, match="unfinished, 9 of 10 items: an earlier version began it, so make it anew"):
        latent_cache.LatentCache(whole, args)


def edit(path, **changes):
    meta = json.loads(path.read_text())
    meta = {name: value for name, value in {**meta, **changes}.items() if value is not None}
    path.write_text(json.dumps(meta))


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def relabel(folder, label):
    files = np.load(folder / "files.npy")
    files["label"][3] = label
    np.save(folder / "files.npy", files)


WRONG = {
    "a list": lambda at: (at / "cache.json").write_text("[1, 2]"),
    "no JSON": lambda at: (at / "cache.json").write_text("{"),
    "not UTF-8": lambda at: (at / "cache.json").write_bytes(b"\xff"),
    "no vae": lambda at: edit(at / "cache.json", vae=None),
    "no clip_len": lambda at: edit(at / "cache.json", clip_len=None),
    "no class names": lambda at: edit(at / "cache.json", class_names=None),
    "class names of numbers": lambda at: edit(at / "cache.json", class_names=[1, 2]),
    "size as text": lambda at: edit(at / "cache.json", image_size="16"),
    "no item shape": lambda at: edit(at / "cache.json", item_shape=None),
    "item shape of one number": lambda at: edit(at / "cache.json", item_shape=2),
    "item shape of text": lambda at: edit(at / "cache.json", item_shape="22"),
    "no items to a shard": lambda at: edit(at / "cache.json", shard_items=0),
    "more files than there are": lambda at: edit(at / "cache.json", files=11),
    "one class": lambda at: edit(at / "cache.json", class_names=["a"]),
    "label too large": lambda at: relabel(at, 2),
    "label below 0": lambda at: relabel(at, -1),
    "no files": lambda at: (at / "files.npy").unlink(),
    "empty files": lambda at: truncate(at / "files.npy", 0),
    "files cut short": lambda at: truncate(at / "files.npy", 200),
    "other records": lambda at: np.save(at / "files.npy", np.zeros(COUNT)),
    "an archive": lambda at: (np.savez(at / "x.npz", np.zeros(COUNT)), (at / "x.npz").rename(at / "files.npy")),
    "pickled": lambda at: np.save(at / "files.npy", np.array([{}] * COUNT), allow_pickle=True),
    "a shard cut short": lambda at: truncate(at / "000001.npy", 1000),
    "an empty shard": lambda at: truncate(at / "000001.npy", 0),
    "a shard of text": lambda at: (at / "000001.npy").write_text("shard"),
    "a shard of FP32": lambda at: np.save(at / "000001.npy", np.zeros((4, *SHAPE), np.float32)),
    "a shard of another shape": lambda at: np.save(at / "000001.npy", np.zeros((4, *SHAPE[:-1], 5), np.float16)),
    "a shard too long": lambda at: np.save(at / "000002.npy", np.zeros((4, *SHAPE), np.float16)),
}
WRONG_OLD = {
    "no copies": lambda at: np.save(at / "moments.npy", np.zeros(COUNT, np.float16)),
    "FP32": lambda at: np.save(at / "moments.npy", np.zeros((COUNT, *SHAPE), np.float32)),
    "one fewer": lambda at: np.save(at / "moments.npy", np.zeros((COUNT - 1, *SHAPE), np.float16)),
    "cut short": lambda at: truncate(at / "moments.npy", 1000),
    "labels too large": lambda at: np.save(at / "labels.npy", np.arange(COUNT)),
    "labels of FP64": lambda at: np.save(at / "labels.npy", np.zeros(COUNT)),
    "no labels": lambda at: np.save(at / "labels.npy", np.zeros(0, int)),
    "done of another length": lambda at: np.save(at / "done.npy", np.ones(COUNT + 1, bool)),
}


@pytest.mark.parametrize("wrong", [*WRONG, *WRONG_OLD])
def test_a_cache_that_is_damaged_is_one_line(whole, tiny_vae, wrong):
    if wrong in WRONG_OLD:
        make_old(whole)
    {**WRONG, **WRONG_OLD}[wrong](whole)
    with pytest.raises(UserError, match="is not a latent cache|is damaged|is unfinished") as error:
        latent_cache.LatentCache(whole, cache_args(tiny_vae))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [name for name in WRONG if "shard" in name and "items" not in name])
def test_a_damaged_shard_is_encoded_again(whole, lay_out, wrong):
    WRONG[wrong](whole)
    assert lay_out()[1] == ([8, 9] if "long" in wrong else [4, 5, 6, 7])


@pytest.mark.parametrize("wrong", [name for name in WRONG if "shard" not in name and "label" not in name])
def test_a_damaged_description_is_one_line_when_encoding(whole, lay_out, wrong):
    WRONG[wrong](whole)
    with pytest.raises(UserError) as error:
        lay_out()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("old", [False, True])
def test_no_damaged_byte_raises_anything_else(whole, tiny_vae, old):
    if old:
        make_old(whole)
    rng = np.random.default_rng(0)
    for path in whole.iterdir():
        good = path.read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            for place in rng.integers(0, min(len(good), 300), 2):
                bad[place] = rng.integers(256)
            path.write_bytes(bad)
            try:
                latent_cache.LatentCache(whole, cache_args(tiny_vae, flip=False))[0, 1]
            except UserError as error:
                assert "\n" not in str(error)
        path.write_bytes(good)


def test_a_signal_keeps_what_is_encoded_and_the_same_command_goes_on(run_script, tiny_vae, tmp_path):
    count, shard_items = 600, 10
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "0000.png")
    for i in range(1, count):
        os.link(folder / "0000.png", folder / f"{i:04d}.png")
    out = tmp_path / "cache"
    words = ["--data-path", tmp_path / "data", "--vae", tiny_vae, "--image-size", 64, "--device", "cpu", "--out", out]
    process = subprocess.Popen(
        [sys.executable, REPO / "EqM/extract_latents.py", *map(str, words), "--batch-size", "1", "--num-workers", "1"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (out / "000001.npy").exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err and "interrupted by SIGTERM" in err.splitlines()[-1]
    kept = sum(len(np.load(path)) for path in out.glob("0*.npy"))
    assert 2 * shard_items <= kept < count
    assert told(run_script("extract_latents", *words, "--num-workers", 0))["encoded"] == count - kept
