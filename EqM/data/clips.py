"""Frames of a video file: which ones, how they are decoded, and how they are shown: upright, with square pixels."""

import io
import itertools
import os
from bisect import bisect_right
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

# Containers that hold their own frames. Playlists (concat, hls, dash, ...) name other files, here or on the network.
CONTAINERS = "avi,mov,matroska,mpegts,mpeg,mpegvideo,asf,flv,ogg,ivf,h264,hevc,m4v,mjpeg,gif,dv,nut,mxf"
# Codecs of which every packet is one frame, shown once (VP8 has packets that are never shown).
ONE_FRAME_A_PACKET = ("h264", "hevc", "mpeg4", "vp9", "av1", "libdav1d", "mjpeg", "prores")
NO_FRAME = 16  # bytes; an MPEG-4 packet this small may say "as before" and give no frame
STRETCH = 10  # pixels further from square than this are a damaged header
TURNS = {  # display matrix (a, b, c, d), x' = a x + c y, y' = b x + d y, to what shows the frame upright
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}


class Packet(NamedTuple):
    pts: int | None
    dts: int | None
    is_key: bool
    is_sound: bool  # neither dropped by an edit list, nor known to be damaged, nor too small for a frame


def frame_indices(count, num_frames, frame_interval=None, rng=None):
    """Which of count frames to take, in order; a clip that is too short repeats its last frame.

    Without frame_interval: num_frames spread evenly from the first to the last. With it: a random window
    of frames that far apart, drawn from rng (the first window without one).
    """
    if frame_interval is None:
        return [round(i * (count - 1) / max(1, num_frames - 1)) for i in range(num_frames)]
    room = count - 1 - (num_frames - 1) * frame_interval
    start = int(rng.integers(room + 1)) if rng is not None and room > 0 else 0
    return [min(start + i * frame_interval, count - 1) for i in range(num_frames)]


def decode_clip(source, num_frames, frame_interval=None, seed=()):
    """Frames of a clip: a list of num_frames PIL images, chosen by frame_indices, upright and with square pixels.

    source: a path, or the bytes of a file.
    The frames are those of a full decode. Where the packets' times are sound, it seeks to them; else it decodes
    from the start. The number of packets stands in for the number of frames, which headers misstate; should
    another number decode, the choice is made again from that number. Raises OSError or ValueError if nothing
    decodes, and whatever else FFmpeg says about damaged files.
    """

    def choose(count):
        return frame_indices(max(count, 1), num_frames, frame_interval, np.random.default_rng(seed))

    with _open(source) as container:
        stream, packets = _survey(container)
        count, number = len(packets), stream.index
        wanted = choose(count)
        kept = _by_seeking(container, stream, packets, sorted(set(wanted)))
    if kept is not None:
        return [kept[index] for index in wanted]
    for _ in range(3):  # the second time the count is right, unless the file changes under us
        wanted = choose(count)
        kept, decoded = {}, 0
        with _open(source) as container:
            stream = container.streams[number]
            stream.thread_count = 1
            try:
                for frame in container.decode(stream):
                    if decoded in wanted:
                        kept[decoded] = _shown(frame, stream)
                    decoded += 1
                    if frame_interval is not None and decoded > wanted[-1]:
                        break
            except av.FFmpegError:
                pass  # a truncated end: what was decoded before it still counts
        if all(index in kept for index in wanted) and (frame_interval is not None or decoded == count):
            return [kept[index] for index in wanted]
        if decoded == 0:
            raise ValueError("no frame decodes")
        count = decoded
    raise ValueError("it decodes to another number of frames each time")


def first_frame(path):
    """The first frame of a clip, a PIL image, upright and with square pixels. Raises as decode_clip does."""
    with _open(path) as container:
        number = _survey(container)[0].index
    with _open(path) as container:
        stream = container.streams[number]
        for frame in container.decode(stream):
            return _shown(frame, stream)
    raise ValueError("no frame decodes")


