"""--config: a file of flags in front of the command line, and the one that each run writes to repeat it."""

import os
import sys

import pytest
import torch

from EqM import cli, recipe
from EqM import train as train_script
from EqM.run import resume
from helpers import REPO, assert_same_checkpoint, train_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def parsed(tmp_path):
    """parsed(text of the file, *words): train.py's args, with --latents given."""

    def parse(text, *words):
        (tmp_path / "flags.toml").write_text(text)
        return train_script.parse_args(["--config", str(tmp_path / "flags.toml"), "--latents", "x", *words])

    return parse


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(parsed):
    text = 'model = "EqM-S/4"\nlr = 3e-4\nbetas = [0.9, 0.95]\nflip = false\nuse_bf16 = true\nvae = "none"\n'
    args = parsed(text, "--lr", "1e-3", "--betas", "0.8", "0.9")
    assert (args.model, args.lr, args.betas, args.flip, args.use_bf16) == ("EqM-S/4", 1e-3, [0.8, 0.9], False, True)
    assert parsed(text).betas == [0.9, 0.95] and parsed(text, "--flip").flip is True
    assert parsed("disp = false\nglobal-batch-size = 8\nwandb = false").global_batch_size == 8
    other = parsed(text, "--use-amp")
    assert other.use_amp and not other.use_bf16, "of two flags that exclude each other, the command line's"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate = 1", "learning_rate is no flag"),
        ("lr = [1, 2]", "lr is [1, 2], where --lr takes one value"),
        ('flip = "no"', "flip is 'no', where --flip takes true or false"),
        ("lr = true", "where --lr takes one value"),
        ("betas = 0.9", "betas is 0.9"),
        ("[optimizer]\nlr = 1", "takes one value"),
        ("lr = ", "cannot be read as TOML"),
        ("config = 'x'", "config is no flag"),
        ("lr = -1", "out of range"),
        ("betas = [0.9, 1.0]", "out of range"),
        ("min_lr = 1e-5", "--min-lr 1e-05 is where --lr-schedule cosine ends"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(parsed, capfd, text, words):
    with pytest.raises(SystemExit) as end:
        parsed(text)
    err = capfd.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and words in err, err


def test_a_file_that_is_not_there_is_one_line(run_script):
    result = run_script("train", "--config", "/nowhere.toml")
    assert result.code == 2 and result.err.count("\n") == 1 and "/nowhere.toml cannot be read" in result.err


def test_a_run_is_repeated_bit_for_bit_from_elsewhere_by_the_file_it_wrote(
    run_script, image_folder, tmp_path, monkeypatch
):
    flags = ["--lr", "1e-3", "--use-bf16", "--no-flip", "--optimizer", "muon", "--betas", "0.9", "0.95"]
    monkeypatch.chdir(tmp_path)
    here = [os.path.relpath(image_folder, tmp_path), "runs"]
    first = run_script("train", *train_args(*here, *flags, "--val-path", here[0], "--val-every", 2))
    assert first.code == 0, first.err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = run_script("train", "--config", next((tmp_path / "runs").glob("*/config.toml")))
    assert again.code == 0, again.err
    one, other = (next((tmp_path / at).glob("runs/*/checkpoints/0000002.pt")) for at in ("", "elsewhere"))
    assert_same_checkpoint(one, other)
    ours, theirs = (torch.load(path, weights_only=True)["args"] for path in (one, other))
    assert {name for name in ours if ours[name] != theirs[name]} == {"config"}


def test_every_flag_of_free_text_is_written_as_a_place_or_is_known_to_be_none(monkeypatch):
    class Seen(Exception):
        pass

    def see(parser, argv):
        raise Seen(parser)

    monkeypatch.setattr(cli.Parser, "parse_args", see)
    with pytest.raises(Seen) as caught:
        train_script.parse_args([])
    actions = caught.value.args[0]._actions
    free = {each.dest for each in actions if each.nargs != 0 and each.type is None and each.choices is None}
    assert free - {*resume.PLACES, *resume.OTHER_PLACES} == {
        "config", "device", "weights", "image_column", "label_column", "results_dir"
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_command_line(path, monkeypatch):
    monkeypatch.chdir(REPO)
    args = train_script.parse_args(["--config", str(path), "--latents", "x"])
    for name, value in tomllib.loads(path.read_text()).items():
        assert getattr(args, name) == value


def test_of_two_flags_that_say_one_thing_the_command_lines_counts(parsed):
    assert parsed('data_path = "elsewhere"\nval_latents = "y"', "--val-path", "z").val_latents is None


def test_odd_paths_are_written_so_that_they_are_read(tmp_path):
    odd = ['a "b" \\ c', "del\x7fete", "tab\tand é", "\N{GRINNING FACE}"]
    recipe.write(tmp_path / "config.toml", {"ckpt": odd, "val_path": "caf\udce9", "config": "x"})
    assert tomllib.loads((tmp_path / "config.toml").read_text(encoding="utf-8")) == {"ckpt": odd}
    assert "# val_path = " in (tmp_path / "config.toml").read_text(encoding="utf-8")
