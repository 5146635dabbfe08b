"""Train the demo's autoencoder on the frames of the demo set: 32x32 pixels to 4 channels of 8x8, on a CPU.

    python datasets/train_demo_vae.py           # datasets/demo-vae: a diffusers AutoencoderKL in FP32

Letters: N frames, C = 4 latent channels, h w height and width in latent units.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

import make_demo_set
import score_demo

sys.path.insert(0, str(score_demo.HERE.parent))

from EqM import cli
from EqM.data import autoencoder as autoencoders
from EqM.data.images import centre_crop

STEPS = 2000
BATCH = 32  # frames
LEARNING_RATE = 3e-3  # at its peak, one cycle
# Against the mean absolute error of a pixel:
KL_WEIGHT = 3e-4  # nats per latent number
KURTOSIS_WEIGHT = 5e-4  # fourth moment of the standardised latents; 3 is a Gaussian's
CORRELATION_WEIGHT = 0.02  # squared correlation between channels
SEED = 0


def build():
    """An untrained autoencoder of 0.2 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=score_demo.SIZE,
        mid_block_add_attention=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def load_frames(folder):
    """Every frame of every clip of the set, in [-1, 1], (N, 3, 32, 32). Raises UserError."""
    clips, _ = score_demo.load_set(folder, num_frames=make_demo_set.FRAMES)
    return autoencoders.to_pixels(torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2))


def fresh_frames(clips_per_class=4):
    """Frames of clips that are not in the set and met no video encoder, like load_frames."""
    rng = np.random.default_rng((SEED, 1))
    clips = [make_demo_set.make_clip(name, rng) for name in make_demo_set.CLASSES for _ in range(clips_per_class)]
    small = [centre_crop(Image.fromarray(frame), score_demo.SIZE) for clip in clips for frame in clip]
    return autoencoders.to_pixels(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2))


def train(vae, frames, steps):
    """Minimise the mean absolute error of a pixel, the KL divergence from N(0, I) and the spikiness of the latents.

    A small ball on a plain ground tempts the encoder to say everything in a few huge numbers, with all
    channels alike. Such latents rebuild the picture well, but flow badly from Gaussian noise.
    """
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    progress = tqdm(range(steps), desc="autoencoder", mininterval=5)
    for _ in progress:
        batch = frames[torch.randint(len(frames), (BATCH,))]
        mirrored = [axis for axis in (2, 3) if torch.rand(()) < 0.5]  # a still frame has no direction to lose
        batch = batch.flip(mirrored)
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).abs().mean()
        divergence = posterior.kl().sum() / posterior.mean.numel()
        kurtosis, correlation = shape_of(posterior.mean)
        loss = error + KL_WEIGHT * divergence + KURTOSIS_WEIGHT * kurtosis + CORRELATION_WEIGHT * correlation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        figures = {"error": error, "kl": divergence, "kurtosis": kurtosis}
        progress.set_postfix({name: f"{value.item():.4f}" for name, value in figures.items()}, refresh=False)


def shape_of(z):
    """Mean kurtosis of the channels of z (N, C, h, w) and mean square of the correlations between them."""
    channels = z.transpose(0, 1).flatten(1)
    channels = (channels - channels.mean(1, keepdim=True)) / channels.std(1, keepdim=True)
    correlations = (channels @ channels.T / channels.shape[1]).fill_diagonal_(0)
    return channels.pow(4).mean(1).mean(), correlations.square().mean()


@torch.no_grad()
def standardise(vae, frames):
    """Give each latent channel mean 0 and variance 1 over the frames, without changing any reconstruction.

    Shift and scale go into the last layer of the encoder and, inverted, into the first of the decoder. Both
    are 1x1 convolutions, so this is exact.
    """
    z = encode(vae, frames)
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))  # (C,)
    channels = len(mean)
    out, into = vae.quant_conv, vae.post_quant_conv
    out.weight[:channels] /= std.view(-1, 1, 1, 1)
    out.bias[:channels] = (out.bias[:channels] - mean) / std
    out.bias[channels:] -= 2 * std.log()  # the other half of the output is the log of the variance
    into.bias += into.weight[:, :, 0, 0] @ mean
    into.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def encode(vae, frames):
    """Latents drawn from the posterior, (N, C, h, w)."""
    return torch.cat([vae.encode(part).latent_dist.sample() for part in frames.split(256)])


@torch.no_grad()
def psnr(vae, frames):
    """Peak signal-to-noise ratio, in dB, of frames (N, 3, H, W) decoded from drawn latents."""
    pairs = zip(encode(vae, frames).split(256), frames.split(256), strict=True)
    errors = [(vae.decode(z).sample.clamp(-1, 1) - part).square().flatten(1).mean(1) for z, part in pairs]
    return 10 * torch.log10(4 / torch.cat(errors).mean()).item()


def main():
    parser = cli.Parser("Train the demo's autoencoder on the demo set.")
    parser.add_argument("--demo", type=Path, default=score_demo.HERE / "demo", help="the demo set")
    parser.add_argument("--out", type=Path, default=score_demo.HERE / "demo-vae", help="folder to write to")
    parser.add_argument("--steps", type=cli.positive_int, default=STEPS, help=f"training steps of {BATCH} frames")
    args = parser.parse_args()

    torch.manual_seed(SEED)
    frames = load_frames(args.demo)
    vae = build()
    train(vae, frames, args.steps)
    vae.eval()
    standardise(vae, frames)
    vae.save_pretrained(args.out)

    z = encode(vae, frames)
    print(f"PSNR: {psnr(vae, frames):.1f} dB on the set, {psnr(vae, fresh_frames()):.1f} dB on clips outside it")
    print("latent kurtosis {:.2f}, squared correlation of channels {:.4f}".format(*shape_of(z)))
    print("latent mean per channel:", *(f"{value:.3f}" for value in z.mean(dim=(0, 2, 3))))
    print("latent std per channel:", *(f"{value:.3f}" for value in z.std(dim=(0, 2, 3))))


if __name__ == "__main__":
    cli.run(main)
