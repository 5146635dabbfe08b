"""Evaluator from Python, as training calls it: nothing of the run is touched, and features are taken once."""

import numpy as np
import pytest
import torch

from EqM import EqMPipeline
from EqM.metrics.evaluation import Evaluator
from EqM.metrics.features import Networks
from EqM.metrics.reference import open_reference
from EqM.metrics.sources import Drawn
from EqM.run.distributed import Ranks
from EqM.run.errors import UserError
from helpers import CLIP_ARGS, IMAGE_ARGS, FlatInception, save_checkpoint, write_pictures

ALONE = Ranks(0, 1, torch.device("cpu"))
SHORT = {"num_sampling_steps": 3, "stepsize": 0.1, "cfg_scale": 1.0}


@pytest.fixture
def networks(tmp_path):
    (tmp_path / "flat.pth").write_bytes(b"flat")
    return Networks(FlatInception(tmp_path / "flat.pth", ALONE.device))


@pytest.fixture
def evaluator(networks, tmp_path):
    real = write_pictures(tmp_path / "real", 20, seed=1)
    return Evaluator(open_reference(real, networks), networks, ALONE, tell=lambda line: None)


def drawn(tmp_path, args=IMAGE_ARGS, shape=(8, 8, 3), **more):
    pipe = EqMPipeline.from_pretrained(save_checkpoint(tmp_path / "x.pt", args), device="cpu")
    return Drawn(pipe, 12, shape, SHORT, **more)


def test_nothing_random_of_the_run_is_touched(evaluator, tmp_path):
    source = drawn(tmp_path)
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = evaluator.judge(source)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpys)
    assert first["fid"] > 0 and evaluator.judge(source) == first


def test_the_references_features_are_taken_once_and_the_batch_changes_nothing(evaluator, networks, tmp_path):
    first = evaluator.judge(drawn(tmp_path, batch=4))
    assert networks.inception.seen == 12 + 20
    second = evaluator.judge(drawn(tmp_path, batch=5))
    assert networks.inception.seen == 2 * 12 + 20
    assert list(second.values()) == pytest.approx(list(first.values()), rel=1e-6), "samples differ by rounding at most"


def test_clips_are_no_images(evaluator, tmp_path):
    with pytest.raises(UserError, match="what is judged is 4 frames of 8 x 8, the reference 8 x 8"):
        evaluator.judge(drawn(tmp_path, CLIP_ARGS, (4, 8, 8, 3)))


def test_moments_alone_have_no_neighbours(networks, tmp_path):
    np.savez(tmp_path / "m.npz", mu=np.zeros(6), sigma=np.eye(6), mu_s=np.zeros(4), sigma_s=np.eye(4))
    evaluator = Evaluator(open_reference(tmp_path / "m.npz", networks), networks, ALONE, tell=lambda line: None)
    assert list(evaluator.judge(drawn(tmp_path))) == ["fid", "sfid", "inception_score"]
    with pytest.raises(UserError, match="has moments alone"):
        evaluator.neighbours(drawn(tmp_path), 3)
