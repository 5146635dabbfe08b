"""evaluate.py as its command line runs it: what is judged, against what, by how many ranks, and after a kill."""

import json
import multiprocessing
import os
import re
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from EqM.metrics import collect, features
from EqM.metrics.reference import open_reference
from EqM.run import checkpoint
from helpers import CLIP_ARGS, IMAGE_ARGS, FlatInception, load_script, pictures, save_checkpoint, write_pictures

SHORT = "--num-fid-samples 12 --num-sampling-steps 4 --stepsize 0.1 --batch-size 4 --cfg-scale 1".split()  # noqa: SIM905
ALL = ["fid", "sfid", "inception_score", "kid", "kid_error", "precision", "recall"]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file in Inception's place, and a network in no time."""
    monkeypatch.setattr(features, "Inception", FlatInception)
    path = tmp_path / "flat.pth"
    path.write_bytes(b"flat")
    return path


@pytest.fixture
def evaluate(run_script, weights, tmp_path):
    """evaluate(*flags): the outcome, with .told (the JSON) and .figures of the first result."""

    def run(*flags, out="r.json"):
        kept = [] if "--make-reference" in flags else ["--json", tmp_path / out]
        result = run_script("evaluate", *flags, "--inception", weights, *kept, "--device", "cpu")
        if result.code == 0 and (tmp_path / out).exists():
            result.told = json.loads((tmp_path / out).read_text())
            result.figures = result.told["results"][0]
        return result

    return run


@pytest.fixture
def samples(tmp_path):
    return write_pictures(tmp_path / "samples", 22)


@pytest.fixture
def real(tmp_path):
    return write_pictures(tmp_path / "real", 30, seed=1)


@pytest.fixture
def image_ckpt(tmp_path):
    return save_checkpoint(tmp_path / "image.pt", IMAGE_ARGS)


def same(one, other):
    assert one.keys() == other.keys() and one.get("checkpoint") == other.get("checkpoint")
    one = {name: value for name, value in one.items() if name != "checkpoint"}
    assert [one[name] for name in one] == pytest.approx([other[name] for name in one], rel=1e-9, abs=1e-12)


def test_a_folder_against_a_folder(evaluate, samples, real, tmp_path, weights):
    result = evaluate("--samples", samples, "--reference", real)
    assert result.code == 0, result.err
    assert list(result.figures) == ALL and result.figures["fid"] > 0.01 and result.figures["inception_score"] > 1.01
    protocol = result.told["protocol"]
    assert protocol["judged"]["count"] == 22 and protocol["reference"]["count"] == 30
    assert protocol["features"]["digest"] == features.digest_of(weights) and not protocol["features"]["published"]
    for words in ("FID", "recall", "count 22", "count 30", "299 x 299", f"{result.figures['fid']:.3f}"):
        assert words in result.out
    assert "not comparable with published figures" in result.out
    assert sorted(path.name for path in tmp_path.glob("r.json*")) == ["r.json"], "no progress is left"
    assert evaluate("--samples", real, "--reference", real).figures["fid"] < 1e-10


def test_order_and_the_kind_of_file_change_nothing(evaluate, samples, real, tmp_path):
    result = evaluate("--samples", samples, "--reference", real)
    np.savez(tmp_path / "stored.npz", pictures(22))
    np.savez_compressed(tmp_path / "packed.npz", pictures(22))
    for path in ("stored.npz", "packed.npz"):
        same(evaluate("--samples", tmp_path / path, "--reference", real).figures, result.figures)
    (tmp_path / "mixed" / "deep").mkdir(parents=True)
    for i, path in enumerate(sorted(samples.iterdir(), key=lambda path: path.name[::-1])):
        path.rename(tmp_path / "mixed" / ("deep" if i % 3 else ".") / f"{99 - i}.png")
    moved = evaluate("--samples", tmp_path / "mixed", "--reference", real).figures
    same({**moved, "inception_score": 0}, {**result.figures, "inception_score": 0})  # its splits go by position


