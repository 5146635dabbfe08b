"""Which network a set of flags or a checkpoint describes, and building it."""

from EqM.data.geometry import geometry
from EqM.models import EBM_KINDS, EqM, EqM_models
from EqM.run import checkpoint
from EqM.run.errors import UserError, flag_of
from EqM.transport import PATHS, PREDICTIONS

# What a checkpoint's own args settle when it is used again; the values are the published defaults.
MODEL_DEFAULTS = {
    "model": "EqM-XL/2",
    "image_size": 256,
    "num_classes": 1000,
    "vae": "ema",
    "uncond": True,
    "ebm": "none",
    "video": False,
    "clip_len": 16,
    "patch_frames": None,
    "path_type": "Linear",
    "prediction": "velocity",
}

# What these may be in a checkpoint, which is a file from anywhere.
MODEL_KINDS = {name: type(default) for name, default in MODEL_DEFAULTS.items() if default is not None} | {
    "model": EqM_models,
    "ebm": EBM_KINDS,
    "patch_frames": int,
    "path_type": PATHS,
    "prediction": PREDICTIONS,
}


def follow_checkpoint(args, trained_with):
    """Fill in what the flags left open from the args a checkpoint was trained with, else the published defaults.

    Raises UserError if those args make no sense, or a flag contradicts them. Another autoencoder does not: the same
    one may lie elsewhere.
    """
    checkpoint.check_args(trained_with, MODEL_KINDS)
    for name, default in MODEL_DEFAULTS.items():
        given, trained = getattr(args, name), trained_with.get(name)
        agree = given == trained or (name == "vae" and "none" not in (given, trained))
        if given is not None and trained is not None and not agree:
            raise UserError(
                f"{flag_of(name)} {given} contradicts the checkpoint, which was trained with {trained}; leave it out"
            )
        setattr(args, name, given if given is not None else default if trained is None else trained)


def build_model(args) -> EqM:
    """The network the settled args describe, on the CPU in FP32. Raises UserError as check_geometry does."""
    channels, input_size = check_geometry(args)
    return EqM_models[args.model](
        input_size=input_size,
        num_classes=args.num_classes,
        in_channels=channels,
        uncond=args.uncond,
        ebm=args.ebm,
        patch_frames=args.patch_frames,
    )


def check_geometry(args):
    """Raise UserError unless image size, clip length and patch fit each other and the autoencoder.

    Returns (latent channels, model input size): an int, or (T, h, w) for clips.
    """
    latents = geometry(args.vae)
    patch = int(args.model.split("/")[1])
    if args.image_size % (latents.space * patch):
        raise UserError(
            f"--image-size {args.image_size} must be a multiple of {latents.space * patch}: "
            f"the autoencoder divides it by {latents.space}, {args.model}'s patches by {patch}"
        )
    channels, *frames, side, _ = latents.shape(args)
    if not frames:
        return channels, side
    patch_frames = args.patch_frames or patch
    if frames[0] % patch_frames:
        what = f"--clip-len {args.clip_len}"
        if latents.time > 1:
            what = f"the {frames[0]} latent frames of {what}"
        raise UserError(f"{what} must be a multiple of the patch's {patch_frames} frames (--patch-frames sets another)")
    return channels, (frames[0], side, side)
