"""The measuring of saves: both kinds are timed, and nothing stays behind."""

import re


def test_both_kinds_of_save_are_timed_in_one_run(run_script, tmp_path):
    words = "--model EqM-T/4 --image-size 64 --rounds 1 --device cpu"
    result = run_script("measure.saving", *words.split(), "--folder", tmp_path)
    assert result.code == 0, result.err
    for name in ("step", "in the loop", "stall"):
        (row,) = re.findall(rf"^\| {name} \|(.*)\|$", result.out, re.M)
        assert len(row.split("|")) == 2 and all(float(cell) > 0 for cell in row.split("|"))
    assert re.search(r"stall: \d+ % of a save in the loop", result.out) and not list(tmp_path.iterdir())
