"""prepare_ucf101.py on a made-up archive folder with the official lists' quirks."""

import os
import zipfile

import pytest

TRAIN = ["Biking/v_Biking_g01_c01.avi 1", "HandstandPushups/v_HandStandPushups_g01_c01.avi 2"]
TEST = ["Biking/v_Biking_g02_c01.avi", "HandstandPushups/v_HandStandPushups_g02_c01.avi"]


@pytest.fixture
def official(tmp_path):
    """(videos folder, lists folder) as the archives unpack, each file holding its own name."""
    videos, lists = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    for label, name in [("Biking", "Biking"), ("HandstandPushups", "HandstandPushups")]:
        (videos / label).mkdir(parents=True)
        for group in ("g01", "g02"):
            clip = videos / label / f"v_{name}_{group}_c01.avi"
            clip.write_text(clip.name)
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("\r\n".join(TRAIN) + "\r\n")
    (lists / "testlist01.txt").write_text("\n".join(TEST) + "\n")
    return videos, lists


def contents(out):
    return sorted((str(path.relative_to(out)), path.read_text()) for path in out.rglob("*.avi"))


EXPECTED = [
    ("test/Biking/v_Biking_g02_c01.avi", "v_Biking_g02_c01.avi"),
    ("test/HandstandPushups/v_HandstandPushups_g02_c01.avi", "v_HandstandPushups_g02_c01.avi"),
    ("train/Biking/v_Biking_g01_c01.avi", "v_Biking_g01_c01.avi"),
    ("train/HandstandPushups/v_HandstandPushups_g01_c01.avi", "v_HandstandPushups_g01_c01.avi"),
]


@pytest.mark.parametrize("more", [[], ["--copy"]])
def test_clips_land_in_their_split_as_relative_links_or_copies(run_script, official, tmp_path, more):
    videos, lists = official
    out = tmp_path / "out"
    command = ["prepare_ucf101", "--videos", videos, "--lists", lists, "--out", out, *more]
    first = run_script(*command)
    assert first.code == 0, first.err
    assert contents(out) == EXPECTED
    links = [path for path in out.rglob("*.avi") if path.is_symlink()]
    assert len(links) == (0 if more else 4)
    assert not any(os.path.isabs(os.readlink(link)) for link in links)
    assert "2 clips of 2 classes, 0 of them new" in run_script(*command).out


def test_lists_may_be_a_zip_and_a_stale_link_is_mended(run_script, official, tmp_path):
    videos, lists = official
    with zipfile.ZipFile(tmp_path / "lists.zip", "w") as archive:
        for path in lists.iterdir():
            archive.write(path, f"ucfTrainTestlist/{path.name}")
    stale = tmp_path / "out/train/Biking/v_Biking_g01_c01.avi"
    stale.parent.mkdir(parents=True)
    stale.symlink_to("nowhere.avi")
    run_script("prepare_ucf101", "--videos", videos, "--lists", tmp_path / "lists.zip", "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == EXPECTED


def test_a_missing_clip_is_named_and_may_be_allowed(run_script, official, tmp_path):
    videos, lists = official
    (videos / "Biking/v_Biking_g01_c01.avi").unlink()
    command = ["prepare_ucf101", "--videos", videos, "--lists", lists, "--out", tmp_path / "out"]
    refused = run_script(*command)
    assert refused.code == 2 and "1 clips" in refused.err and "v_Biking_g01_c01.avi" in refused.err
    assert not (tmp_path / "out").exists()
    assert run_script(*command, "--allow-missing").code == 0
    assert len(contents(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("videos", "lists", "split", "message"),
    [
        ("UCF-101", "ucfTrainTestlist", "2", "holds no trainlist02.txt"),
        ("UCF-101", "UCF-101", "1", "holds no trainlist01.txt"),
        ("UCF-101", "nowhere", "1", "neither a folder nor a zip"),
        ("nowhere", "ucfTrainTestlist", "1", "does not exist"),
        ("ucfTrainTestlist", "ucfTrainTestlist", "1", "holds no .avi files"),
    ],
)
def test_bad_input_is_one_line(run_script, official, tmp_path, videos, lists, split, message):
    result = run_script(
        "prepare_ucf101", "--videos", tmp_path / videos, "--lists", tmp_path / lists, "--split", split,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


def test_an_archive_is_unpacked_once(run_script, official, tmp_path, monkeypatch):
    """With a bsdtar of our own, since no machine is sure to have one: it copies the folder named in the archive."""
    videos, lists = official
    archive, out, tools = tmp_path / "UCF101.rar", tmp_path / "out", tmp_path / "bin"
    archive.write_text(str(videos))
    tools.mkdir()
    (tools / "bsdtar").write_text(f'#!/bin/sh\ncp -r "$(cat "$2")" "$4"\necho run >> {tmp_path}/count\n')
    (tools / "bsdtar").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for _ in range(2):
        assert run_script("prepare_ucf101", "--videos", archive, "--lists", lists, "--out", out).code == 0
    assert contents(out / "train") == [(name.removeprefix("train/"), text) for name, text in EXPECTED[2:]]
    assert (tmp_path / "count").read_text() == "run\n"
