"""Files of samples: png, gif, mp4, the npz of ADM's evaluation suite, and the labelled contact sheet."""

import zipfile
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
from PIL import Image, ImageDraw, ImageSequence

from EqM.run.errors import UserError, reason

UNREADABLE = Exception  # over damaged bytes decoders raise struct.error, TypeError, AssertionError, anything
READ_AHEAD = 256  # images


def save_sample(path, frames, fps):
    """Write uint8 frames (T, H, W, 3) as .png (the one frame), .gif or .mp4, by the path's suffix.

    The file appears under its name once it is whole. Raises UserError if it cannot be written.
    """
    kind = path.suffix[1:]
    partial = path.with_suffix(".partial")
    try:
        if kind == "mp4":
            _save_mp4(partial, frames, fps)
        else:
            images = [Image.fromarray(frame) for frame in frames]
            # GIF counts hundredths of a second, and players slow down anything under 2.
            duration = max(20, round(100 / fps) * 10)
            motion = {"save_all": True, "append_images": images[1:], "duration": duration, "loop": 0}
            images[0].save(partial, kind, **(motion if kind == "gif" else {}))
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({reason(error)}); samples before it are whole") from None


def is_whole(path):
    """Whether a sample that was written can be read to its end."""
    try:
        load_sample(path)
    except UNREADABLE:
        return False
    return True


def _save_mp4(path, frames, fps):
    """The same frames give the same file only if their sides are multiples of 16: x264 reads memory beyond others."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if frames.shape[1] % 2 or frames.shape[2] % 2 else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def load_sample(path):
    """Frames of a written sample, uint8 (T, H, W, 3)."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def save_npz(path, images):
    """Write .png files as arr_0, uint8 (N, H, W, 3), with a few images in memory at a time. images: their paths."""
    first = load_sample(images[0])[0]
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), *first.shape)}
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
    with archive, archive.open("arr_0.npy", "w", force_zip64=True) as file, ThreadPoolExecutor() as pool:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(images), READ_AHEAD):
            for frames in pool.map(load_sample, images[start : start + READ_AHEAD]):
                file.write(frames[0].tobytes())


def as_clips(samples):
    """Images (N, H, W, 3) as clips of one frame, (N, 1, H, W, 3); clips pass."""
    return samples if samples.ndim == 5 else samples[:, None]


def contact_sheet(samples, names, columns=None, scale_to=96, together=1):
    """One picture of many samples, each labelled with its name; the frames of a clip stand side by side.

    samples: list of uint8 (T, H, W, 3), all of one shape. Small frames are enlarged to about scale_to
    pixels without smoothing. together: so many in turn, such as a start and its result, share a row. Returns a PIL
    image.
    """
    T, H, W, _ = samples[0].shape
    factor = max(1, scale_to // H)
    frame_w, gap = W * factor, 2
    tile_w, tile_h, caption = T * (frame_w + gap) - gap, H * factor, 14
    columns = columns or max(1, min(len(samples), 1600 // (tile_w + 8)) // together) * together
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * (tile_w + 8), rows * (tile_h + caption + 4)), "lightgrey")
    draw = ImageDraw.Draw(sheet)
    for i, (frames, name) in enumerate(zip(samples, names, strict=True)):
        left, top = i % columns * (tile_w + 8) + 4, i // columns * (tile_h + caption + 4)
        draw.text((left, top), name, fill="black")
        for t, frame in enumerate(frames):
            enlarged = Image.fromarray(frame).resize((frame_w, tile_h), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + t * (frame_w + gap), top + caption))
    return sheet
