"""The benchmark: its contenders do the same work, its ratios are right, its files are written."""

import argparse
import json
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from EqM.data import autoencoder as latents
from EqM.engine import acceleration
from EqM.engine.precision import Precision
from EqM.measure import benchmark, contenders

CPU = torch.device("cpu")


def test_features_are_the_same_by_either_recipe(tiny, inception_file):
    args, run_in = tiny("--inception", inception_file), Precision("fp32", CPU, "test")
    ours, plain = contenders.Features(args, run_in), contenders.PlainFeatures(args, run_in)
    plain.images.images = ours.source.images.movedim(-1, 1).contiguous()
    assert torch.equal(ours().features, plain()["2048"])


def test_ratios_are_taken_within_work_recipe_and_precision():
    speeds = {
        ("train", "ours", "fp32"): 2.0,
        ("train", "plain", "fp32"): 1.0,
        ("train", "ours", "bf16"): 6.0,
        ("train", "plain", "bf16"): 3.0,
        ("encoding", "ours", "bf16"): 0.5,
        ("encoding", "plain", "bf16"): 0.25,
        ("cached", "ours", "bf16"): 5.0,
        ("sample", "ours", "bf16"): 9.0,
    }
    keys = ("work", "recipe", "precision")
    rows = [{**dict(zip(keys, who, strict=True)), "steps/s": v, "TFLOP/s": v, "GiB": None} for who, v in speeds.items()]
    benchmark.add_ratios(rows, {"fp32": 4e12, "bf16": 20e12})
    assert [row["x fp32"] for row in rows] == [1, 1, 3, 3, None, None, None, None]
    assert [row["x plain"] for row in rows] == [2, 1, 2, 1, 2, 1, 20, None]
    assert [row["x encoding"] for row in rows] == [None] * 6 + [10, None]
    assert [row["of peak"] for row in rows[:3]] == [0.5, 0.25, 0.3]
    table = benchmark.markdown(rows).splitlines()
    assert len(table) == 10 and table[0].startswith("| work | recipe | precision |") and "GiB" not in table[0]
    assert table[-1].endswith("| 45 % | - | - | - |")


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 64, 100, 1000])
def test_the_largest_batch_is_found_to_within_an_eighth(limit):
    tried = []
    found = benchmark.largest(lambda batch: tried.append(batch) or batch <= limit)
    assert found <= limit <= found * 9 / 8 and len(tried) <= 20


@pytest.fixture
def tiny(monkeypatch):
    """tiny(*flags): the benchmark's arguments for a tiny model on the CPU."""

    def parse(*flags):
        line = "benchmark.py --model EqM-T/4 --image-size 32 --batch-size 2 --num-workers 0 --device cpu"
        monkeypatch.setattr("sys.argv", [*line.split(), *map(str, flags)])
        return benchmark.parse_args()

    return parse


@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1)])
def test_both_recipes_make_the_same_step(tiny, name, tolerance):
    args, run_in = tiny(), Precision(name, CPU, "test")
    results = []
    for recipe in (contenders.Training, contenders.PlainTraining):
        torch.manual_seed(0)
        run = recipe(args, run_in, contenders.from_batch(args, run_in))
        start, losses = parameters_to_vector(run.model.parameters()).detach(), []
        for step in range(3):
            torch.manual_seed(step)
            losses.append(float(run()))
        results.append((torch.tensor(losses), parameters_to_vector(run.model.parameters()).detach() - start))
    (losses, moved), (plain_losses, plainly_moved) = results
    torch.testing.assert_close(losses, plain_losses, rtol=1e-3, atol=0)
    assert (moved - plainly_moved).norm() < tolerance * plainly_moved.norm()


@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 0), ("bf16", 1e-3)])
def test_both_recipes_draw_the_same_sample(tiny, name, tolerance):
    args, run_in = tiny(), Precision(name, CPU, "test")
    ends = []
    for recipe in (contenders.Sampling, contenders.PlainSampling):
        torch.manual_seed(0)
        run = recipe(args, run_in)
        for weight in run.model.final_layer.parameters():  # zero at the start, and so would be the field
            weight.data.normal_(std=0.1)
        ends.append(run())
    assert not torch.equal(ends[0], run.x)
    torch.testing.assert_close(*ends, rtol=0, atol=tolerance)


