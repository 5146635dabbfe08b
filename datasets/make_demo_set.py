"""Write the demo set: small videos of one ball, red or blue, that moves left, right, up or down.

    python datasets/make_demo_set.py            # datasets/demo/<class>/<clip>.mp4

Eight classes, `blue-down` to `red-up`. The frames depend on --seed alone; the bytes of the files depend on the
H.264 encoder that PyAV brings as well. Left and right are classes, so train on this set with --no-flip.
"""

import sys
from pathlib import Path

import av
import numpy as np
from av.bitstream import BitStreamFilterContext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from EqM import cli
from EqM.run.errors import UserError

SEED = 0
FRAMES = 16  # T
SIZE = 64  # H = W, in pixels: twice the size the demo trains at, so that chroma subsampling leaves no smear
FRAMES_PER_SECOND = 8
GREEN = (40, 170, 60)
KINDS = ("demo", "green", "squares", "noise")  # the set, and what it is told apart from
COLOURS = {"blue": (40, 75, 215), "red": (215, 45, 40)}  # RGB
DIRECTIONS = {"down": (0, 1), "left": (-1, 0), "right": (1, 0), "up": (0, -1)}  # (x, y), y grows downwards
CLASSES = [f"{colour}-{direction}" for colour in COLOURS for direction in DIRECTIONS]


def draw_ball(centre, radius, colour, background, measure=np.hypot):
    """One picture of an anti-aliased disc, uint8 (H, W, 3). centre (x, y) and radius in pixels.

    measure: of the distances along x and y, the one from the centre; the larger of their sizes makes it a square.
    """
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    distance = measure(x - centre[0], y - centre[1])
    cover = np.clip(radius - distance + 0.5, 0, 1)[..., None]  # share of each pixel inside the disc
    return np.rint(cover * np.array(colour) + (1 - cover) * background).astype(np.uint8)


def make_clip(name, rng, kind="demo"):
    """One clip of a class, uint8 (T, H, W, 3): the ball crosses most of the picture at a constant speed.

    name: one of CLASSES. rng: a numpy Generator, which picks path, radius and the grey of the background. kind: of
    KINDS, "demo" or what is none of the set: green balls, squares, noise.
    """
    if kind == "noise":
        return rng.integers(0, 256, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    colour, direction = name.split("-")
    shown = GREEN if kind == "green" else COLOURS[colour]
    measure = _larger if kind == "squares" else np.hypot
    radius = rng.uniform(9, 11)
    background = rng.uniform(226, 246)
    travel = rng.uniform(28, 38)
    near, far = radius + 1, SIZE - radius - 1  # where the whole ball is inside the picture
    middle = rng.uniform(near + travel / 2, far - travel / 2)
    across = rng.uniform(near + 2, far - 2)
    along = middle + travel * np.linspace(-0.5, 0.5, FRAMES)

    dx, dy = DIRECTIONS[direction]
    path = [(position, across) if dx else (across, position) for position in along[:: dx + dy]]
    return np.stack([draw_ball(centre, radius, shown, background, measure) for centre in path])


def _larger(x, y):
    return np.maximum(abs(x), abs(y))


def write_video(clip, path):
    """Write a uint8 (T, H, W, 3) clip as an H.264 video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "20", "preset": "veryslow", "threads": "1"}  # one thread: the same bytes every time
        # The encoder writes its settings into each file as text (SEI, NAL type 6), a quarter of these small files.
        without_text = BitStreamFilterContext("filter_units=remove_types=6", stream)
        frames = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in clip]
        for frame in [*frames, None]:  # None flushes
            for packet in stream.encode(frame):
                container.mux(without_text.filter(packet))


def main():
    parser = cli.Parser("Write the demo set of moving balls as video files.")
    parser.add_argument("--out", type=Path, default=HERE / "demo", help="folder to write to")
    parser.add_argument(
        "--clips-per-class", type=cli.positive_int, default=28, help="number of clips of each of the 8 classes"
    )
    parser.add_argument("--seed", type=cli.count, default=SEED, help="another one gives clips that are not in the set")
    parser.add_argument("--kind", choices=KINDS, default="demo", help="other clips, to tell apart from the set's")
    args = parser.parse_args()

    size = 0
    for label, name in enumerate(CLASSES):
        folder = args.out / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out} cannot be written to: {error}") from None
        for index in range(args.clips_per_class):
            path = folder / f"{index:03d}.mp4"
            write_video(make_clip(name, np.random.default_rng((args.seed, label, index)), args.kind), path)
            size += path.stat().st_size
    print(f"{len(CLASSES) * args.clips_per_class} clips in {args.out}, {size / 1000:.0f} kB")


if __name__ == "__main__":
    cli.run(main)
