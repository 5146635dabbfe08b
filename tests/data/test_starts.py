"""Files to start sampling from."""

import numpy as np
import pytest
from PIL import Image

from EqM.data.starts import Starts
from EqM.run.errors import UserError
from helpers import numbered_clip


def picture(path, size=(8, 8), colour="red"):
    Image.new("RGB", size, colour).save(path)
    return path


def test_images_come_by_sorted_name_and_folders_are_flat(tmp_path):
    for name, colour in (("b.png", "red"), ("a.bmp", "lime"), (".hidden.png", "blue")):
        picture(tmp_path / name, colour=colour)
    (tmp_path / "below").mkdir()
    picture(tmp_path / "below" / "c.png")
    (tmp_path / "notes.txt").write_text("x")
    starts = Starts(tmp_path, 8)
    assert starts.names == ["a.bmp", "b.png"] and starts[0].shape == (8, 8, 3)
    assert starts[0][0, 0].tolist() == [0, 255, 0] and starts[1][0, 0].tolist() == [255, 0, 0]
    assert len(Starts(tmp_path / "below" / "c.png", 8)) == 1


def test_clips_give_frames_spread_as_in_training(tmp_path):
    numbered_clip(tmp_path / "x.mp4", 7)
    clip = Starts(tmp_path, 32, clip_len=4)[0]
    assert clip.shape == (4, 32, 32, 3)
    assert np.abs(clip.mean(axis=(1, 2, 3)) - [0, 20, 40, 60]).max() < 4


def test_the_digest_tells_other_files(tmp_path):
    picture(tmp_path / "a.png")
    one = Starts(tmp_path, 8).digest()
    assert Starts(tmp_path, 8).digest() == one
    picture(tmp_path / "b.png")
    assert Starts(tmp_path, 8).digest() != one


@pytest.mark.parametrize("clip_len", [None, 4])
def test_other_sizes_and_what_cannot_be_read_are_refused(tmp_path, clip_len):
    with pytest.raises(UserError, match="neither a file nor a folder"):
        Starts(tmp_path / "nowhere", 8, clip_len)
    with pytest.raises(UserError, match="holds no (images|clips)"):
        Starts(tmp_path, 8, clip_len)
    name = tmp_path / ("x.mp4" if clip_len else "x.png")
    name.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"x\..* cannot be read"):
        Starts(tmp_path, 8, clip_len)
    numbered_clip(name, 4) if clip_len else picture(name, (8, 9))
    with pytest.raises(UserError, match="(32 x 32|8 x 9) pixels, and this model makes 8 x 8"):
        Starts(tmp_path, 8, clip_len)


def test_of_a_samplers_folder_its_samples_alone_start(tmp_path):
    for name in ("000000.png", "grid.png", "trace.png"):
        picture(tmp_path / name)
    assert len(Starts(tmp_path, 8)) == 3
    (tmp_path / "samples.json").write_text("{}")
    assert Starts(tmp_path, 8).names == ["000000.png"]