@pytest.mark.parametrize("video", ["--video", "--no-video"])
@pytest.mark.parametrize("inputs", [contenders.from_cache, contenders.from_files, contenders.from_batch])
def test_every_source_of_inputs_feeds_the_network(tiny, tiny_vae, monkeypatch, video, inputs):
    vae = latents.load(tiny_vae, Precision("fp32", CPU, "test"))  # 4 pixels a latent, and Stable Diffusion's has 8
    monkeypatch.setattr(vae, "encode", lambda pixels: latents.draw(vae.posterior(pixels[..., ::2, ::2])))
    monkeypatch.setattr(contenders, "stable_diffusion_vae", lambda run_in: vae)
    args, run_in = tiny(video), Precision("fp32", CPU, "test")
    run = contenders.Training(args, run_in, inputs(args, run_in))
    losses = [run().item() for _ in range(2)]
    assert all(1 < loss < 100 for loss in losses)


def test_a_contender_is_gone_after_its_turn_and_one_that_does_not_fit_has_a_row_of_dashes(tiny, monkeypatch):
    args = tiny("--rounds", 1, "--steps", 1, "--precisions", "bf16", "--grad-checkpointing")
    alive = []

    def fits(args, run_in):
        run = contenders.OURS["train"](args, run_in)
        alive.append(weakref.ref(run.model))
        return run

    def does_not(args, run_in):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(benchmark, "RECIPES", {"ours": {"train": fits}, "plain": {"train": does_not}})
    with ThreadPoolExecutor(1) as here:
        rows = benchmark.contest(args, "train", {"ours": here, "plain": here})
    assert [reference() for reference in alive] == [None]
    benchmark.add_ratios(rows, {"bf16": 1e12})
    fitting, other = rows
    assert fitting["steps/s"] > 0 and fitting["x plain"] is None and other["steps/s"] is None
    assert benchmark.markdown(rows).splitlines()[-1].startswith("| train | plain | bf16 | - | - |")


def test_operations_are_those_of_the_batch_and_of_nothing_recomputed(tiny):
    few, many = (tiny("--batch-size", n, "--precisions", "fp32") for n in (2, 6))
    again = tiny("--batch-size", 2, "--precisions", "bf16", "--grad-checkpointing")
    assert 3 * benchmark.operations(few, "train") == benchmark.operations(many, "train")
    assert benchmark.operations(few, "train") == pytest.approx(benchmark.operations(again, "train"), rel=0.02)
    assert benchmark.operations(few, "sample") > 0


def test_one_command_writes_a_row_for_each_contender(run_script, small_peak, tmp_path):
    words = "--model EqM-T/4 --image-size 32 --batch-size 1 --rounds 1 --steps 1 --num-workers 0 --device cpu"
    work = ["--work", "train", "sample", "cached", "--against", "plain", "--profile"]
    result = run_script("benchmark", *words.split(), *work, "--out", tmp_path)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "benchmark.json").read_text())
    named = {(row["work"], row["recipe"], row["precision"]) for row in rows}
    assert len(named) == len(rows) == 2 * 2 * 2 + 2, "the plain recipe has no cache"
    assert all(row["steps/s"] > 0 and row["TFLOP/s"] > 0 for row in rows)
    assert (tmp_path / "benchmark.md").read_text() in result.out and (tmp_path / "benchmark.png").exists()
    assert len(list(tmp_path.glob("profile-*.txt"))) == len(rows)
    assert "aten::addmm" in (tmp_path / "profile-train-ours-bf16.txt").read_text()


def test_every_flag_of_acceleration_reaches_the_step_that_is_timed(tiny):
    words = ["--compile", "--recompute", "nothing", "--grad-checkpointing", "--no-fused-kernels"]
    given, plain = (contenders.train_args(tiny(*flags), ["--latents", "none"]) for flags in (words, []))
    assert [getattr(given, name) for name in acceleration.FLAGS] == [True, "nothing", True, True]
    assert [getattr(plain, name) for name in acceleration.FLAGS] == [False, None, False, False]
    parser = argparse.ArgumentParser()
    acceleration.add_flags(parser)
    assert set(vars(parser.parse_args([]))) == set(acceleration.FLAGS)


@pytest.mark.parametrize(
    "flags", ["--rounds 0", "--steps x", "--work fly", "--precisions int8", "--image-size 20", "--largest-batch"]
)
def test_bad_arguments_are_one_line(run_script, tmp_path, flags):
    result = run_script("benchmark", "--device", "cpu", "--out", tmp_path / "out", *flags.split())
    assert result.code == 2 and result.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_autoencoder_of_stable_diffusions_shape():
    with torch.device("meta"):
        vae = contenders.stable_diffusion_vae(Precision("fp32", torch.device("meta"), "test"))
    assert sum(p.numel() for p in vae.network.parameters()) == pytest.approx(83.65e6, rel=1e-3)
