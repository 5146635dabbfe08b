"""The comparison of precisions: its files, its arithmetic, errors against FP64, and gradients that FP16 loses."""

import csv
import importlib
import sys
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import score_demo
from EqM import sample_gd, train
from EqM.data import autoencoder as latents
from EqM.data import files as data
from EqM.engine import precision
from EqM.engine.trainer import Trainer
from EqM.measure import compare_precisions, precision_error, precisions_report
from EqM.measure.precision_error import Subject
from EqM.metrics import features
from EqM.models import EqM_models
from EqM.run.errors import UserError
from EqM.transport import Transport
from helpers import TinyNetwork

CPU = torch.device("cpu")
TINY = "--vae none --image-size 8 --model EqM-T/4 --global-batch-size 4 --num-workers 0 --ema-decay .5 --lr .01".split()  # noqa: SIM905
FILES = ["report.md", "precision_error.md", "loss.png", "history.png", "samples.png", "history.csv"]


class Faint(Transport):
    """A loss so small that its gradients lie under FP16's smallest number, 6e-8."""

    def loss(self, output, point):
        return 1e-7 * super().loss(output, point)


def subject(transport=None, vae=None, points=5):
    """A tiny model with no zero weights, on random data; vae: a folder."""
    torch.manual_seed(0)
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=6).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    vae = vae and latents.load(vae, precision.fp32(CPU))
    x1, transport = torch.randn(4, 4, 8, 8), transport or Transport()
    return Subject(
        model=model, ema=model, vae=vae, transport=transport, x1=x1, point=transport.sample(x1),
        labels=torch.arange(4), noise=torch.randn(4, 4, 8, 8), pixels=vae and vae.decode(x1), stepsize=0.05,
        points=points,
    )  # fmt: skip


@pytest.fixture(scope="module")
def errors(tiny_vae):
    return precision_error.errors_of(subject(vae=tiny_vae), CPU)


VECTORS = (
    "field", "output of x_embedder", "output of blocks.3", "field, MLP alone", "field, adaLN modulation alone",
    "gradient, all weights", "gradient, blocks.0", "gradient, blocks.*.attn.qkv", "energy's field dE/dx, dot",
    "energy's field dE/dx, l2", "gradient through the energy, dot", "VAE latents, mean", "VAE pixels",
    "field, guidance 1.5", "trajectory, gd, guidance 1", "trajectory, gd, guidance 4", "trajectory, ngd, guidance 1.5",
)  # fmt: skip


@pytest.mark.parametrize("row", VECTORS)
def test_bf16_errs_more_than_fp16_and_fp16_more_than_fp32(errors, row):
    fp32, bf16, fp16 = (errors[row][column] for column in ("fp32", "bf16 throughout", "fp16 throughout"))
    assert 0.1 > bf16 > 2 * fp16 > 0 and fp16 > 20 * fp32 > 0
    assert fp32 < 1e-5


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_islands_take_out_what_their_parts_err(errors, name):
    for words in ("patch embedding", "time embedding", "adaLN modulation", "last layer"):
        error = errors[f"field, {words} alone"]
        assert error[name] == error["fp32"] < error[f"{name} throughout"]
    for words in ("attention", "MLP"):
        error = errors[f"field, {words} alone"]
        assert error[name] == error[f"{name} throughout"] > error["fp32"]
    for row in ("field", "field, guidance 4", "trajectory, gd, guidance 1", "trajectory, ngd, guidance 4"):
        assert errors[row][name] < errors[row][f"{name} throughout"]


