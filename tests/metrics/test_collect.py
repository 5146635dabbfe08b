"""What is kept of an evaluation on the way: features until there are figures, then the figures."""

import pytest
import torch

from EqM.metrics import collect
from EqM.metrics.collect import Progress
from EqM.metrics.evaluation import Evaluator
from EqM.metrics.features import Networks
from EqM.metrics.reference import open_reference
from EqM.metrics.sources import open_source
from EqM.run.distributed import Ranks
from EqM.run.errors import UserError
from helpers import FlatInception, write_pictures

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def networks(tmp_path):
    (tmp_path / "flat.pth").write_bytes(b"flat")
    return Networks(FlatInception(tmp_path / "flat.pth", ALONE.device))


def test_figures_take_the_place_of_their_features(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "SAVED_EVERY", 0.0)
    sources = [open_source(write_pictures(tmp_path / name, 10, seed=i)) for i, name in enumerate("ab")]
    real = write_pictures(tmp_path / "real", 9, seed=2)
    kept = Progress(tmp_path / "r.json")
    evaluator = Evaluator(open_reference(real, networks), networks, ALONE, kept, lambda line: None)
    found = [evaluator.judge(source) for source in sources]
    assert len(list(kept.folder.glob("*.pt"))) == 3, "the reference's, which another sample may want"
    assert len(list(kept.folder.glob("*.json"))) == 2
    seen = networks.inception.seen
    again = Evaluator(open_reference(real, networks), networks, ALONE, kept, lambda line: None)
    assert [again.judge(source) for source in sources] == found and networks.inception.seen == seen
    other = Evaluator(open_reference(tmp_path / "a", networks), networks, ALONE, kept, lambda line: None)
    assert other.judge(sources[1])["fid"] != found[1]["fid"], "against another reference they are others"
    kept.remove()
    assert not kept.folder.exists()


def test_a_part_that_is_there_twice_counts_once(networks, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "SAVED_EVERY", 0.0)
    source = open_source(write_pictures(tmp_path / "a", 10))
    kept = Progress(tmp_path / "r.json")
    whole = collect.collect(source, networks, ALONE, kept)
    part = next(kept.folder.glob("*.pt"))
    part.with_name(part.name.replace("-0-", "-1-")).write_bytes(part.read_bytes())
    again = collect.collect(source, networks, ALONE, kept)
    assert torch.equal(again.features, whole.features) and again.moments["pooled"].count == 10
    assert networks.inception.seen == 10
    part.write_bytes(b"PK")
    with pytest.raises(UserError, match="is damaged .*; remove it"):
        collect.collect(source, networks, ALONE, kept)
