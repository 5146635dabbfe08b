"""Does a clip show its class? A rule for the demo set, and a command that applies it to generated samples.

    python datasets/score_demo.py results/samples        # a folder with labels.csv, as the sampler writes it
    python datasets/score_demo.py results/samples --vae datasets/demo-vae       # and what the autoencoder alone costs

The rule looks at the pixels that are clearly red or clearly blue against the background. They must form one
round ball of one colour in every frame, and its centre must keep moving in one of the four directions.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from EqM import cli
from EqM.data import autoencoder as autoencoders
from EqM.data import media
from EqM.data.clips import decode_clip
from EqM.data.files import find_files
from EqM.data.images import centre_crop
from EqM.engine import precision
from EqM.run.errors import UserError

CLIP_LEN = 4  # frames of a clip, and
SIZE = 32  # its height and width in pixels, as the demo trains

MIN_CONTRAST = 70  # how far red minus blue differs from the background's, of 255
MIN_AREA, MAX_AREA = 0.03, 0.2  # of the picture; the balls of the set cover 0.06 to 0.09
MIN_PURITY = 0.85  # share of the coloured pixels that have the ball's colour
MAX_SPREAD = 1.5  # mean squared distance from the centre, over that of a disc of the same area
MIN_TRAVEL = 0.2  # from the first frame to the last, of the picture's side; in the set 0.44 to 0.59
MIN_STRAIGHTNESS = 2  # travel along the direction over travel across it


def score(clip):
    """The class a clip shows, such as "blue-up", or None if it shows none clearly.

    clip: uint8 (T, H, W, 3), at least two frames.
    """
    clip = clip.astype(int)
    height, width = clip.shape[1:3]
    contrast = clip[..., 0] - clip[..., 2]  # red minus blue, (T, H, W)
    contrast = contrast - np.median(contrast)
    red, blue = contrast > MIN_CONTRAST, contrast < -MIN_CONTRAST
    colour, ball = ("red", red) if red.sum() > blue.sum() else ("blue", blue)
    if ball.sum() < MIN_PURITY * (red | blue).sum():
        return None

    centres = []
    for mask in ball:
        area = mask.sum()
        if not MIN_AREA < area / mask.size < MAX_AREA:
            return None
        pixels = np.argwhere(mask)[:, ::-1]  # (x, y)
        centre = pixels.mean(axis=0)
        spread = ((pixels - centre) ** 2).sum(axis=1).mean()
        if spread > MAX_SPREAD * area / (2 * np.pi):
            return None
        centres.append(centre / (width, height))

    steps = np.diff(centres, axis=0)  # (T - 1, 2)
    travel = steps.sum(axis=0)
    axis = int(abs(travel[1]) > abs(travel[0]))
    forward = steps[:, axis] * np.sign(travel[axis])
    if abs(travel[axis]) < max(MIN_TRAVEL, MIN_STRAIGHTNESS * abs(travel[1 - axis])) or forward.min() <= 0:
        return None
    return f"{colour}-{(('left', 'right'), ('up', 'down'))[axis][int(travel[axis] > 0)]}"


def load_set(folder, num_frames=CLIP_LEN):
    """The clips of the demo set as training reads them: list of uint8 (T, SIZE, SIZE, 3), list of class names."""
    paths, labels, names = find_files(folder, clips=True)
    clips = [np.stack([centre_crop(f, SIZE) for f in decode_clip(path, num_frames)]) for path in paths]
    return clips, [names[label] for label in labels]


def load_samples(folder):
    """Generated clips and the class each was asked for, from the folder's labels.csv. Raises UserError."""
    table = Path(folder) / "labels.csv"
    try:
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read: {error}") from None
    if not rows or not {"file", "class"} <= rows[0].keys():
        raise UserError(f"{table} needs a header 'file,label,class' and at least one row")
    try:
        clips = [media.load_sample(table.parent / row["file"]) for row in rows]
    except media.UNREADABLE as error:
        raise UserError(f"a clip that {table} names cannot be read: {error}") from None
    return clips, [row["class"] for row in rows]


def reconstruct(clips, vae):
    """What an autoencoder's folder makes of clips, through its posterior's mean: uint8 (N, T, H, W, 3)."""
    autoencoder = autoencoders.load(vae, precision.fp32(torch.device("cpu")))
    pixels = autoencoders.to_pixels(torch.from_numpy(np.stack(clips))).movedim(-1, 1)
    return autoencoders.to_uint8(autoencoder.decode(autoencoder.mean(pixels))).movedim(1, -1).numpy()


def tally(clips, names):
    """How many clips show their class, as text: "62 of 64 (96.9 %)"."""
    right = sum(score(clip) == name for clip, name in zip(clips, names, strict=True))
    return f"{right} of {len(clips)} show their class ({100 * right / len(clips):.1f} %)"


def main():
    parser = cli.Parser("Print the share of samples that show the class asked for.")
    parser.add_argument("samples", type=Path, help="folder with labels.csv and the clips it names")
    parser.add_argument("--demo", type=Path, default=HERE / "demo", help="the demo set, scored for comparison")
    parser.add_argument("--vae", help="folder of an AutoencoderKL, whose reconstructions of the set are scored too")
    args = parser.parse_args()
    print("samples:", tally(*load_samples(args.samples)))
    clips, names = load_set(args.demo)
    print("the set itself:", tally(clips, names))
    if args.vae:
        print("the set through the autoencoder:", tally(reconstruct(clips, args.vae), names))


if __name__ == "__main__":
    cli.run(main)
