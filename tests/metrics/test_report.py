"""Figures as tables, logs and cards tell them: one order, one set of names."""

import pytest

from EqM.metrics import report


@pytest.mark.parametrize(
    ("results", "name", "place"),
    [
        ([{"fid": 2.0, "kid": 0.1}, {"fid": 1.0, "kid": 0.2}], "fid", 1),
        ([{"frame_fid": 1.0, "fvd": 9.0}, {"frame_fid": 2.0, "fvd": 8.0}], "fvd", 1),
        ([{"frame_fid": 1.0}, {"frame_fid": 2.0, "fvd": 8.0}], "fvd", 1),
        ([{"frame_fid": 1.0}, {"frame_fid": 2.0}], "frame_fid", 0),
        ([{"precision": 1.0}], None, None),
    ],
)
def test_the_best_has_the_lowest_of_the_first_figure_there_is(results, name, place):
    assert report.ranked_by(results) == name
    assert report.best(results) is (None if place is None else results[place])


def test_every_figure_has_a_name_and_only_several_rows_tell_their_checkpoints():
    assert report.NAMES.keys() == report.FIGURES.keys() - {"kid_error"} and set(report.RANKED_BY) <= report.NAMES.keys()
    rows = [{"fid": 1.25, "step": 3, "checkpoint": "a.pt"}, {"fid": 2.0, "checkpoint": "b.pt"}]
    lines = [line.split() for line in report.table(rows).splitlines()]
    assert lines == [["step", "FID", "checkpoint"], ["3", "1.250", "a.pt"], ["-", "2.000", "b.pt"]]
    assert "checkpoint" not in report.table(rows[:1])