def _open(source):
    """The container of a local file or of its bytes, never of what a playlist in it points to."""
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    file = io.BytesIO(source) if isinstance(source, bytes) else "file:" + os.fspath(source)
    return av.open(file, metadata_errors="ignore", options=options)


def _survey(container):
    """The video stream and its Packets in the file's order. A cover picture is not taken for the clip."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise ValueError("it has no video stream")
    packets = {stream.index: [] for stream in streams}
    for packet in container.demux(streams):
        if packet.size > 0:
            tiny = packet.size < NO_FRAME and packet.stream.codec_context.name == "mpeg4"
            sound = not (packet.is_corrupt or packet.is_discard or tiny)
            packets[packet.stream.index].append(Packet(packet.pts, packet.dts, packet.is_keyframe, sound))
    moving = [stream for stream in streams if len(packets[stream.index]) > 1]
    stream = (moving or streams)[0]
    return stream, packets[stream.index]


def _by_seeking(container, stream, packets, wanted):
    """{index: PIL image} of the wanted frames in order of time, or None where only a full decode is sure.

    Every frame that decodes on the way must be the next one by the packets' times; so wrong times are noticed.
    """
    times = sorted(packet.pts for packet in packets if packet.pts is not None)
    sure = (
        stream.codec_context.name in ONE_FRAME_A_PACKET
        and len(times) == len(packets) == len(set(times))
        and packets[0].is_key
        and packets[0].pts == times[0]
        and all(packet.is_sound for packet in packets)
    )
    if not sure:
        return None
    place = {packet.pts: n for n, packet in enumerate(packets)}
    keys = [n for n, packet in enumerate(packets) if packet.is_key]

    def start(index):
        """The last key packet that comes before this frame both in the file and in time."""
        before = keys[: bisect_right(keys, place[times[index]])]
        return next(n for n in reversed(before) if packets[n].pts <= times[index])

    starts = [start(index) for index in wanted]
    last = {n: max(place[times[i]] for i, s in zip(wanted, starts, strict=True) if s == n) for n in starts}
    if 2 * sum(end - n for n, end in last.items()) >= len(packets):
        return None  # seeking would hardly save anything
    stream.thread_count = 1
    kept = {}
    for first in last:
        here = [index for index, n in zip(wanted, starts, strict=True) if n == first]
        key = packets[first]
        container.seek(key.pts if key.dts is None else key.dts, stream=stream)
        if not _decode_from(container, stream, key, times, here, kept):
            return None
    return kept


def _decode_from(container, stream, key, times, wanted, kept):
    """Fill kept with the wanted frames, from the key packet on; whether all came, each in its turn."""
    expected, last = times.index(key.pts), wanted[-1]
    packets = itertools.dropwhile(lambda packet: packet.pts != key.pts, container.demux(stream))
    for packet in packets:
        for frame in packet.decode():
            if frame.pts is not None and frame.pts < key.pts:
                continue  # shown before the key frame, and made from what came before it
            if expected == len(times) or frame.pts != times[expected] or frame.is_corrupt:
                return False
            if expected in wanted:
                kept[expected] = _shown(frame, stream)
            if expected == last:
                return True
            expected += 1
    return False


def _shown(frame, stream):
    """A decoded frame as a PIL image, as a player would show it."""
    image = frame.to_image()
    aspect = stream.sample_aspect_ratio  # width of a pixel by its height
    if aspect and 1 / STRETCH <= aspect <= STRETCH:
        shape = (round(image.width * max(1, aspect)), round(image.height / min(1, aspect)))
        if shape != image.size:
            image = image.resize(shape, Image.Resampling.BICUBIC)
    turn = TURNS.get(_display_matrix(frame))
    return image if turn is None else image.transpose(turn)


def _display_matrix(frame):
    """The signs (a, b, c, d) of a frame's display matrix, turned to the nearest right angle; None without one."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32, 5).tolist()
            straight = abs(a) + abs(d) >= abs(b) + abs(c)
            return tuple(int(np.sign(entry)) for entry in ((a, 0, 0, d) if straight else (0, b, c, 0)))
    return None
