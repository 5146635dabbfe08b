"""Counts of evaluations beside the samples, and their summary."""

from EqM.data import evaluations


def test_counts_of_all_ranks_and_runs_are_known_and_the_last_one_stands(tmp_path):
    (tmp_path / "labels.csv").write_text("file,label,class,evaluations\na,0,x,5\nb,0,x,6\n")
    for rank, names in enumerate((["b", "c"], ["d"])):
        evaluations.Evaluations(tmp_path, rank).note(names, [10 * rank + i for i in range(len(names))])
    with open(tmp_path / "evaluations.1.csv", "a") as file:
        file.write("e,")
    assert evaluations.known(tmp_path) == {"a": 5, "b": 0, "c": 1, "d": 10}
    evaluations.gather(tmp_path)
    assert [path.name for path in tmp_path.glob("eval*")] == ["evaluations.csv"]
    evaluations.Evaluations(tmp_path, 0).note(["a"], [7])
    assert evaluations.known(tmp_path) == {"a": 7, "b": 0, "c": 1, "d": 10}
    evaluations.gather(tmp_path, told=["a", "b"])
    assert evaluations.known(tmp_path) == {"a": 5, "b": 6, "c": 1, "d": 10}, "what labels.csv does not tell is kept"
    evaluations.gather(tmp_path, told=["a", "b", "c", "d"])
    assert not list(tmp_path.glob("eval*"))


def test_the_summary_holds_mean_share_and_every_sample(tmp_path):
    lines = evaluations.summary([10, 12, 30, 30, 49], 49).splitlines()
    assert lines[0] == "Evaluations of the field: 26.2 of 49 on average (53 %), 10 to 49"
    assert len(lines) == 11 and sum(int(line.split()[-1]) for line in lines[1:]) == 5
    assert lines[1].split() == ["10", "to", "13", "#" * 40, "2"]
    assert evaluations.summary([0, 0], 0).splitlines()[0].endswith("0.0 of 0 on average, 0 to 0")
    assert evaluations.summary([3, 3], 9).splitlines()[1].split() == ["3", "#" * 40, "2"]
