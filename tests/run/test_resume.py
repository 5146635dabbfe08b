"""Which run goes on, what a resume says about itself, and who may write in a run folder."""

import os
import signal
import subprocess
import sys
import time

import pytest

from EqM.run import checkpoint, resume
from EqM.run.errors import UserError
from helpers import REPO

ARGS = {
    "model": "EqM-T/4", "image_size": 8, "num_classes": 3, "vae": "none", "uncond": True, "ebm": "none", "video": False,
    "clip_len": 16, "patch_frames": None, "path_type": "Linear", "prediction": "velocity", "loss_weight": "None",
    "disp": False, "data_path": "data", "latents": None, "csv": None, "frame_interval": None, "flip": True,
    "global_seed": 0, "global_batch_size": 4, "grad_accum_steps": 1, "lr": 1e-4, "lr_schedule": "constant",
    "warmup_steps": 0, "ema_decay": 0.9999, "max_grad_norm": None, "train_eps": None, "vae_precision": "same",
    "no_tf32": False, "compile": False, "epochs": 80, "max_steps": None, "num_workers": 4, "grad_checkpointing": False,
    "recompute": None,
}  # fmt: skip
DATA = {"items": 100, "digest": "abc"}
NOW = {"precision": "fp16", "world_size": 2, "torch": "2.14", "device": "cpu", "class_names": ["cat", "dog"]}
PARTS = {"opt": {}, "schedule": {}, "meter": {}, "scaler": {}}
SAVED = {"args": ARGS, "data": DATA, **PARTS, **NOW}
OLD = {"args": ARGS, **PARTS, "precision": "fp16", "world_size": 2, "class_names": ["cat", "dog"]}  # knew no data yet


def changed(saved=SAVED, now=NOW, data=DATA, **args):
    return resume.what_changed(saved, {**ARGS, **args}, now, data)


@pytest.mark.parametrize("saved", [SAVED, OLD])
def test_the_same_run_goes_on_exactly_also_from_an_older_checkpoint(saved):
    assert changed(saved) == []
    assert resume.going_on("x.pt", []) == "Going on from x.pt, exactly"


def test_what_changes_no_number_is_not_named():
    free = {
        "num_workers": 0,
        "grad_checkpointing": True,
        "recompute": "nothing",
        "clip_len": 4,
        "epochs": 90,
        "max_steps": 7,
        "no_tf32": True,
    }
    assert changed(**free, flag_of_tomorrow=1) == []