def test_a_checkpoint_is_judged_by_the_samples_that_the_sampler_writes(
    run_script, evaluate, image_ckpt, real, tmp_path
):
    flags = [*SHORT, "--sampler", "langevin", "--temperature", 1e-3]
    at_once = ["--global-batch-size" if word == "--batch-size" else word for word in flags]
    written = run_script(
        "sample_gd", "--ckpt", image_ckpt, "--folder", tmp_path / "s", *at_once, "--classes", "all", "--device", "cpu"
    )
    assert written.code == 0, written.err
    assert (tmp_path / "s" / "labels.csv").read_text().count("owl") == 4, "each of three classes equally often"
    judged = evaluate("--ckpt", image_ckpt, "--reference", real, *flags, "--keep-samples", tmp_path / "kept")
    assert judged.code == 0, judged.err
    assert judged.figures.pop("step") == 3 and judged.figures.pop("checkpoint") == str(image_ckpt)
    same(evaluate("--samples", tmp_path / "s", "--reference", real).figures, judged.figures)
    assert evaluate("--samples", tmp_path / "s", "--reference", real).told["protocol"]["judged"]["count"] == 12
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").glob("*.png")}
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "s").glob("0*.png")}
    told = judged.told["protocol"]["judged"]
    assert told["sampler"]["sampler"] == "langevin" and told["classes"] == ["all"] and told["precision"] == "fp32"


def test_a_run_folder_is_a_table_a_plot_and_the_best(evaluate, real, tmp_path):
    run = tmp_path / "000-EqM-T-4-Linear-velocity-None" / "checkpoints"
    run.mkdir(parents=True)
    for step in (10, 9):
        path = save_checkpoint(run / f"{step:07d}.pt", IMAGE_ARGS, seed=step)
        checkpoint.save(path, {**torch.load(path, weights_only=True), "step": step})
    result = evaluate("--ckpt", run.parent, "--reference", real, *SHORT)
    assert result.code == 0, result.err
    results = result.told["results"]
    assert [each["step"] for each in results] == [9, 10] and results[0]["fid"] != results[1]["fid"]
    best = min(results, key=lambda each: each["fid"])["step"]
    assert f"Best: step {best}, {run / f'{best:07d}.pt'}\n" in result.out
    with Image.open(tmp_path / "r.png") as plot:
        assert plot.width > 500


def test_a_reference_is_made_with_trainings_crop_and_says_so(evaluate, image_folder, samples, tmp_path):
    ref = tmp_path / "ref.npz"
    made = evaluate("--make-reference", image_folder, "--out", ref, "--image-size", 8)
    assert made.code == 0, made.err
    with np.load(ref) as archive:
        assert archive["arr_0"].shape == (6, 8, 8, 3) and {"mu", "sigma", "mu_s", "sigma_s"} <= set(archive.files)
        said = json.loads(str(archive["made"]))
        np.savez(tmp_path / "crops.npz", archive["arr_0"])
        np.savez(tmp_path / "adm.npz", **{name: archive[name] for name in ("arr_0", "mu", "sigma", "mu_s", "sigma_s")})
    assert said["source"]["count"] == 6 and said["source"]["size"] == 8 and "crop" in said["source"]
    assert said["features"]["digest"]
    by_items = evaluate("--samples", samples, "--reference", tmp_path / "crops.npz").figures
    by_moments = evaluate("--samples", samples, "--reference", ref)
    same(by_moments.figures, by_items)
    assert by_moments.told["protocol"]["reference"]["source"] == said["source"]
    adms = evaluate("--samples", samples, "--reference", tmp_path / "adm.npz").figures
    same(adms, {name: value for name, value in by_items.items() if not name.startswith("kid")})
    assert evaluate("--samples", tmp_path / "crops.npz", "--reference", ref).figures["fid"] < 1e-7


