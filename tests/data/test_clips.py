"""Which frames of a clip are taken, that they are a full decode's, and how they are shown."""

import os
import random
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition

from EqM.data import clips
from helpers import labelled_files, numbered_clip, write_clip


def numbers(frames):
    return [round(np.asarray(frame).mean() / 10) for frame in frames]


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
    assert numbers(clips.decode_clip(path.read_bytes(), 4)) == [0, 3, 6, 9]


def test_b_frames_in_an_avi_come_in_the_order_of_a_full_decode(tmp_path):
    path = numbered_clip(tmp_path / "clip.avi", 20, codec="mpeg4", options={"bf": "2", "b_strategy": "0"})
    with av.open(str(path)) as container:
        full = [frame.to_image() for frame in container.decode(video=0)]
    for interval in (None, 2):
        wanted = clips.frame_indices(len(full), 5, interval, np.random.default_rng((1,)))
        for source in (path, path.read_bytes()):
            chosen = clips.decode_clip(source, 5, interval, seed=(1,))
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


def scene(count, height=48, width=64):
    """Frames of coloured tiles that move, each unlike the others."""
    tiles = np.kron(np.random.default_rng(0).integers(0, 200, (height // 8, width // 8, 3)), np.ones((8, 8, 1)))
    return np.stack([np.roll(tiles, 3 * t, axis=1) + t % 50 for t in range(count)]).astype(np.uint8)


CODECS = {  # name: (encoder, options, whether its packets' times can be sought by)
    "b.avi": ("mpeg4", {"bf": "2", "b_strategy": "0", "g": "12"}, None),
    "p.avi": ("mpeg4", {"g": "12"}, True),
    "motion.avi": ("mjpeg", {}, True),
    "h264.avi": ("libx264", {"g": "12"}, None),
    "b.mp4": ("libx264", {"bf": "3", "g": "12"}, True),
    "open.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}, True),
    "refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=24"}, None),
    "mpeg4.mp4": ("mpeg4", {"bf": "2", "g": "12"}, True),
    "one-key.mp4": ("libx264", {"g": "1000"}, None),
    "b.mkv": ("libx264", {"bf": "3", "g": "12"}, True),
    "mpeg4.mkv": ("mpeg4", {"bf": "2", "g": "12"}, None),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "cpu-used": "8", "deadline": "realtime"}, True),
    "never-shown.webm": ("libvpx", {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}, False),
    "h264.mov": ("libx264", {"g": "12"}, True),
}


def full_decode(path):
    with av.open(str(path)) as container:
        return [frame.to_image().tobytes() for frame in container.decode(video=0)]


def same_as_full_decode(path, monkeypatch):
    """Compares frames of several choices; returns whether each was had by seeking."""
    full, sought = full_decode(path), []
    by_seeking = clips._by_seeking
    with monkeypatch.context() as patch:
        patch.setattr(clips, "_by_seeking", lambda *given: sought.append(by_seeking(*given)) or sought[-1])
        for count, interval, seed in [(2, None, 0), (4, None, 0), (4, 2, 1), (4, 9, 2), (1, 1, 3), (1, 1, 4)]:
            chosen = clips.decode_clip(path, count, interval, (seed,))
            wanted = clips.frame_indices(len(full), count, interval, np.random.default_rng((seed,)))
            assert [frame.tobytes() for frame in chosen] == [full[index] for index in wanted], (count, interval)
    return [frames is not None for frames in sought]


@pytest.mark.parametrize("name", CODECS)
def test_frames_are_those_of_a_full_decode_sought_or_not(tmp_path, monkeypatch, name):
    codec, options, seeks = CODECS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    write_clip(tmp_path / name, scene(120), codec=codec, options=options, pix_fmt=pix_fmt)
    sought = same_as_full_decode(tmp_path / name, monkeypatch)
    assert seeks is None or all(sought) == seeks == any(sought)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_at_uneven_times_are_those_of_a_full_decode(tmp_path, monkeypatch, suffix):
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / f"x.{suffix}"), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"g": "12", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame, pts in zip(scene(120), np.cumsum(rng.integers(1, 200, 120)).tolist(), strict=True):
            frame = av.VideoFrame.from_ndarray(frame)
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert all(same_as_full_decode(tmp_path / f"x.{suffix}", monkeypatch))