def test_the_table_has_every_operation_guidance_and_sampler(errors):
    rows = list(errors)
    for scale in ("1", "1.5", "4"):
        assert {
            f"field, guidance {scale}",
            f"trajectory, gd, guidance {scale}",
            f"trajectory, ngd, guidance {scale}",
        } <= {*rows}
    for sampler in precision_error.OTHERS:
        error = errors[f"trajectory, {sampler}, guidance 4"]
        assert 0 < error["fp32"] < error["fp16"] < error["bf16"] < 0.05
    assert {"loss", "dispersive loss", "energy, dot", "energy, l2", "VAE latents, deviation"} <= {*rows}
    shares = {"final_layer": (0.5, 0.0)}
    text = precision_error.markdown(
        errors, {"step 5": (shares | {"blocks.0": (1, 0)}, 65536.0), "step 9": (shares, 8.0)}
    )
    assert all(f"| {row} | " in text for row in rows) and "nan" not in text and "not finite" not in text
    assert "| step 5, unscaled | step 5, scaled by 65536 | step 9, unscaled | step 9, scaled by 8 |" in text
    assert "| final_layer | 50.00 % | 0.00 % | 50.00 % | 0.00 % |" in text
    assert "| blocks.0 | 100.00 % | 0.00 % | none | none |" in text


def test_the_reference_is_fp64_throughout(tiny_vae):
    one = subject(vae=tiny_vae)
    with precision_error.KeepDouble():
        exact = precision_error.quantities(one.double(), precision.fp32(CPU))
    assert {value.dtype for value in exact.values()} == {torch.float64}
    model, point = one.double().model, one.double().point
    loss = (model(point.xt, point.t, one.labels) - point.target).square().mean()
    assert exact["loss"].item() == pytest.approx(loss.item(), rel=1e-13)
    assert {p.dtype for p in one.model.parameters()} == {torch.float32}, "the subject itself is left alone"


def test_one_part_alone_errs_less_than_all_together(errors):
    for row in ("field", "trajectory, gd"):
        alone = [errors[f"{row}, {words} alone"]["bf16 throughout"] for words in precision_error.PARTS]
        together = errors["field" if row == "field" else f"{row}, guidance 1"]["bf16 throughout"]
        assert all(0 < error < together for error in alone)


def test_measuring_leaves_the_model_as_it_was():
    one, run_in = subject(points=2), precision_error.resolve("bf16", CPU)
    before = one.model(one.point.xt, one.point.t, one.labels)
    precision_error.quantities(one, run_in)
    assert one.model.ebm == "none" and all(p.grad is None for p in one.model.parameters())
    assert torch.equal(one.model(one.point.xt, one.point.t, one.labels), before)


