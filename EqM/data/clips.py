"""Frames of a video file: which ones, and how they are decoded."""

import os

import av
import numpy as np


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


def decode_clip(path, num_frames, frame_interval=None, seed=()):
    """Frames of a clip: a list of num_frames PIL images, chosen by frame_indices.

    Always decodes from the start: seeks in B-frame MPEG-4 AVI land on wrong frames. The container's packet
    count stands in for the number of frames, which headers misstate; should another number decode, the
    choice is made again from that number. Raises OSError or ValueError if nothing decodes.
    """
    with av.open(os.fspath(path), metadata_errors="ignore") as container:
        count = sum(packet.size > 0 for packet in container.demux(_video_stream(container, path)))
    while True:
        rng = np.random.default_rng(seed)
        wanted = frame_indices(max(count, 1), num_frames, frame_interval, rng)
        kept, decoded = {}, 0
        with av.open(os.fspath(path), metadata_errors="ignore") as container:
            stream = _video_stream(container, path)
            stream.thread_count = 1
            try:
                for frame in container.decode(stream):
                    if decoded in wanted:
                        kept[decoded] = frame.to_image()
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


def _video_stream(container, path):
    if not container.streams.video:
        raise ValueError(f"{path} has no video stream")
    return container.streams.video[0]
