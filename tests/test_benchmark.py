"""The benchmark: its contenders do the same work, its ratios are right, its files are written."""

import json

import pytest
import torch

import benchmark
from precision import Precision


def test_ratios_are_taken_within_work_recipe_and_precision():
    speeds = {("ours", "fp32"): 2.0, ("plain", "fp32"): 1.0, ("ours", "bf16"): 6.0, ("plain", "bf16"): 3.0}
    rows = [{"work": "train", "recipe": r, "precision": p, "steps/s": s} for (r, p), s in speeds.items()]
    rows.append({"work": "sample", "recipe": "ours", "precision": "bf16", "steps/s": 9.0})
    benchmark.add_ratios(rows)
    assert [row["x fp32"] for row in rows] == [1, 1, 3, 3, None]
    assert [row["x plain"] for row in rows] == [2, 1, 2, 1, None]
    table = benchmark.markdown(rows).splitlines()
    assert len(table) == 7 and table[0].startswith("| work | recipe | precision |") and table[-1].endswith("| - | - |")


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 64, 100, 1000])
def test_the_largest_batch_is_found_to_within_an_eighth(limit):
    tried = []
    found = benchmark.largest(lambda batch: tried.append(batch) or batch <= limit)
    assert found <= limit <= found * 9 / 8 and len(tried) <= 20


@pytest.fixture
def tiny(monkeypatch):
    line = "benchmark.py --model EqM-T/4 --image-size 32 --batch-size 2 --device cpu"
    monkeypatch.setattr("sys.argv", line.split())
    return benchmark.parse_args()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_both_recipes_make_the_same_step(tiny, name):
    run_in = Precision(name, torch.device("cpu"), "test")
    results = []
    for recipe in (benchmark.Training, benchmark.PlainTraining):
        torch.manual_seed(0)
        run = recipe(tiny, run_in)
        losses = []
        for step in range(3):
            torch.manual_seed(step)
            losses.append(float(run()))
        weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
        results.append((torch.tensor(losses), weights))
    torch.testing.assert_close(*(losses for losses, _ in results), rtol=1e-3, atol=0)
    torch.testing.assert_close(*(weights for _, weights in results), rtol=1e-3, atol=1e-4)


def test_one_command_writes_a_row_for_each_contender(run_script, tmp_path):
    words = "--model EqM-T/4 --image-size 32 --batch-size 1 --rounds 1 --steps 1 --device cpu --against plain"
    result = run_script("benchmark", *words.split(), "--work", "train", "sample", "cached", "--out", tmp_path)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "benchmark.json").read_text())
    named = {(row["work"], row["recipe"], row["precision"]) for row in rows}
    assert len(named) == len(rows) == 3 * 2 * 2
    assert all(row["steps/s"] > 0 and row["TFLOP/s"] > 0 for row in rows)
    assert (tmp_path / "benchmark.md").read_text() in result.out


@pytest.mark.parametrize(
    "flags", ["--rounds 0", "--steps x", "--work fly", "--precisions int8", "--image-size 20", "--largest-batch"]
)
def test_bad_arguments_are_one_line(run_script, tmp_path, flags):
    result = run_script("benchmark", "--device", "cpu", "--out", tmp_path / "out", *flags.split())
    assert result.code == 2 and result.err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_autoencoder_of_stable_diffusions_shape():
    with torch.device("meta"):
        vae = benchmark.stable_diffusion_vae(Precision("fp32", torch.device("meta"), "test"))
    assert sum(p.numel() for p in vae.network.parameters()) == pytest.approx(83.65e6, rel=1e-3)