def test_the_scaler_keeps_gradients_that_vanish_without_it():
    zeros, scale = precision_error.zeros_of(subject(Faint()), CPU)
    assert scale > 1 and {"x_embedder", "blocks.0", "blocks.*.mlp.fc1", "final_layer"} <= zeros.keys()
    sixteen_bit = [zeros[f"blocks.*.{layer}"] for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert all(without > 0.9 and with_scaler < 0.5 for without, with_scaler in sixteen_bit)
    assert zeros["final_layer"] == (0, 0), "an FP32 island loses nothing"


def test_gradients_that_no_precision_has_do_not_count():
    """Labels 4 and 5 are in no sample; blocks without a gradient have no row."""
    exact = {"y_embedder.table": torch.tensor([1.0, 2.0, 0.0, 0.0]), "blocks.0.attn.qkv.weight": torch.zeros(2)}
    found = {"y_embedder.table": torch.tensor([0.0, 2.0, 0.0, 0.0]), "blocks.0.attn.qkv.weight": torch.zeros(2)}
    assert precision_error.vanished(found, exact) == {"y_embedder": 0.5}


def test_the_scale_falls_until_gradients_are_finite():
    class Loud(Transport):
        def loss(self, output, point):
            return 3e4 * super().loss(output, point)

    loss, gradients, scale = precision_error.gradients_of_loss(subject(Loud()), precision_error.resolve("fp16", CPU))
    assert 1 <= scale < 65536 and torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def steps(name, scaled, count=5):
    """The change of all 16-bit layers over some steps of train.py on a faint loss, and how many were applied."""
    one, run_in = subject(Faint()), precision_error.resolve(name, CPU)
    trainer = Trainer(train.parse_args(["--latents", "none", "--lr", "1e-3"]), one.model, run_in, count)
    trainer.transport = one.transport
    if not scaled:
        trainer.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def weights():
        layers = [layer for block in one.model.blocks for layer in (block.attn, block.mlp)]
        return torch.cat([p.detach().flatten() for layer in layers for p in layer.parameters()])

    start = weights()
    torch.manual_seed(0)
    applied = sum(trainer.step(repeat((one.x1, one.labels)))[2].item() for _ in range(count))
    return weights() - start, applied


def test_fp16_training_stalls_without_scaling_and_goes_on_with_it():
    expected, _ = steps("fp32", scaled=False)
    stalled, applied = steps("fp16", scaled=False)
    assert applied == 5 and not stalled.any(), "steps are taken, and no weight moves"
    moved, _ = steps("fp16", scaled=True)
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.95
    assert moved.norm() == pytest.approx(expected.norm().item(), rel=0.1)


class Asked:
    """The arguments that say where a comparison lies, and what judges it."""

    inception = i3d = None
    precisions = ("fp32",)

    def __init__(self, out, reference=None):
        self.out = out
        self.reference = reference


def test_psnr_of_known_errors():
    black = [np.zeros((2, 4, 4, 3), np.uint8) for _ in range(2)]
    grey = [black[0] + 5, black[1]]
    whole, worst = compare_precisions.psnr(grey, black)
    assert whole == pytest.approx(10 * np.log10(255**2 / 12.5)) and worst == pytest.approx(10 * np.log10(255**2 / 25))
    assert compare_precisions.psnr(black, black) == (np.inf, np.inf)
    assert precisions_report.decibels(np.inf) == "identical"


def test_the_class_score_is_that_of_the_demo():
    clips, names = score_demo.load_set(compare_precisions.DATASETS / "demo")
    assert compare_precisions.share_right(clips[:2], names[:2]) == 1
    assert compare_precisions.share_right(clips[:2], [names[0], names[-1]]) == 0.5


@pytest.fixture
def in_process(monkeypatch):
    """Run the scripts of a comparison in this process, one by one: a new one takes seconds to begin."""
    begun = []

    def run_all(tasks, jobs, threads, words):
        for script, argv, _ in tasks:
            begun.append(script)
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [script, *map(str, argv)])
                importlib.import_module(script).main()

    monkeypatch.setattr(compare_precisions, "run_all", run_all)
    return begun


