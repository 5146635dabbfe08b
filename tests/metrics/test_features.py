"""Features: torch-fidelity's to the bit whatever the batch, and files that are looked at before they are used."""

import hashlib
import io
import re
import warnings

import numpy as np
import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from EqM.metrics import features
from EqM.run.distributed import Ranks
from EqM.run.errors import UserError
from helpers import pictures

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


@pytest.fixture(scope="module")
def inception(inception_file):
    return features.Inception(inception_file, CPU)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8))


@pytest.fixture(scope="module")
def found(inception, images):
    return inception(images)


def test_features_are_torch_fidelitys(inception_file, images, found):
    given = io.BytesIO(inception_file.read_bytes())
    theirs = fidelity.FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=given)
    kept = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, result: kept.append(result))
    with torch.no_grad():
        pooled = theirs(images[:4].movedim(-1, 1).contiguous())[0]
    assert torch.equal(found[0][:4], pooled) and pooled.std(0).mean() > 1e-3
    spatial = kept[0][0]  # (192, 17, 17), of the first image
    assert spatial.shape == (192, 17, 17) and spatial.min() == 0, "after the ReLU"
    one = found[1][0].view(17, 17, 7)
    assert torch.equal(one[3, 5], spatial[:7, 3, 5]) and found[1].shape == (5, 2023)


def test_features_do_not_depend_on_the_batch(inception, images, found):
    alone = inception(images[4:])
    assert torch.equal(alone[0], found[0][4:]) and torch.equal(alone[1], found[1][4:])


def test_logits_of_the_score_are_the_networks(inception, found, images):
    inception._network.features_list = ["logits_unbiased"]
    with torch.no_grad():
        logits = inception._network(images[:1].movedim(-1, 1))[0]
    inception._network.features_list = ["2048"]
    torch.testing.assert_close(found[0][:1] @ inception.weight.T, logits)


def test_nothing_random_is_touched(inception_file):
    torch.manual_seed(3)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    features.Inception(inception_file, CPU)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpys)


def test_a_clip_is_called_as_stylegan_v_calls_it(i3d_file):
    i3d = features.I3D(i3d_file, CPU)
    clips = torch.from_numpy(pictures(9 * 20).reshape(9, 20, 8, 8, 3))
    found = i3d(clips)
    assert found.shape == (9, 8) and 0 < found.mean() < 1
    assert torch.equal(i3d(clips[:, :16]), found), "16 frames"
    assert torch.equal(i3d(clips[8:]), found[8:]), "whatever the batch"


def test_the_published_file_is_torch_fidelitys():
    assert fidelity.URL_INCEPTION_V3 == features.URL and features.NAME.split("-")[-1].startswith(features.DIGEST[:8])


def test_another_file_is_used_and_said_to_compare_with_nothing(inception_file):
    told = []
    networks = features.load(ALONE, inception_file, tell=told.append)
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert networks.told()["digest"] == digest and not networks.told()["published"]
    assert len(told) == 1 and digest[:16] in told[0] and "not comparable with published figures" in told[0]


def test_the_cache_is_looked_in_and_checked(tmp_path, monkeypatch, inception_file):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / features.NAME
    place.parent.mkdir(parents=True)
    place.symlink_to(inception_file)
    with pytest.raises(UserError, match=f"{re.escape(str(place))} is not the published file"):
        features.load(ALONE)
    monkeypatch.setattr(features, "DIGEST", features.digest_of(inception_file))
    assert features.locate() == place
    told = []
    assert features.load(ALONE, tell=told.append).told()["published"] and not told


def test_what_is_not_in_the_cache_is_fetched_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "there").write_bytes(b"weights")
    monkeypatch.setattr(features, "URL", (tmp_path / "there").as_uri())
    with pytest.raises(UserError, match="cannot be fetched .*hash"):
        features.locate()
    monkeypatch.setattr(features, "DIGEST", features.digest_of(tmp_path / "there"))
    assert features.locate().read_bytes() == b"weights"


def test_no_file_and_no_network_is_one_line_that_says_where_it_belongs(tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError) as told:
        features.load(ALONE)
    for words in (features.URL, str(tmp_path / "hub" / "checkpoints" / features.NAME), "--inception", "not known"):
        assert words in str(told.value)
    assert "\n" not in str(told.value)


class Runs:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"x": torch.zeros(2)}, "weights of another network"),
        ({"x": torch.full((2,), torch.nan)}, "not finite"),
        ([1, 2], "no state dict"),
        (Runs(), "more than weights"),
        (None, "cannot be read|more than weights"),
    ],
)
def test_other_files_are_refused_and_run_nothing(tmp_path, capsys, content, words):
    path = tmp_path / "x.pth"
    path.write_bytes(b"PK nothing") if content is None else torch.save(content, path)
    with pytest.raises(UserError, match=words):
        features.load(ALONE, path, tell=lambda line: None)
    assert "it ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match="is not a file"):
        features.load(ALONE, tmp_path / "none.pth")


def test_what_is_no_i3d_is_one_line(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="does not load as a TorchScript network"):
        features.I3D(path, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Flatten()).save(path)
    with pytest.raises(UserError, match="cannot be called as net"):
        features.I3D(path, CPU)(torch.zeros(1, 16, 8, 8, 3, dtype=torch.uint8))