def test_what_the_autoencoder_alone_costs(run_script, evaluate, image_folder, tiny_vae, tmp_path, weights):
    size = ["--image-size", 8, "--device", "cpu"]
    coded = run_script(
        "extract_latents",
        "--data-path",
        image_folder,
        "--vae",
        tiny_vae,
        "--out",
        tmp_path / "c",
        "--num-workers",
        0,
        *size,
    )
    assert coded.code == 0, coded.err
    evaluate("--make-reference", image_folder, "--out", tmp_path / "ref.npz", "--image-size", 8)
    floor = evaluate("--samples", tmp_path / "c", "--reference", tmp_path / "ref.npz", "--vae", tiny_vae)
    assert floor.code == 0, floor.err
    assert floor.figures["fid"] > 1e-3 and floor.told["protocol"]["judged"]["vae"] == tiny_vae
    networks = features.Networks(FlatInception(weights, torch.device("cpu")))
    assert open_reference(tmp_path / "c", networks).shape == (8, 8, 3), "in FP32 where nothing else is said"
    made = evaluate("--make-reference", tmp_path / "c", "--out", tmp_path / "decoded.npz")
    assert made.code == 0, made.err
    assert evaluate("--samples", tmp_path / "c", "--reference", tmp_path / "decoded.npz").figures["fid"] < 1e-7


def test_checkpoints_without_steps_are_a_table_alone(evaluate, real, tmp_path):
    paths = [save_checkpoint(tmp_path / f"{name}.pt", IMAGE_ARGS, seed=i) for i, name in enumerate("ab")]
    for path in paths:
        content = torch.load(path, weights_only=True)
        checkpoint.save(path, {name: content[name] for name in ("model", "ema", "args")})
    result = evaluate("--ckpt", *paths, "--reference", real, *SHORT)
    assert result.code == 0, result.err
    assert [list(each) for each in result.told["results"]] == [[*ALL, "checkpoint"]] * 2 and not (
        tmp_path / "r.png"
    ).exists()


def test_checkpoints_of_one_name_share_nothing_and_their_samples_are_never_mixed(evaluate, real, tmp_path):
    paths = [save_checkpoint(tmp_path / name / "checkpoints/0000003.pt", IMAGE_ARGS, seed=seed)
             for seed, name in enumerate("ab")
             if not (tmp_path / name / "checkpoints").mkdir(parents=True)]  # fmt: skip
    flags = ["--ckpt", *paths, paths[0], "--reference", real, *SHORT, "--keep-samples", tmp_path / "kept"]
    result = evaluate(*flags, "--neighbours", 1)
    assert result.code == 0, result.err
    assert [each["checkpoint"] for each in result.told["results"]] == list(map(str, paths)), "none of them twice"
    assert all(f"  {path}\n" in result.out for path in paths), "the table tells them"
    best = min(result.told["results"], key=lambda each: each["fid"])
    assert f"Best: step 3, {best['checkpoint']}\n" in result.out
    kept = [sorted((tmp_path / "kept" / name).glob("*.png")) for name in ("a-0000003", "b-0000003")]
    assert [len(files) for files in kept] == [12, 12] and kept[0][0].read_bytes() != kept[1][0].read_bytes()
    assert len(list(tmp_path.glob("r-neighbours-?-0000003.png"))) == 2
    assert evaluate(*flags).code == 0, "the same samples are made again"
    other = evaluate(*flags, "--global-seed", 1)
    assert other.code == 2 and "a-0000003 holds other samples; choose another" in other.err
    shutil.rmtree(tmp_path / "kept" / "a-0000003")
    late = evaluate(*flags, "--global-seed", 1)
    assert late.code == 2 and "b-0000003 holds other samples; choose another" in late.err
    assert not (tmp_path / "kept" / "a-0000003").exists(), "told before the first is drawn"