def test_a_comparison_writes_every_file_and_goes_on_where_it_was(
    run_script, in_process, image_folder, tmp_path, monkeypatch
):
    out = tmp_path / "compare"
    ours = [
        "--out", out, "--steps", 6, "--seeds", 2, "--num-samples", 3, "--num-sampling-steps", 3, "--stepsize", 0.5,
        "--device", "cpu",
    ]  # fmt: skip
    result = run_script("compare_precisions", *ours, "--", "--data-path", image_folder, *TINY)
    assert result.code == 0, result.err
    assert [name for name in FILES if not (out / name).exists()] == []
    assert in_process.count("EqM.train") == 7 and in_process.count("EqM.sample_gd") == 18
    report = (out / "report.md").read_text()
    assert "| trained in | sampled in FP32 | sampled in BF16 | sampled in FP16 |" in report
    assert all(f"| {name} | " in report for name in ("FP32", "BF16", "FP16")) and report.count(" dB (worst ") > 3
    assert "show their class" not in report, "no class score but of the demo set"
    assert "Relative error against FP64" in report and "| step 5, unscaled | " in report and "nan" not in report
    with open(out / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 6
    fp32, bf16, fp16 = ([row for row in rows if row["precision"] == name] for name in ("fp32", "bf16", "fp16"))
    assert {row["Scale"] for row in fp32 + bf16} == {"1.0"} and float(fp16[0]["Scale"]) > 1
    first = [float(each[0]["Train Loss"]) for each in (fp32, bf16, fp16)]
    assert first == pytest.approx([first[0]] * 3, rel=1e-2), "the same weights, data and noise"
    assert fp32[0]["Train Loss"] != fp32[6]["Train Loss"], "of another seed"

    in_process.clear()
    monkeypatch.setattr(precision_error, "main", lambda: None)  # which is done anew each time
    assert run_script("compare_precisions", *ours, "--", "--data-path", image_folder, *TINY).code == 0
    assert "EqM.train" not in in_process
    ours[3] = 7
    other = run_script("compare_precisions", *ours, "--", "--data-path", image_folder, *TINY)
    assert other.code == 2 and "holds another comparison (steps differ)" in other.err


def test_cells_are_judged_against_a_reference_and_held_out_loss_is_told(
    run_script, in_process, image_folder, tmp_path, monkeypatch
):
    tiny = SimpleNamespace(inception=TinyNetwork(), motion=None, told=lambda: {"digest": "tiny", "published": False})
    monkeypatch.setattr(features, "load", lambda *given, **more: tiny)
    (tmp_path / "reference").mkdir()
    for i, grey in enumerate((0, 60, 200)):
        Image.new("RGB", (8, 8), (grey, 90, 255 - grey)).save(tmp_path / "reference" / f"{i}.png")
    ours = [
        "--out", tmp_path / "out", "--steps", 5, "--seeds", 2, "--num-samples", 3, "--num-sampling-steps", 3,
        "--stepsize", 0.5, "--device", "cpu", "--reference", tmp_path / "reference", "--precisions", "fp32",
    ]  # fmt: skip
    words = [*ours, "--", "--data-path", image_folder, *TINY, "--val-path", image_folder, "--val-every", 5]
    monkeypatch.setattr(precision_error, "main", lambda: (tmp_path / "out/precision_error.md").write_text("errors"))
    assert run_script("compare_precisions", *words).code == 0
    report = (tmp_path / "out" / "report.md").read_text()
    name, figures = compare_precisions.judged(Asked(tmp_path / "out", tmp_path / "reference"), "fp32", "fp32", [0, 1])
    assert f"| FP32 | {name} {np.mean(figures):.2f} ± " in report and f"against {tmp_path / 'reference'}" in report
    with open(next((tmp_path / "out/runs/fp32-seed1-5steps").glob("*/metrics.csv")), newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["EMA Val Loss"]) > 0
    assert "held-out loss (EMA)" in report and in_process.count("EqM.evaluate") == 2
    in_process.clear()
    assert run_script("compare_precisions", *words).code == 0 and "EqM.evaluate" not in in_process


def test_judges_may_come_later_and_be_others(tmp_path):
    words = ["--out", str(tmp_path), "--steps", "5"]
    files = []
    for judges in ([], ["--reference", "a.npz"], ["--reference", "b.npz"], ["--reference", "b.npz", "--i3d", "i3d.pt"]):
        args = compare_precisions.parse_args([*words, *judges])
        compare_precisions.open_out(args)
        files.append(compare_precisions.figures_file(args, "fp32", "bf16", 0))
        assert len(compare_precisions.judging_tasks(args, [0])) == (9 if judges else 0)
        files[-1].write_text("{}")
        assert len(compare_precisions.judging_tasks(args, [0])) == (8 if judges else 0)
    assert len(set(files)) == 4
    with pytest.raises(UserError, match=r"holds another comparison \(steps differ\)"):
        compare_precisions.open_out(compare_precisions.parse_args([*words[:-1], "6"]))


def test_runs_of_before_and_of_now_are_told_together(tmp_path, monkeypatch):
    """metrics.csv of the first has fewer columns, and one is empty here and there."""
    tables = ["step,Train Loss\n1,3\n2,2\n", "step,Train Loss,Val Loss,EMA Val Loss\n1,5,7,\n2,4,,\n2,,8,9\n"]
    for seed, text in enumerate(tables):
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}/metrics.csv").write_text(text)
    monkeypatch.setattr(compare_precisions, "checkpoint_of", lambda args, name, seed: tmp_path / f"{seed}/x/y.pt")
    for seeds in ([0, 1], [1, 0]):
        found, held_out = compare_precisions.histories(Asked(tmp_path), seeds)
        assert {*found["fp32"]} == {"step", "Train Loss"} and list(held_out["fp32"]) == [9]
        assert found["fp32"]["Train Loss"].tolist() == [[[3, 2], [5, 4]][seed] for seed in seeds]
        with open(tmp_path / "history.csv", newline="") as file:
            rows = {(row["seed"], row["step"]): row["Val Loss"] for row in csv.DictReader(file)}
        assert rows == {("0", "1"): "", ("0", "2"): "", ("1", "1"): "7", ("1", "2"): ""}


