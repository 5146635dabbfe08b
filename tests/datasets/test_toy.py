"""The two-dimensional playground: its sets, its energies, and that a short training already brings samples to data."""

import numpy as np
import pytest
import torch
from PIL import Image

import toy
from EqM.samplers import SAMPLERS
from EqM.transport import Transport

SETS = ("moons", "gaussians", "spiral")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_of_about_unit_variance_and_follows_its_seed(name):
    data = toy.draw_data(name, 4000, generator())
    assert torch.equal(data, toy.draw_data(name, 4000, generator()))
    assert data.abs().max() < toy.REACH
    assert data.mean(0).abs().max() < 0.5 and 0.6 < data.std(0).mean() < 1.2


def test_the_gaussians_are_eight():
    data = toy.draw_data("gaussians", 4000, generator())
    angles = torch.atan2(data[:, 1], data[:, 0]).div(torch.pi / 4).round().remainder(8)
    assert angles.unique().numel() == 8 and (data.norm(dim=1) - 1.5).abs().max() < 0.2


@pytest.mark.parametrize("ebm", ["dot", "l2"])
def test_the_field_is_the_gradient_of_the_energy_in_sampling_and_training(ebm):
    torch.manual_seed(0)
    model, t = toy.Toy(ebm).double(), torch.zeros(3)
    x, step = torch.randn(3, 2, dtype=torch.float64), torch.tensor([1e-6, 0.0], dtype=torch.float64)
    slope = (model.potential(x + step) - model.potential(x - step)) / 2e-6
    with torch.no_grad():
        torch.testing.assert_close(model(x, t)[:, 0], slope, rtol=1e-6, atol=1e-8)
    model(x, t).square().sum().backward()
    assert all(parameter.grad is not None for parameter in list(model.parameters())[:-1])


def test_a_short_training_brings_samples_nearer_to_the_data():
    torch.manual_seed(0)
    data, noise = toy.draw_data("gaussians", 1000, generator()), torch.randn(200, 2, generator=generator(1))
    model = toy.Toy()
    toy.train(model, Transport(), data, 300)
    end, tracks = toy.follow(model, noise, "gd", toy.STEPSIZE, 0)
    assert tracks.shape == (toy.POINTS, toy.TRACKS, 2) and torch.equal(tracks[0], noise[: toy.TRACKS])
    assert torch.equal(tracks[-1], end[: toy.TRACKS])
    assert toy.distances(end, data)[0] < 0.5 * toy.distances(noise, data)[0]


def test_distances_by_hand():
    samples, data = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert toy.distances(samples, data) == pytest.approx((1, 3))


@pytest.mark.parametrize(
    ("name", "ebm", "sampler"), [(SETS[0], "none", "dopri5"), (SETS[1], "dot", "langevin"), (SETS[2], "l2", "adam")]
)
def test_the_command_prints_a_row_and_draws_one_for_each_c(run_script, monkeypatch, tmp_path, name, ebm, sampler):
    monkeypatch.setattr(toy, "SCHEDULES", {"default": {}, "constant": {"c_schedule": "constant", "c_scale": 1.0}})
    monkeypatch.setattr(toy, "SAMPLES", 60)
    monkeypatch.setattr(toy, "POINTS", 20)
    out = tmp_path / "new" / "toy.png"
    result = run_script("toy", "--data", name, "--ebm", ebm, "--sampler", sampler, "--steps", 3, "--out", out)
    assert result.code == 0, result.err
    rows = [line.split() for line in result.out.splitlines() if line.startswith(("default", "constant"))]
    assert [len(row) for row in rows] == [5, 5] and all(0 < float(value) < 5 for row in rows for value in row[1:])
    assert rows[0][1:3] == rows[0][3:] and rows[1][1:3] != rows[1][3:], "the step size follows lambda"
    picture = np.asarray(Image.open(out))
    assert picture.std() > 10 and sampler in SAMPLERS


@pytest.mark.parametrize("out", ["toy.txt", ".", "file/toy.png"])
def test_a_picture_that_cannot_be_written_is_told_before_anything_is_learned(run_script, tmp_path, out):
    (tmp_path / "file").write_text("")
    result = run_script("toy", "--out", tmp_path / out)
    assert result.code == 2 and "--out" in result.err and result.err.count("\n") == 1 and not result.out