def test_what_is_printed_of_the_sampler_is_what_it_reads(evaluate, image_ckpt, real, image_folder, tmp_path):
    result = evaluate("--ckpt", image_ckpt, "--reference", real, *SHORT, "--sampler", "ngd")
    words = "sampler --sampler ngd --num-sampling-steps 4 --stepsize 0.1 --mu 0.3 --cfg-scale 1.0,"
    assert words in result.out, result.out
    assert result.told["protocol"]["judged"]["sampler"]["beta1"] == 0.9, "the file keeps all"
    made = evaluate("--make-reference", image_folder, "--out", tmp_path / "ref.npz", "--image-size", 8)
    assert "made_by: EqM\n" in made.out and "{" not in made.out


def clips(tmp_path, name, frames, seed):
    folder = tmp_path / name
    folder.mkdir()
    for i, clip in enumerate(pictures(11 * frames, seed).reshape(11, frames, 8, 8, 3)):
        images = [Image.fromarray(frame) for frame in clip]
        images[0].save(folder / f"{i:06d}.gif", save_all=True, append_images=images[1:])
    return folder


def test_clips_have_an_fvd_and_the_fid_of_their_frames(evaluate, i3d_file, tmp_path):
    one, other = (clips(tmp_path, name, 16, seed) for seed, name in enumerate("ab"))
    both = evaluate("--samples", one, "--reference", other, "--i3d", i3d_file, "--neighbours", 2)
    assert both.code == 0, both.err
    assert list(both.figures) == ["fvd", "frame_fid"] and both.figures["fvd"] > 1e-4 < both.figures["frame_fid"]
    assert (tmp_path / "r-neighbours-samples.png").exists()
    alone = evaluate("--samples", one, "--reference", other)
    assert list(alone.figures) == ["frame_fid"] and "no FVD: it wants --i3d FILE" in alone.out
    assert evaluate("--samples", one, "--reference", one, "--i3d", i3d_file).figures["fvd"] < 1e-10


def test_a_reference_of_clips_has_their_fvd_if_it_was_made_with_i3d(evaluate, i3d_file, clip_folder, tmp_path):
    judged = clips(tmp_path, "a", 16, 0)
    made = ["--make-reference", clip_folder, "--video", "--clip-len", 16, "--image-size", 8]
    assert evaluate(*made, "--out", tmp_path / "without.npz").code == 0
    assert evaluate(*made, "--out", tmp_path / "with.npz", "--i3d", i3d_file).code == 0
    without = evaluate("--samples", judged, "--reference", tmp_path / "without.npz", "--i3d", i3d_file)
    assert list(without.figures) == ["frame_fid"] and "no FVD: the reference has no features by I3D" in without.out
    both = evaluate("--samples", judged, "--reference", tmp_path / "with.npz", "--i3d", i3d_file)
    assert list(both.figures) == ["fvd", "frame_fid"], both.err
    assert both.figures["frame_fid"] == pytest.approx(without.figures["frame_fid"], rel=1e-9)


def test_short_clips_have_the_fid_of_their_frames_alone(evaluate, i3d_file, clip_folder, tmp_path):
    made = ["--video", "--clip-len", "4", "--image-size", "8"]
    assert evaluate("--make-reference", clip_folder, "--out", tmp_path / "ref.npz", *made).code == 0
    ckpt = save_checkpoint(tmp_path / "clip.pt", CLIP_ARGS)
    result = evaluate("--ckpt", ckpt, "--reference", tmp_path / "ref.npz", "--i3d", i3d_file, *SHORT)
    assert result.code == 0, result.err
    assert list(result.figures) == ["frame_fid", "step", "checkpoint"]
    assert "no FVD: it wants 16 frames, and these clips have 4" in result.out


def test_neighbours_show_copies_beside_what_they_copy(evaluate, real, tmp_path):
    result = evaluate("--samples", real, "--reference", real, "--neighbours", 3)
    with Image.open(tmp_path / "r-neighbours-samples.png") as sheet:
        tiles = np.asarray(sheet.convert("RGB"))
    assert result.code == 0 and "neighbours-samples.png" in result.out
    width = tiles.shape[1] // 4  # a sample and its three neighbours
    first, copy, other = (tiles[14:110, width * i + 4 : width * i + 100] for i in range(3))
    assert np.array_equal(first, copy) and not np.array_equal(first, other)