def test_the_demo_is_the_default_and_its_commands_are_good(monkeypatch, tmp_path):
    args = compare_precisions.parse_args(["--out", str(tmp_path)])
    assert (args.seeds, args.num_sampling_steps, args.cfg_channels, args.train) == (3, 50, 4, [])
    tasks = compare_precisions.training_tasks(args, range(3))
    assert len(tasks) == 10
    monkeypatch.setattr(
        compare_precisions, "checkpoint_of", lambda args, name, seed, steps=None: tmp_path / f"{name}{seed}.pt"
    )
    tasks += compare_precisions.sampling_tasks(args, range(3))
    assert len(tasks) == 10 + 27
    for script, argv, _ in tasks:
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        {"EqM.train": train, "EqM.sample_gd": sample_gd}[script].parse_args()
    labels, _ = data.find_files(compare_precisions.DATASETS / "demo", clips=True)[1:]
    assert compare_precisions.DEMO_CLASSES and len(set(labels)) == len(compare_precisions.DEMO_CLASSES)
    published = compare_precisions.parse_args(["--", "--data-path", "x"])
    assert (published.num_sampling_steps, published.cfg_channels, published.train) == (250, 3, ["--data-path", "x"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--", "--use-amp"], "--use-amp after -- is set by the comparison itself"),
        (["--", "--max-steps=3"], "--max-steps=3 after -- is set"),
        (["--seeds", "0"], "argument --seeds"),
        (["--precisions", "fp8"], "argument --precisions"),
        (["--data-path", "x"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_one_line(run_script, argv, words):
    result = run_script("compare_precisions", *argv)
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1


def test_a_script_that_fails_is_named_with_its_last_line(tmp_path):
    task = ("EqM.train", ["--latents", "/nowhere", "--device", "cpu"], tmp_path / "log.txt")
    with pytest.raises(UserError, match=r"EqM.train failed; .*log.txt ends: train.py: error: --latents /nowhere"):
        compare_precisions.run_all([task], 1, 1, "train")


def test_a_folder_that_cannot_be_used_is_one_line(run_script, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_script("compare_precisions", "--out", tmp_path / "file", "--device", "cpu")
    assert result.code == 2 and "cannot be used" in result.err


def test_precision_error_needs_to_know_the_data(run_script, tmp_path):
    model = EqM_models["EqM-T/4"](input_size=8, num_classes=2, in_channels=3)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    words = ["--ckpt", tmp_path / "bare.pt", "--model", "EqM-T/4", "--num-classes", 2, "--vae", "none"]
    result = run_script("precision_error", *words, "--image-size", 8, "--device", "cpu")
    assert result.code == 2 and "give either --data-path or --latents" in result.err


def test_the_yardstick_is_the_spread_between_seeds():
    losses = {"fp32": np.array([1.0, 1.2, 1.4]), "bf16": np.array([1.05, 1.25, 1.45])}
    assert "deviates by 0.2000; BF16's mean difference from FP32 is 0.250 of that" in compare_precisions.yardstick(
        losses
    )
    alone = {name: values[:1] for name, values in losses.items()}
    assert "no yardstick" in compare_precisions.yardstick(alone)
