"""The embedded set: small, readable as training reads it, told apart by the rule; its autoencoder."""

import csv
import json

import numpy as np
import pytest
import torch

import make_demo_set
import score_demo
import train_demo_vae
from EqM.data import autoencoder as latents
from EqM.data import media
from EqM.engine.precision import Precision

HERE = score_demo.HERE


@pytest.fixture(scope="module")
def demo():
    return score_demo.load_set(HERE / "demo")


def test_the_set_is_small_and_balanced(demo):
    clips, names = demo
    assert sorted(set(names)) == sorted(make_demo_set.CLASSES) and len(make_demo_set.CLASSES) == 8
    assert {names.count(name) for name in set(names)} == {28}
    size = sum(path.stat().st_size for path in (HERE / "demo").rglob("*") if path.is_file())
    assert size < 700_000
    assert all(clip.shape == (4, 32, 32, 3) for clip in clips)


def test_the_rule_names_every_clip_of_the_set(demo):
    assert [score_demo.score(clip) for clip in demo[0]] == demo[1]


def test_the_rule_follows_reversal_and_colour(demo):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    other = {"red": "blue", "blue": "red"}
    for clip, name in list(zip(*demo, strict=True))[::7]:
        colour, way = name.split("-")
        assert score_demo.score(clip[::-1]) == f"{colour}-{opposite[way]}"
        assert score_demo.score(clip[..., ::-1]) == f"{other[colour]}-{way}"


def test_the_rule_refuses_what_shows_no_class(demo):
    clips, _ = demo
    rng = np.random.default_rng(0)
    assert score_demo.score(np.full((4, 32, 32, 3), 220, np.uint8)) is None
    assert score_demo.score(rng.integers(0, 256, (4, 32, 32, 3), np.uint8)) is None
    assert score_demo.score(np.repeat(clips[0][:1], 4, axis=0)) is None, "stands still"
    assert score_demo.score(clips[0][[0, 2, 1, 3]]) is None, "moves to and fro"
    two_balls = np.minimum(clips[0], np.roll(clips[0], 16, axis=2))
    assert score_demo.score(two_balls) is None


def test_score_of_samples_is_read_from_their_labels(demo, tmp_path, run_script):
    clips, names = demo
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "class"])
        for i in range(4):
            media.save_sample(tmp_path / f"{i}.gif", clips[i], fps=8)
            rows.writerow([f"{i}.gif", 0, names[i] if i else "red-up"])
    result = run_script("score_demo", tmp_path)
    assert result.code == 0 and "samples: 3 of 4 show their class (75.0 %)" in result.out
    assert run_script("score_demo", tmp_path / "nowhere").code == 2


def test_the_autoencoders_own_reconstructions_are_scored_beside(demo, tmp_path, run_script):
    media.save_sample(tmp_path / "0.gif", demo[0][0], fps=8)
    (tmp_path / "labels.csv").write_text(f"file,label,class\n0.gif,0,{demo[1][0]}\n")
    few = tmp_path / "few" / demo[1][0]
    few.mkdir(parents=True)
    for path in sorted((HERE / "demo" / demo[1][0]).iterdir())[:3]:
        (few / path.name).symlink_to(path)
    flags = [tmp_path, "--demo", few.parent, "--vae"]
    result = run_script("score_demo", *flags, HERE / "demo-vae")
    assert result.code == 0 and "the set through the autoencoder: 3 of 3 show their class" in result.out, result.err
    assert "the set through the autoencoder: 3 of 3" in run_script("score_demo", *flags, "none").out
    assert run_script("score_demo", *flags, tmp_path / "nowhere").code == 2


def test_the_set_can_be_made_again(tmp_path, run_script):
    result = run_script("make_demo_set", "--out", tmp_path / "demo")
    assert result.code == 0, result.err
    clips, names = score_demo.load_set(tmp_path / "demo")
    assert [score_demo.score(clip) for clip in clips] == names


def test_the_autoencoder_is_small_and_gives_the_clips_back(demo):
    folder = HERE / "demo-vae"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
    geometry = latents.geometry(str(folder))
    assert (geometry.channels, geometry.space) == (4, 4)
    assert json.loads((folder / "config.json").read_text())["scaling_factor"] == 1.0
    vae = latents.load(str(folder), Precision("fp32", torch.device("cpu"), "test"))
    clips, names = demo
    frames = latents.to_pixels(torch.from_numpy(np.stack(clips[::8])).permute(0, 4, 1, 2, 3))
    torch.manual_seed(0)
    z = vae.encode(frames)
    assert z.mean().abs() < 0.1 and 0.9 < z.std() < 1.1
    kurtosis, correlation = train_demo_vae.shape_of(latents.fold(z))
    assert kurtosis < 4 and correlation < 0.02
    decoded = latents.to_uint8(vae.decode(z)).permute(0, 2, 3, 4, 1).numpy()
    assert [score_demo.score(clip) for clip in decoded] == names[::8]


def test_its_training_lowers_the_error_and_standardises_exactly(monkeypatch):
    monkeypatch.setattr(train_demo_vae, "BATCH", 8)
    torch.manual_seed(0)
    frames = train_demo_vae.load_frames(HERE / "demo")[::32]
    vae = train_demo_vae.build()
    before = train_demo_vae.psnr(vae, frames)
    train_demo_vae.train(vae.train(), frames, steps=12)
    vae.eval()
    assert train_demo_vae.psnr(vae, frames) > before + 3
    plain = vae.decode(vae.encode(frames).latent_dist.mode()).sample
    train_demo_vae.standardise(vae, frames)
    z = train_demo_vae.encode(vae, frames)
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std(dim=(0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
    torch.testing.assert_close(vae.decode(vae.encode(frames).latent_dist.mode()).sample, plain, atol=1e-4, rtol=1e-4)