def test_few_samples_are_a_warning_with_the_number(evaluate, samples, real, tmp_path):
    few = write_pictures(tmp_path / "few", 4)
    result = evaluate("--samples", few, "--reference", real)
    assert result.code == 0
    assert "warning: 4 samples give a singular covariance of 6 features" in result.out and "at least 7" in result.out
    assert "inception_score" not in result.figures and "needs 10 images" in result.out
    assert "warning:" not in evaluate("--samples", samples, "--reference", real).out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--samples {samples} --reference {big}", "what is judged is 8 x 8, the reference 16 x 16"),
        ("--samples {empty} --reference {real}", "holds no images and no clips"),
        ("--samples {samples} --reference {empty}", "holds no images and no clips"),
        ("--samples {mixed} --reference {real}", "is 16 x 16 and .* 8 x 8"),
        ("--samples {samples} --reference {none}", "is neither a folder nor a file"),
        ("--samples {samples} --reference {other}", "was made of other features: mu has the shape"),
        ("--samples {samples} --reference {foreign}", "was made of other features: by the network 0000"),
        ("--samples {samples} --reference {cut}", "is no npz"),
        ("--samples {samples} --reference {half}", "has mu without sigma"),
        ("--samples {samples} --reference {strange}", "made is no JSON object"),
        ("--samples {floats} --reference {real}", "arr_0 of .* is float32"),
        ("--samples {odd} --reference {real}", "cannot be read .*; take it out"),
        ("--samples {samples} --reference {real} --i3d {cut}", "--i3d .* does not load"),
        ("--ckpt {none} --reference {real}", "--ckpt .* is not a file"),
        ("--ckpt {ckpt} --reference {big} --num-fid-samples 4", "what is judged is 8 x 8"),
        ("--ckpt {ckpt} --reference {real} --classes emu", "emu is no class"),
        ("--make-reference {none} --out {none} --image-size 8", "is not a folder"),
        ("--samples {samples}", "need --reference"),
        ("--make-reference {samples}", "needs --out"),
        (
            "--make-reference {clips} --out {none} --image-size 8",
            "--make-reference .*clips.* holds no images; add --video",
        ),
        ("--make-reference {samples} --out {cut}", "--out .*cut.npz exists already; choose another"),
        ("--make-reference {samples} --out {none} --json r.json", "--json: no effect with --make-reference"),
        ("--samples {samples} --reference {real} --mu 0.2 --stepsize 0.1", "--stepsize and --mu: no effect"),
        ("--samples {samples} --reference {real} --csv x", "--csv: no effect with --samples"),
        (
            "--samples {samples} --reference {real} --image-size 8 --video --clip-len 4",
            "--image-size and --video and --clip-len: no effect with --samples",
        ),
        ("--samples {samples} --reference {real} --model EqM-T/4 --global-seed 1", "--model and --global-seed: no eff"),
        ("--samples {samples} --reference {real} --vae none --use-bf16", "--vae and --use-bf16: no effect"),
        ("--ckpt {ckpt} --reference {real} --frame-interval 2", "--frame-interval: no effect with --ckpt"),
        ("--make-reference {samples} --out {none} --image-size 8 --clip-len 4", "--clip-len is for clips"),
        ("--make-reference {samples} --out {none} --image-size 8 --frame-interval 2", "--frame-interval is for clips"),
        ("--make-reference {samples} --out {none} --uncond --use-amp", "--uncond and --use-amp: no effect"),
        (
            "--make-reference {cache} --out {none} --image-size 8 --csv x",
            "--csv and --image-size: no effect with --make-reference of a latent cache",
        ),
        ("--ckpt {ckpt} --reference {real} --keep-samples {samples}", "holds 000.png and more .*; choose another"),
        ("--reference {real}", "one of the arguments"),
    ],
)
def test_bad_input_is_one_line(evaluate, samples, real, image_ckpt, clip_folder, tmp_path, flags, words):
    big = write_pictures(tmp_path / "big", 2, size=16)
    write_pictures(tmp_path / "mixed", 3)
    Image.new("RGB", (16, 16)).save(tmp_path / "mixed" / "9.png")
    write_pictures(tmp_path / "odd", 3)
    (tmp_path / "odd" / "1.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4")
    np.savez(tmp_path / "floats.npz", np.zeros((3, 8, 8, 3), np.float32))
    np.savez(tmp_path / "other.npz", mu=np.zeros(9), sigma=np.eye(9))
    made = json.dumps({"features": {"digest": "0" * 64}})
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(6), sigma=np.eye(6), made=made)
    np.savez(tmp_path / "half.npz", mu=np.zeros(6))
    np.savez(tmp_path / "strange.npz", mu=np.zeros(6), sigma=np.eye(6), made="[1]")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text("{}")
    names = ("cut", "floats", "other", "foreign", "half", "strange")
    places = {name: tmp_path / f"{name}.npz" for name in names}
    places |= {name: tmp_path / name for name in ("empty", "mixed", "odd", "none", "cache")}
    places |= {"samples": samples, "real": real, "big": big, "ckpt": image_ckpt, "clips": clip_folder}
    filled = flags.format(**places).split()
    before = {path.name for path in tmp_path.iterdir()}
    result = evaluate(*filled)
    assert result.code == 2 and re.search(words, result.err), result.err
    assert result.err.count("\n") == 1 and not (tmp_path / "r.json").exists()
    assert {path.name for path in tmp_path.iterdir()} - before <= {"r.json.progress"}


