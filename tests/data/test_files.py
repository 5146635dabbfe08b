"""Files to tensors: layouts, crops, frame choice, labels, odd and broken files, the stream of batches."""

import itertools
import os

import av
import numpy as np
import pytest
import torch
from PIL import Image

from EqM.data import clips, loader
from EqM.data import files as data
from EqM.run import seeds
from EqM.run.errors import UserError
from helpers import write_clip


def stripes(width, height):
    """A picture whose red grows to the right and whose green grows downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red], axis=-1).astype(np.uint8))


def numbered_clip(path, count, **more):
    """A clip whose frame i has brightness 10 i."""
    frames = np.stack([np.full((32, 32, 3), 10 * i, np.uint8) for i in range(count)])
    write_clip(path, frames, **more)
    return path


def numbers(frames):
    return [round(np.asarray(frame).mean() / 10) for frame in frames]


def dataset(folder, clips=False, **more):
    paths, labels, names = data.find_files(folder, clips)
    return data.LabelledFiles(paths, labels, names, **{"size": 16, "clip_len": 4 if clips else None, **more})


@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 64), (64, 100), (200, 65), (17, 300), (5, 9)])
def test_centre_crop_is_square_and_takes_the_middle(width, height):
    crop = data.centre_crop(stripes(width, height), 16).astype(float)
    assert crop.shape == (16, 16, 3)
    for axis, channel, length in ((1, 0, width), (0, 1, height)):
        share = min(width, height) / length  # of this axis that is kept
        line = crop[..., channel].mean(axis=1 - axis)
        assert line.mean() == pytest.approx(127.5, abs=6)
        assert line[-1] - line[0] == pytest.approx(255 * share * 15 / 16, abs=20)


def test_centre_crop_of_a_picture_of_that_size_is_the_picture():
    picture = stripes(16, 16)
    assert np.array_equal(data.centre_crop(picture, 16), np.asarray(picture))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "I;16", "I"])
def test_every_kind_of_image_becomes_rgb_of_the_right_brightness(tmp_path, mode):
    if mode.startswith("I"):
        picture = Image.fromarray(np.full((20, 20), 128 * 256, np.uint16 if mode == "I;16" else np.int32))
    else:
        picture = Image.new("L" if mode in ("1", "P") else "RGB", (20, 20), 128 if mode in ("1", "P") else (128,) * 3)
        picture = picture.convert(mode, dither=Image.Dither.NONE) if mode != "L" else picture.convert("L")
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I") else "x.png")
    picture.save(path)
    read = np.asarray(data.read_image(path))
    assert read.shape == (20, 20, 3)
    assert abs(read.mean() - (255 if mode == "1" else 128)) < 3


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    stripes(40, 20).save(tmp_path / "x.jpg", exif=exif)
    assert data.read_image(tmp_path / "x.jpg").size == (20, 40)


@pytest.mark.parametrize(
    ("count", "frames", "expected"),
    [(10, 4, [0, 3, 6, 9]), (4, 4, [0, 1, 2, 3]), (2, 4, [0, 0, 1, 1]), (1, 3, [0, 0, 0]), (9, 1, [0]), (5, 2, [0, 4])],
)
def test_frames_are_spread_from_the_first_to_the_last(count, frames, expected):
    assert clips.frame_indices(count, frames) == expected


def test_a_window_has_its_frames_k_apart_and_starts_anywhere():
    rng = np.random.default_rng(0)
    seen = {tuple(clips.frame_indices(12, 4, 3, rng)) for _ in range(100)}
    assert seen == {(0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)}
    assert clips.frame_indices(5, 4, 3, rng) == [0, 3, 4, 4], "a short clip repeats its last frame"


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv", ".webm", ".mov"])
def test_every_container_gives_the_right_frames(tmp_path, suffix):
    codec = {"codec": "libvpx"} if suffix == ".webm" else {}
    path = numbered_clip(tmp_path / f"clip{suffix}", 10, **codec)
    assert numbers(clips.decode_clip(path, 4)) == [0, 3, 6, 9]


def test_b_frames_in_an_avi_come_in_the_order_of_a_full_decode(tmp_path):
    path = numbered_clip(tmp_path / "clip.avi", 20, codec="mpeg4", options={"bf": "2", "b_strategy": "0"})
    with av.open(str(path)) as container:
        full = [frame.to_image() for frame in container.decode(video=0)]
    for interval in (None, 2):
        chosen = clips.decode_clip(path, 5, interval, seed=(1,))
        wanted = clips.frame_indices(len(full), 5, interval, np.random.default_rng((1,)))
        assert all(np.array_equal(a, full[i]) for a, i in zip(chosen, wanted, strict=True))


def test_a_truncated_clip_is_spread_over_what_decodes(tmp_path):
    path = tmp_path / "clip.avi"
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    write_clip(path, frames, codec="mjpeg", pix_fmt="yuvj420p")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    chosen = clips.decode_clip(path, 4)
    assert len({frame.tobytes() for frame in chosen}) == 4


def test_a_short_clip_repeats_its_last_frame(tmp_path):
    path = numbered_clip(tmp_path / "clip.mp4", 2)
    assert numbers(clips.decode_clip(path, 4, frame_interval=1)) == [0, 1, 1, 1]
    assert numbers(clips.decode_clip(path, 6)) == [0, 0, 0, 1, 1, 1]


def test_sound_alone_is_no_clip(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="no video stream"):
        clips.decode_clip(tmp_path / "clip.mp4", 4)


def test_image_items(image_folder):
    files = dataset(image_folder, flip=False)
    pixels, label, bad = files[0, 4]
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8
    assert (label, bad, files.class_names, len(files)) == (1, -1, ["cat", "dog"], 6)
    expected = data.centre_crop(data.read_image(image_folder / "dog/1.png"), 16)
    assert np.array_equal(pixels.permute(1, 2, 0), expected)


def test_a_clip_is_flipped_whole_or_not_at_all_and_afresh_each_epoch(clip_folder):
    plain, flipping = dataset(clip_folder, True, flip=False), dataset(clip_folder, True, flip=True)
    assert plain[0, 0][0].shape == (3, 4, 16, 16)
    outcomes = set()
    for epoch, index in itertools.product(range(4), range(4)):
        clip, _, _ = flipping[epoch, index]
        still, _, _ = plain[epoch, index]
        mirrored = torch.equal(clip, still.flip(-1))
        assert mirrored or torch.equal(clip, still)
        assert mirrored == seeds.coin(0, epoch, index)
        outcomes.add(mirrored)
        assert torch.equal(clip, flipping[epoch, index][0])
    assert outcomes == {True, False}


def test_class_folders_may_be_empty_or_named_in_any_script(tmp_path):
    for name in ("ünï çode", "東京", "empty", "b c"):
        (tmp_path / name).mkdir()
        if name != "empty":
            stripes(20, 20).save(tmp_path / name / "a picture ß.png")
    files = dataset(tmp_path)
    assert files.class_names == sorted(["ünï çode", "東京", "empty", "b c"])
    assert [files.class_names[label] for label in files.labels] == [n for n in files.class_names if n != "empty"]
    assert files[0, 0][0].shape == (3, 16, 16)


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        stripes(20, 20).save(file, "PNG")
    assert dataset(tmp_path)[0, 0][2] == -1


@pytest.fixture
def flat_clips(tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(3):
        numbered_clip(tmp_path / "train" / f"v{i}.mp4", 5)
    return tmp_path


@pytest.mark.parametrize("where", ["train.csv", "train/labels.csv", "elsewhere.csv"])
def test_flat_clips_with_a_csv_given_or_found(flat_clips, where):
    (flat_clips / where).write_text("video_name,tag\nv0.mp4,run\nv2.mp4,jump\n")
    given = flat_clips / where if where.startswith("else") else None
    paths, labels, names = data.find_files(flat_clips / "train", True, given)
    assert [path.name for path in paths] == ["v0.mp4", "v2.mp4"]
    assert (labels, names) == ([1, 0], ["jump", "run"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "needs a header"),
        ("name,tag\na,b\n", "needs a header"),
        ("video_name,tag\n", "row"),
    ],
)
def test_a_bad_csv_is_told(flat_clips, text, message):
    path = flat_clips / "x.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        data.find_files(flat_clips / "train", True, path)


def test_a_folder_without_the_right_files_is_told(tmp_path, image_folder):
    for folder, video, message in [
        (tmp_path / "nowhere", False, "is not a folder"),
        (tmp_path, False, "has no class folders"),
        (image_folder, True, "holds no clips.*leave --video out"),
    ]:
        with pytest.raises(UserError, match=message):
            data.find_files(folder, video)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="holds no images.*add --video"):
        data.find_files(tmp_path, False)


def bad_files():
    """Name and maker of every way we know for a file to be bad, as f(path, whole): whole, the bytes of a good one."""
    makers = {
        "empty": lambda path, whole: path.write_bytes(b""),
        "text": lambda path, whole: path.write_text("not what its name says"),
        "zeros": lambda path, whole: path.write_bytes(bytes(5000)),
        "noise": lambda path, whole: path.write_bytes(np.random.default_rng(0).bytes(5000)),
        "broken link": lambda path, whole: path.symlink_to("nowhere"),
        "header": lambda path, whole: path.write_bytes(whole[:40]),
        "half": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
        "end missing": lambda path, whole: path.write_bytes(whole[:-60]),
        "hole": lambda path, whole: path.write_bytes(
            whole[:200] + bytes(len(whole) // 3) + whole[200 + len(whole) // 3 :]
        ),
        "tail first": lambda path, whole: path.write_bytes(whole[::-1]),
    }
    return [(f"{name}.{kind}", make) for kind in ("png", "jpg", "mp4", "avi", "mkv") for name, make in makers.items()]


@pytest.mark.parametrize(("name", "make"), bad_files(), ids=[name for name, _ in bad_files()])
def test_a_bad_file_is_read_as_far_as_it_goes_or_replaced_by_one_of_its_class(tmp_path, name, make):
    """Never an exception or a hang. Clips may lose their end; a picture must be whole."""
    suffix = name.split(".")[1]
    clips = suffix in ("mp4", "avi", "mkv")
    good = tmp_path / "class" / f"zz.{suffix}"
    good.parent.mkdir()
    if clips:
        scene = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
        write_clip(good, scene, codec="mpeg4" if suffix == "avi" else "libx264")
    else:
        stripes(100, 100).save(good)
    make(tmp_path / "class" / name, good.read_bytes())
    files = dataset(tmp_path, clips, flip=False)
    assert [files.path(i) for i in range(2)][1] == str(good)
    pixels, label, bad = files[0, 0]
    expected = files[0, 1][0]
    assert pixels.shape == expected.shape and label == 0
    assert bad == -1 or torch.equal(pixels, expected)
    if name.startswith(("empty", "text", "zeros", "noise", "broken", "header")):
        assert bad == 0


def test_a_class_without_a_good_file_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/a.png").write_text("nothing")
    with pytest.raises(UserError, match="no file of class 'cat' can be read"):
        next(loader.read(dataset(tmp_path), [[(0, 0)]], num_workers=0, pin_memory=False))


def test_bad_files_are_told_once_and_too_many_stop_the_run(image_folder):
    files, told = dataset(image_folder), []
    bad = loader.BadFiles(files, 0.4, told.append)
    bad.note(torch.tensor([-1, 2, 2]))
    bad.note(torch.tensor([2, 4, -1]))
    assert len(told) == 2 and files.path(2) in told[0]
    with pytest.raises(UserError, match="3 of 6 files do not decode.*--max-bad-fraction 0.4.*dog"):
        bad.note(torch.tensor([5]))


def stream(rank=0, world_size=1, batch_size=4, length=10, seed=0, first_batch=0):
    return iter(loader.Stream(length, batch_size, rank, world_size, seed, first_batch))


def test_every_epoch_is_a_new_permutation_without_a_seam():
    keys = [key for batch in itertools.islice(stream(), 10) for key in batch]
    epochs = [[index for epoch, index in keys if epoch == n] for n in range(4)]
    assert [epoch for epoch, _ in keys] == sorted(epoch for epoch, _ in keys)
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 4


@pytest.mark.parametrize("first", [1, 3, 7])
def test_a_stream_that_starts_later_is_the_rest_of_one_that_started_at_0(first):
    whole = list(itertools.islice(stream(), 12))
    assert list(itertools.islice(stream(first_batch=first), 12 - first)) == whole[first:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_that_one_rank_would_have(world_size):
    alone = itertools.islice(stream(batch_size=8), 5)
    ranks = [stream(rank, world_size, 8 // world_size) for rank in range(world_size)]
    together = [sum((next(rank) for rank in ranks), []) for _ in range(5)]
    assert together == list(alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(image_folder, workers):
    state = torch.get_rng_state()
    batches = itertools.islice(loader.read(dataset(image_folder), stream(length=6), workers, False), 4)
    pixels, labels, bad = (torch.cat(parts) for parts in zip(*batches, strict=True))
    files = dataset(image_folder)
    expected = [files[key] for batch in itertools.islice(stream(length=6), 4) for key in batch]
    assert torch.equal(pixels, torch.stack([item[0] for item in expected]))
    assert labels.tolist() == [item[1] for item in expected] and bad.eq(-1).all()
    assert torch.equal(torch.get_rng_state(), state), "reading draws nothing from the step's own numbers"


class Dies(torch.utils.data.Dataset):
    def __getitem__(self, key):
        os._exit(3)


def test_a_worker_that_dies_is_told():
    with pytest.raises(UserError, match="a data worker died.*--num-workers"):
        next(loader.read(Dies(), [[(0, 0)]], num_workers=1, pin_memory=False))