def test_a_clip_damaged_in_the_middle_still_gives_frames(tmp_path):
    path = tmp_path / "x.mp4"
    write_clip(path, scene(120), options={"g": "12"})
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 400] = bytes(400)
    path.write_bytes(whole)
    assert len(clips.decode_clip(path, 4)) == 4


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), *clips.TURNS])
def test_a_display_matrix_is_applied(tmp_path, matrix):
    """Against its definition: the pixel at (x, y) is shown at (a x + c y, b x + d y), moved back into the picture."""
    path = tmp_path / "x.mp4"
    write_clip(path, scene(3))
    plain = np.asarray(clips.decode_clip(path, 1)[0])
    whole = bytearray(path.read_bytes())
    at = whole.index(b"tkhd") + 44  # a b u c d v x y w, 16.16 but for u v w
    a, b, c, d = matrix
    for place, value in zip((0, 4, 12, 16), (a, b, c, d), strict=True):
        whole[at + place : at + place + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(whole)
    shown = np.asarray(clips.decode_clip(path, 1)[0])
    y, x = np.mgrid[: plain.shape[0], : plain.shape[1]]
    X, Y = a * x + c * y, b * x + d * y
    expected = np.empty((np.ptp(Y) + 1, np.ptp(X) + 1, 3), np.uint8)
    expected[Y - Y.min(), X - X.min()] = plain
    assert np.array_equal(shown, expected)


@pytest.mark.parametrize("aspect", [Fraction(64, 45), Fraction(1, 2), Fraction(16, 15)])
def test_a_circle_is_shown_as_a_circle(tmp_path, aspect):
    radius, (height, width) = 60, (160, 192)
    y, x = np.mgrid[:height, :width]
    inside = ((x - width / 2) * max(1, aspect)) ** 2 + ((y - height / 2) / min(1, aspect)) ** 2 < radius**2
    inside = np.repeat(255 * inside[..., None].astype(np.uint8), 3, axis=-1)
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        container.mux(stream.encode(av.VideoFrame.from_ndarray(inside)))
        container.mux(stream.encode())
    shown = np.asarray(clips.decode_clip(tmp_path / "x.mp4", 1)[0].convert("L")) > 128
    down, right = (np.ptp(np.flatnonzero(shown.any(axis=axis))) + 1 for axis in (1, 0))
    assert abs(down - right) <= 2 and abs(down - 2 * radius) <= 2


@pytest.mark.parametrize(("suffix", "said"), [("mp4", True), ("mkv", False), ("mov", True)])
def test_a_cover_picture_is_not_taken_for_the_clip(tmp_path, suffix, said):
    """Whether its stream says that it is one, or only stands first and holds one picture."""
    with av.open(str(tmp_path / f"x.{suffix}"), "w") as container:
        cover, stream = container.add_stream("mjpeg", rate=10), container.add_stream("libx264", rate=10)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        if said:
            cover.disposition = Disposition.attached_pic
        for part in (cover.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 250, np.uint8))), cover.encode()):
            container.mux(part)
        for i in range(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * i, np.uint8))))
        container.mux(stream.encode())
    assert numbers(clips.decode_clip(tmp_path / f"x.{suffix}", 2)) == [0, 7]


@pytest.mark.parametrize(
    "text",
    ["ffconcat version 1.0\nfile other.mp4\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n"],
)
def test_a_playlist_opens_no_other_file(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    numbered_clip(tmp_path / "other.mp4", 4)
    (tmp_path / "x.mp4").write_text(text)
    for source in (tmp_path / "x.mp4", text.encode()):
        with pytest.raises((ValueError, OSError)):
            clips.decode_clip(source, 2)


def test_a_clip_is_found_by_its_name_whatever_the_name(tmp_path):
    for name in (b"concat:a|b.mp4", b"\xff.mp4", b"http:x.mp4"):
        numbered_clip(tmp_path / "x.mp4", 4)
        os.rename(tmp_path / "x.mp4", os.fsencode(tmp_path) + b"/" + name)
        assert numbers(clips.decode_clip(os.fsdecode(os.fsencode(tmp_path) + b"/" + name), 2)) == [0, 3]


def test_a_damaged_clip_gives_frames_or_is_named_and_never_ends_the_run(tmp_path):
    """Bytes changed, or the end cut off, at random. EQM_FUZZ=1000 tries as often as the README says, for each."""
    rng = random.Random(0)
    for name, codec in {"x.avi": "mpeg4", "x.mp4": "libx264", "x.mkv": "libx264", "x.webm": "libvpx"}.items():
        folder = tmp_path / name[2:] / "class"
        folder.mkdir(parents=True)
        write_clip(folder / "y.mp4", scene(12))
        write_clip(folder / name, scene(24), codec=codec, options={"g": "6"})
        whole = (folder / name).read_bytes()
        files = labelled_files(folder.parent, clips=True)
        for _ in range(int(os.environ.get("EQM_FUZZ", 25))):
            bad = bytearray(whole)
            for _ in range(rng.choice([0, 1, 3, 30, 300])):
                bad[rng.randrange(rng.choice([64, 1000, len(bad)])) % len(bad)] = rng.randrange(256)
            (folder / name).write_bytes(bad[: rng.choice([len(bad), rng.randrange(len(bad))])])
            pixels, label, index = files[0, 0]
            assert pixels.shape == (3, 4, 16, 16) and (label, index) in ((0, -1), (0, 0))