def test_a_kill_goes_on_where_it_was(evaluate, samples, real, tmp_path, monkeypatch):
    straight = evaluate("--samples", samples, "--reference", real, out="straight.json").figures
    monkeypatch.setattr(collect, "SAVED_EVERY", 0.0)
    look = FlatInception.__call__

    def dies(self, images):
        if self.seen >= 40:
            os._exit(9)
        return look(self, images)

    def killed():
        FlatInception.__call__ = dies
        evaluate("--samples", samples, "--reference", real)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 9 and len(list((tmp_path / "r.json.progress").glob("*.pt"))) == 11
    seen = []
    monkeypatch.setattr(FlatInception, "__call__", lambda self, x: (seen.append(len(x)), look(self, x))[1])
    same(evaluate("--samples", samples, "--reference", real).figures, straight)
    assert sum(seen) == 52 - 42, "only what was left"
    assert not (tmp_path / "r.json.progress").exists()


def test_a_signal_loses_no_batch(evaluate, samples, real, tmp_path, monkeypatch):
    straight = evaluate("--samples", samples, "--reference", real, out="straight.json").figures
    look = FlatInception.__call__

    def interrupted(self, images):
        if self.seen >= 20:
            raise KeyboardInterrupt
        return look(self, images)

    monkeypatch.setattr(FlatInception, "__call__", interrupted)
    stopped = evaluate("--samples", samples, "--reference", real)
    assert stopped.code == 130 and "run the same command again" in stopped.err
    monkeypatch.setattr(FlatInception, "__call__", look)
    same(evaluate("--samples", samples, "--reference", real).figures, straight)


def as_two_ranks(argv):
    """The command on two gloo ranks, forked from this process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def run(rank):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port
        )
        script = load_script("evaluate")
        sys.argv = ["evaluate.py", *map(str, argv)]
        script.main()

    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_two_ranks_give_the_same_figures(evaluate, samples, real, image_ckpt, weights, tmp_path):
    for name, judged in {"folder": ["--samples", samples], "model": ["--ckpt", image_ckpt, *SHORT]}.items():
        flags = [*judged, "--reference", real]
        one = evaluate(*flags).figures
        two = tmp_path / f"{name}.json"
        as_two_ranks([*flags, "--inception", weights, "--json", two, "--device", "cpu"])
        same(json.loads(two.read_text())["results"][0], one)
        assert not (tmp_path / f"{name}.json.progress").exists()