CHANGES = {
    "lr": 5e-5, "ema_decay": 0.99, "max_grad_norm": 1.0, "lr_schedule": "cosine", "warmup_steps": 5, "flip": False,
    "disp": True, "prediction": "noise", "path_type": "VP", "loss_weight": "velocity", "train_eps": 0.01, "ebm": "dot",
    "uncond": False, "vae": "ema", "vae_precision": "fp32", "compile": True, "frame_interval": 3,
    "global_batch_size": 8, "grad_accum_steps": 2, "global_seed": 5, "model": "EqM-S/4", "image_size": 16,
    "num_classes": 4, "c_schedule": "linear", "c_start": 0.7, "c_peak": 2.0, "c_scale": 5.0,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("saved", [SAVED, OLD])
def test_a_setting_that_changes_numbers_is_named_with_both_values(saved, name):
    assert changed(saved, **{name: CHANGES[name]}) == [
        f"{name} {ARGS.get(name, resume.BEFORE.get(name))} -> {CHANGES[name]}"
    ]


def test_several_changes_are_told_in_one_line():
    words = resume.going_on("x.pt", changed(now={**NOW, "precision": "bf16"}, lr=1e-5))
    assert words == "Going on from x.pt, not exactly as without a stop: precision fp16 -> bf16, lr 0.0001 -> 1e-05"


def test_where_it_runs_is_named():
    assert changed(now={**NOW, "torch": "2.15"}) == ["torch 2.14 -> 2.15"]
    assert changed(now={**NOW, "world_size": 1}) == ["world_size 2 -> 1"]
    on_gpu = {**NOW, "device": "cuda"}
    assert changed({**SAVED, "device": "cuda"}, on_gpu, no_tf32=True) == ["no_tf32 False -> True"]
    assert changed(now=on_gpu) == ["device cpu -> cuda"]
    assert changed({"args": {}, **PARTS}, NOW) == ["precision unknown -> fp16", "world_size unknown -> 2"]
    assert changed({**SAVED, "stand_in": "ema"}) == ["ema missing -> a copy of the other weights"]


def test_a_part_that_is_missing_is_named():
    for part in PARTS:
        without = {name: value for name, value in SAVED.items() if name != part}
        assert changed(without) == [f"{part} missing -> as at the start"]
    assert changed({**SAVED, "precision": "bf16", "scaler": {}}, {**NOW, "precision": "bf16"}) == []


def test_frames_of_a_patch_matter_to_clips_and_left_out_are_its_side():
    clips = {**SAVED, "args": {**ARGS, "video": True}}
    assert changed(clips, video=True, patch_frames=4) == []
    assert changed(clips, video=True, patch_frames=2) == ["patch_frames None -> 2"]
    assert changed(clips, video=True, clip_len=4) == ["clip_len 16 -> 4"]


@pytest.mark.parametrize(("more", "ends"), [({"max_steps": 500}, 500), ({"epochs": 40}, 1000)])
def test_the_end_of_a_cosine_schedule_matters_and_only_of_one(more, ends):
    assert changed(**more) == []
    cosine = {**SAVED, "args": {**ARGS, "lr_schedule": "cosine"}}
    assert changed(cosine, lr_schedule="cosine", **more) == [f"end of the cosine 2000 -> {ends}"]
    assert changed(cosine, lr_schedule="cosine", max_steps=2000) == [], "the same end, said another way"


def test_data_is_known_by_what_it_holds_not_by_where_it_lies(tmp_path):
    assert changed(data_path="moved") == [] and changed(latents="x", vae_precision="fp32") == []
    assert changed(OLD, data_path="moved") == ["data_path data -> moved"]
    assert changed(data={**DATA, "items": 99}) == ["data 100 -> 99 items"]
    (other,) = changed(data={**DATA, "digest": "xyz"})
    assert other.startswith("data: names, sizes, labels")


def test_a_digest_follows_names_order_sizes_and_labels(tmp_path):
    names, paths = ["a/1.png", "a/2.png", "b/1.png"], []
    for name in names:
        paths.append(tmp_path / name)
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(b"123")

    def digests():
        yield resume.data_digest(names, [0, 0, 1], paths)
        yield resume.data_digest(names, [0, 1, 0], paths)
        yield resume.data_digest(names[::-1], [0, 0, 1], paths)
        yield resume.data_digest(names[:2], [0, 0], paths[:2])
        yield resume.data_digest(["a/1.pn", "ga/2.png", "b/1.png"], [0, 0, 1], paths)
        paths[1].write_bytes(b"1234")
        yield resume.data_digest(names, [0, 0, 1], paths)
        paths[1].unlink()
        yield resume.data_digest(names, [0, 0, 1], paths)
        yield resume.data_digest(names, [0, 0, 1])

    seen = list(digests())
    assert len({each["digest"] for each in seen}) == len(seen) == 8 and seen[0]["items"] == 3
    assert resume.data_digest([os.fsencode(name) for name in names], [0, 0, 1]) == seen[-1]


def test_a_million_files_are_asked_for_20_000_sizes(monkeypatch):
    asked = []
    monkeypatch.setattr(resume, "_size", lambda path: asked.append(path) or 1)
    names = [b"n%d" % i for i in range(100_000)]
    begun = time.perf_counter()
    resume.data_digest(names, range(100_000), names)
    assert len(asked) == 20_000 and time.perf_counter() - begun < 5


def test_one_place_written_in_several_ways_is_one_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    for way in ("data", "data/", "./data", str(tmp_path / "data"), "link", f"../{tmp_path.name}/data"):
        assert resume.same_path("data", way) and resume.same_path(way, "data")
        for name in ("data_path", "vae", "latents"):
            saved = {**OLD, "args": {**ARGS, name: "data"}}
            assert changed(saved, **{name: way}) == [] == resume.other_identity(saved, {**ARGS, name: way})
    assert not resume.same_path("data", "data2") and not resume.same_path("data", None)
    assert not resume.same_path("data", 5) and not resume.same_path("a\0", "b") and resume.same_path(None, None)


def test_a_vae_by_name_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mse").symlink_to("ema")
    assert changed({**SAVED, "args": {**ARGS, "vae": "ema"}}, vae="mse") == ["vae ema -> mse"]


def test_one_decay_is_the_same_as_a_number_and_in_a_list():
    assert changed(ema_decay=[0.9999], ema_warmup=False, ema_std=None) == []
    assert changed(ema_decay=[0.9999, 0.99]) == ["ema_decay 0.9999 -> [0.9999, 0.99]"]
    assert changed(ema_warmup=True, ema_std=[0.1]) == ["ema_warmup False -> True", "ema_std None -> [0.1]"]


def test_another_start_makes_another_run_and_is_nothing_to_a_run_that_goes_on(tmp_path):
    """Left out, it says nothing: the run began long ago. A checkpoint that is older than the flag began without."""
    start = str(tmp_path / "start.pt")
    begun = {**SAVED, "args": {**ARGS, "init_from": start, "init_positions": None, "weights": "ema"}}
    for saved, args, differs in [
        (begun, {"init_from": start}, []),
        (begun, {"init_from": f"{tmp_path}/./start.pt"}, []),
        (begun, {"init_from": None}, []),
        (begun, {"init_from": "other.pt"}, [f"init_from {start} -> other.pt"]),
        (begun, {"init_from": start, "init_positions": "new"}, ["init_positions None -> new"]),
        (begun, {"init_from": start, "weights": "model"}, ["weights ema -> model"]),
        (SAVED, {"init_from": "other.pt"}, ["init_from None -> other.pt"]),
    ]:
        args = {**ARGS, "init_positions": None, "weights": "ema", **args}
        assert resume.other_identity(saved, args, DATA) == differs
        assert changed(saved, **args) == []


def test_other_classes_are_refused_unless_asked_for():
    for names, words in [
        (["dog", "cat"], "the same classes in another order"),
        (["cat", "wolf"], "'dog' gone and 'wolf' new"),
        (["cat"], "'dog' gone"),
        (["cat", "dog", "a", "b", "c", "d"], "'a', 'b', 'c' and 1 more new"),
    ]:
        with pytest.raises(UserError, match=f"other classes .*{words}.*--allow-other-classes"):
            resume.check_classes(SAVED, names)
        resume.check_classes(SAVED, names, allowed=True)
        assert changed(now={**NOW, "class_names": names}) == ["class_names: other classes, or in another order"]
    resume.check_classes(SAVED, ["cat", "dog"])
    resume.check_classes({"args": {}}, ["anything"])


def test_a_goal_that_is_behind_is_told_and_one_that_is_reached_only_in_another_folder():
    resume.check_goal(5, 6, "x.pt", in_place=False)
    resume.check_goal(6, 6, "x.pt", in_place=True)
    for step, in_place in [(7, True), (7, False), (6, False)]:
        with pytest.raises(UserError, match=f"x.pt is at step {step} already.* end at 6: ask for more --max-steps"):
            resume.check_goal(step, 6, "x.pt", in_place)


def make_run(root, name, data=None, step=10, **args):
    folder = root / name / "checkpoints"
    folder.mkdir(parents=True)
    saved = {"model": {}, "ema": {}, "args": {**ARGS, **args}, "step": step, **({"data": data} if data else {})}
    checkpoint.save(folder / f"{step:07d}.pt", saved)
    return str(folder / f"{step:07d}.pt")


def test_a_run_is_found_by_what_makes_it_that_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_run(tmp_path, "000-EqM-A", DATA)
    for same in (
        {}, {"lr": 1e-5}, {"data_path": "./data/"}, {"data_path": str(tmp_path / "data")}, {"num_classes": None},
        {"ema_decay": 0.5}, {"global_batch_size": 8}, {"epochs": 3}, {"flip": False}, {"warmup_steps": 7},
    ):  # fmt: skip
        assert resume.choose(tmp_path, {**ARGS, **same}) == resume.Choice(path)
    assert resume.choose(tmp_path, {**ARGS, "data_path": "moved"}, DATA) == resume.Choice(path)
    for name in ("model", "image_size", "vae", "uncond", "ebm", "path_type", "prediction", "disp", "global_seed"):
        choice = resume.choose(tmp_path, {**ARGS, name: CHANGES[name]}, DATA)
        told = f"Starting anew, since 000-EqM-A is another run: {name} {ARGS[name]} -> {CHANGES[name]}"
        assert choice == resume.Choice(None, told)
    assert resume.choose(tmp_path, {**ARGS, "data_path": "b"}, {**DATA, "digest": "x"}).message.endswith("data -> b")
    assert resume.choose(tmp_path / "nowhere", ARGS) == resume.Choice(None)


def test_runs_of_several_kinds_share_a_folder(tmp_path):
    path = make_run(tmp_path, "000-EqM-A")
    make_run(tmp_path, "001-EqM-B", disp=True)
    (tmp_path / "002-EqM-A/checkpoints").mkdir(parents=True)  # ended before its first checkpoint
    assert resume.choose(tmp_path, ARGS).path == path
    fast, faster = (make_run(tmp_path, f"00{i}-EqM-A", lr=lr) for i, lr in [(3, 1e-3), (4, 1e-2)])
    found = [resume.choose(tmp_path, {**ARGS, "lr": lr}).path for lr in (1e-4, 1e-3, 1e-2, 5.0)]
    assert found == [path, fast, faster, faster], "its own, else the newest"
    with pytest.raises(UserError, match="holds no checkpoint of this configuration; 004-EqM-A is another.*seed 0 -> 1"):
        resume.choose(tmp_path, {**ARGS, "global_seed": 1}, required=True)


def test_a_checkpoint_that_cannot_be_read_is_passed_over_and_named(tmp_path):
    path = make_run(tmp_path, "000-EqM-A")
    broken = tmp_path / "000-EqM-A/checkpoints/0000020.pt"
    broken.write_bytes(b"PK")
    choice = resume.choose(tmp_path, ARGS)
    assert choice.path == path and choice.message.startswith(f"Passed over: --ckpt {broken} is cut short")
    os.remove(path)
    assert resume.choose(tmp_path, ARGS).message.startswith(f"Starting anew, since --ckpt {broken} is cut short")


def test_a_rank_that_cannot_read_a_checkpoint_ends_all():
    def unreadable(path):
        raise UserError(f"{path} is not there")

    assert resume.load_on_all("x", str.upper, lambda ok: ok) == "X"
    with pytest.raises(UserError, match="x is not there"):
        resume.load_on_all("x", unreadable, lambda ok: ok)
    with pytest.raises(SystemExit) as end:  # another rank said no
        resume.load_on_all("x", str.upper, lambda ok: False)
    assert end.value.code == 2


HOLDER = """
import os, sys, time
from EqM.run import resume
resume.lock_run(sys.argv[1])
if os.fork() == 0:  # a data worker, which outlives a killed trainer
    time.sleep(20)
print("held", flush=True)
time.sleep(20)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is locked there")
def test_a_run_folder_has_one_process_and_a_killed_one_leaves_no_lock(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is being written by another process .process {holder.pid} on .*wait"):
            resume.lock_run(tmp_path)
        holder.kill()
        holder.wait()
        resume.lock_run(tmp_path)
        resume.lock_run(tmp_path / ".")  # once more is no harm
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="run.lock cannot be written: No such"):
        resume.lock_run(tmp_path / "nowhere")


def test_a_folder_that_is_called_like_a_published_autoencoder_is_not_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ema", "none", "own", "data"):
        (tmp_path / name).mkdir()
    for vae, kept in (("ema", "ema"), ("none", "none"), ("own", str(tmp_path / "own")), ("gone", "gone")):
        args = resume.absolute({"vae": vae, "data_path": "data/", "latents": None})
        assert args == {"vae": kept, "data_path": str(tmp_path / "data"), "latents": None}
    assert not resume.same_vae("ema", str(tmp_path / "ema")) and resume.same_vae("own", str(tmp_path / "own") + "/")


def test_a_data_set_of_the_hub_is_no_place_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:user" / "set").mkdir(parents=True)
    args = {"data_path": "hf:user/set", "latents": None, "vae": "none"}
    assert resume.absolute(args) == args
    assert resume.same_path("hf:user/set", "hf:user/set") and not resume.same_path("hf:user/set", "hf:user/set/")
    assert not resume.same_path("hf:user/set", str(tmp_path / "hf:user" / "set"))


def test_a_run_of_latents_is_not_one_of_a_data_set_of_the_hub():
    assert not resume.same_path(None, "hf:user/set") and not resume.same_path("hf:user/set", None)


def test_fused_kernels_are_named_where_they_come_or_go():
    """By their flag, or because blocks are compiled or checkpointed."""
    fused = {"use_bf16": True, "recompute": None, "no_fused_kernels": False}
    assert not resume._settled(fused)["no_fused_kernels"]
    for other in ({"no_fused_kernels": True}, {"compile": True}, {"grad_checkpointing": True}, {"use_bf16": False}):
        assert resume._settled(fused | other)["no_fused_kernels"]
    assert resume._settled({"use_bf16": True})["no_fused_kernels"], "a checkpoint of before"


def test_places_are_found_from_another_directory(tmp_path, monkeypatch):
    """Each flag that names one, a data set that lies here under hf: too, and folders that are called like words."""
    monkeypatch.chdir(tmp_path)
    for name in ("set", "ema", "latest"):
        (tmp_path / name).mkdir()
    for flag in (*resume.PLACES, *resume.OTHER_PLACES):
        assert resume.absolute({flag: "set/"}) == {flag: str(tmp_path / "set")}
    for place, found in (("hf:set", f"hf:{tmp_path}/set"), ("hf:./set:test[:5]", f"hf:{tmp_path}/set:test[:5]")):
        assert resume.absolute({"data_path": place, "val_path": place}) == {"data_path": found, "val_path": found}
        assert resume.same_path(place, found) and not resume.same_path(place, "hf:gone")
    kept = {"vae": "ema", "ckpt": "latest", "data_path": "hf:gone:test", "latents": "gone"}
    assert resume.absolute(kept) == kept
    assert resume.absolute({"latents": "latest", "init_from": "ema"}) == {
        "latents": str(tmp_path / "latest"), "init_from": str(tmp_path / "ema")
    }  # fmt: skip


def test_a_name_of_the_hub_is_no_place_unless_a_folder_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(map(resume.is_hub_name, ("user/name", "user/na-me.2/vae")))
    assert not any(map(resume.is_hub_name, ("ema", "own", "./user/name", "../a/b", "/user/name", "user/name/", "")))
    assert resume.same_vae("user/name", "user/name") and not resume.same_vae("user/name", str(tmp_path / "user/name"))
    assert resume.absolute({"vae": "user/name"}) == {"vae": "user/name"}
    (tmp_path / "user" / "name").mkdir(parents=True)
    assert not resume.is_hub_name("user/name") and resume.same_vae("user/name", str(tmp_path / "user/name"))
    assert resume.absolute({"vae": "user/name"}) == {"vae": str(tmp_path / "user/name")}


def test_what_a_card_adds_up_in_another_order_is_named_there_alone():
    on_gpu, saved = {**NOW, "device": "cuda"}, {**SAVED, "device": "cuda"}
    assert changed(saved, on_gpu, recompute=None, use_amp=True) == ["recompute nothing -> elementwise"]
    assert changed(saved, on_gpu, recompute=None) == [] and changed(recompute="elementwise") == []
    assert changed(shard=True) == ["shard False -> True"] and changed(shard=False, shard_size=None) == []


def test_distances_of_before_are_named():
    new = {**SAVED, "args": {**ARGS, "disp": True, "recompute": None}}
    old = {**new, "args": {name: value for name, value in new["args"].items() if name != "recompute"}}
    assert changed(old, disp=True) == ["disp: version 0.2 rounded its distances otherwise"]
    assert changed(new, disp=True) == []
