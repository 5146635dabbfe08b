"""Where precision is lost: errors of a checkpoint's operations against FP64, and the gradients FP16 loses.

    python -m EqM.measure.precision_error --ckpt CHECKPOINT --out precision_error.md
    python -m EqM.measure.precision_error --ckpt EARLY LATE          # gradients lost in both, errors of the last

One function computes every quantity, in FP64, FP32 and 16 bits alike, from the same weights, data and noise; what
differs is the error. Training rows use the trained weights, sampling rows the EMA weights.

Letters: N batch, C channels, T frames, h w latent height and width.
"""

import math
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from EqM import architecture, cli
from EqM.data import autoencoder as autoencoders
from EqM.data import latent_cache, loader
from EqM.data.tables import open_data
from EqM.engine import precision
from EqM.measure.report import table
from EqM.pipeline import EqMPipeline
from EqM.run import checkpoint, distributed, seeds
from EqM.run.errors import UserError, reason
from EqM.transport import C_DEFAULTS, PathPoint, Transport, dispersive_loss

GUIDANCE = (1.0, 1.5, 4.0)
# How the samplers besides gd and ngd go there; euler is gd. adam's steps have a size of their own.
OTHERS = {"nag": {}, "adam": {"stepsize": None}, "langevin": {"temperature": 0.01}, "heun": {}, "dopri5": {}}
PARTS = {  # what to say of a kind of module, and its name in models.py
    "patch embedding": "x_embedder",
    "time embedding": "t_embedder",
    "adaLN modulation": "adaLN_modulation",
    "attention": "attn",
    "MLP": "mlp",
    "last layer": "final_layer",
}


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_checkpoints_model(parser)
    cli.add_runtime(parser)
    group = parser.add_argument_group("data" + cli.LEFT_OUT)
    group.add_argument("--data-path", help="folder of images or clips")
    group.add_argument("--csv", help="labels of a flat folder of clips")
    group.add_argument("--image-column", help="of parquet, Arrow and hf: data; left out: found")
    group.add_argument("--label-column", help="of such data; left out: found")
    group.add_argument("--latents", help="folder that extract_latents.py made, instead of --data-path")
    group = parser.add_argument_group("trajectories")
    group.add_argument("--stepsize", type=cli.positive, default=0.0017, help="eta, the step along the field")
    group.add_argument("--num-sampling-steps", type=cli.number(int, 2), default=250, help="sampling points")
    group.add_argument("--mu", type=cli.fraction, default=0.3, help="ngd's momentum")
    group.add_argument("--cfg-channels", type=cli.positive_int, default=3, help="how many leading channels are guided")
    group = parser.add_argument_group("measurement")
    group.add_argument("--ckpt", nargs="+", required=True, help="checkpoints of one run; errors are of the last")
    group.add_argument("--batch-size", type=cli.positive_int, default=16, help="samples of every quantity")
    group.add_argument("--out", type=Path, default="precision_error.md", help="Markdown file of the tables")
    return parser.parse_args()


class KeepDouble(TorchFunctionMode):
    """`.float()` leaves tensors alone: the FP32 islands of the code would round the FP64 reference."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.Tensor.float else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Subject:
    """Weights and the inputs they are measured on, all in one dtype."""

    model: torch.nn.Module  # the trained weights
    ema: torch.nn.Module  # those that are sampled
    vae: autoencoders.VAE | None  # None where latents are pixels
    transport: Transport
    x1: torch.Tensor  # (N, C, [T,] h, w) latents of data
    point: PathPoint  # between noise and x1
    labels: torch.Tensor  # (N,)
    noise: torch.Tensor  # (N, C, [T,] h, w), where trajectories start
    pixels: torch.Tensor | None  # (N, 3, [T,] H, W), x1 decoded
    stepsize: float = 0.0017
    points: int = 250
    mu: float = 0.3
    cfg_channels: int = 3
    islands: bool = False  # whether the networks keep theirs, as in training and sampling

    def double(self):
        """The same in FP64: inputs and weights keep their FP32 values."""
        return replace(
            self,
            model=deepcopy(self.model).double(),
            ema=deepcopy(self.ema).double(),
            vae=self.vae and _with_network(self.vae, deepcopy(self.vae.network).double()),
            x1=self.x1.double(),
            point=PathPoint(**{name: value.double() for name, value in vars(self.point).items()}),
            noise=self.noise.double(),
            pixels=None if self.pixels is None else self.pixels.double(),
        )

    def with_islands(self, run_in):
        """The same as training and sampling run it in a precision."""
        networks = {name: run_in.keep_islands(deepcopy(getattr(self, name))) for name in ("model", "ema")}
        return replace(self, **networks, islands=True)


def _with_network(vae, network, run_in=None):
    """An autoencoder with another network, and in another precision if given."""
    return autoencoders.VAE(network, run_in or vae.run_in, vae.scale, vae.shift, vae.chunk)


@contextmanager
def part_in_precision(model, kind, run_in):
    """Run one kind of module in a precision, and all else of the model in the dtype of its weights."""
    modules = [module for name, module in model.named_modules() if name.split(".")[-1] == kind]
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = run_in.autocast()(module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:  # an island's
                module.forward = forward


def layers(parameter):
    """Rows a parameter counts for: its block or embedding, and in blocks also its kind over all of them."""
    part = parameter.split(".")
    return [f"blocks.{part[1]}", f"blocks.*.{part[2]}.{part[3]}"] if part[0] == "blocks" else [part[0]]


def by_layer(gradients):
    """Gradients by parameter name to one flat vector a layer, blocks before the kinds of their layers."""
    rows = {}
    for name, gradient in gradients.items():
        for layer in layers(name):
            rows.setdefault(layer, []).append(gradient.flatten())
    return {layer: torch.cat(rows[layer]) for layer in sorted(rows, key=lambda layer: "*" in layer)}


def gradients_of_loss(subject, run_in, scaled=True):
    """(loss, {parameter name: gradient}, scale) of the training loss, without label dropout.

    scaled: in FP16 the loss is scaled as the GradScaler begins, and halved while gradients are not finite.
    """
    model, point = subject.model, subject.point
    scale = run_in.grad_scaler().get_scale() if scaled else 1.0
    while True:
        model.zero_grad(set_to_none=True)
        with run_in.autocast():
            output = model(point.xt, point.t, subject.labels)
        loss = subject.transport.loss(output, point).mean()
        (loss * scale).backward()
        gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        if scale <= 1 or all(torch.isfinite(gradient).all() for gradient in gradients.values()):
            return loss.detach(), gradients, scale
        scale /= 2


def quantities(subject, run_in):
    """All that is compared, by the name of its row: tensors of any shape on the CPU, in the order of the table."""
    rows = {
        **_forward(subject, run_in),
        **_training(subject, run_in),
        **_energies(subject, run_in),
        **(_autoencoder(subject, run_in) if subject.vae else {}),
        **_sampling(subject, run_in),
    }
    return {name: value.cpu() for name, value in rows.items()}


@torch.no_grad()
def _forward(subject, run_in):
    """Outputs of the network's parts, the field, and the field with one kind of part alone in the precision."""
    model, point = subject.model, subject.point
    parts = {name: module for name, module in model.named_children() if name != "blocks"}
    parts |= {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    order = sorted(parts, key=lambda name: name == "final_layer")
    rows = {f"output of {name}": None for name in order}

    def keep(row):
        return lambda module, inputs, output: rows.update({row: output.detach()})

    hooks = [parts[name].register_forward_hook(keep(f"output of {name}")) for name in order]
    with run_in.autocast():
        field, acts = model(point.xt, point.t, subject.labels, return_act=True)
    for hook in hooks:
        hook.remove()
    rows["field"] = field
    for words, kind in PARTS.items():
        with part_in_precision(model, kind, run_in):
            rows[f"field, {words} alone"] = model(point.xt, point.t, subject.labels)
    rows["dispersive loss"] = dispersive_loss(acts[-1])
    return rows


def _training(subject, run_in):
    loss, gradients, _ = gradients_of_loss(subject, run_in)
    everything = torch.cat([gradient.flatten() for gradient in gradients.values()])
    rows = {"loss": loss, "gradient, all weights": everything}
    return rows | {f"gradient, {layer}": vector for layer, vector in by_layer(gradients).items()}


def _energies(subject, run_in):
    rows = {}
    for kind in ("dot", "l2"):  # the same weights, their output taken for an explicit energy
        model = deepcopy(subject.model)
        model.ebm = kind
        if subject.islands:
            run_in.keep_islands(model)
        with torch.no_grad(), run_in.autocast():
            field, energy = model(subject.point.xt, subject.point.t, subject.labels, get_energy=True)
        _, gradients, _ = gradients_of_loss(replace(subject, model=model), run_in)
        rows[f"energy, {kind}"] = energy
        rows[f"energy's field dE/dx, {kind}"] = field
        rows[f"gradient through the energy, {kind}"] = torch.cat([value.flatten() for value in gradients.values()])
    return rows


def _autoencoder(subject, run_in):
    vae = _with_network(subject.vae, deepcopy(subject.vae.network), run_in)  # a copy: BF16 casts the weights in place
    mean, std = vae.posterior(subject.pixels).unbind(1)
    return {"VAE latents, mean": mean, "VAE latents, deviation": std, "VAE pixels": vae.decode(subject.x1)}


def _sampling(subject, run_in):
    """The guided field at the training points, and where trajectories end."""
    point = subject.point

    def end_of(pipe, scale, sampler="gd", stepsize=subject.stepsize, **more):
        return pipe.descend(
            subject.noise, subject.labels, sampler, subject.points, stepsize, subject.mu, scale,
            subject.cfg_channels, **more,
        )  # fmt: skip

    pipe = EqMPipeline(subject.ema, run_in, transport=subject.transport)
    rows = {}
    for scale in GUIDANCE:
        guided = pipe.guided(subject.labels, scale, subject.cfg_channels)
        rows[f"field, guidance {scale:g}"] = guided(point.xt, point.t)
    for sampler in ("gd", "ngd"):
        for scale in GUIDANCE:
            rows[f"trajectory, {sampler}, guidance {scale:g}"] = end_of(pipe, scale, sampler)
    for sampler, more in OTHERS.items():
        rows[f"trajectory, {sampler}, guidance {GUIDANCE[-1]:g}"] = end_of(pipe, GUIDANCE[-1], sampler, **more)
    in_fp32 = EqMPipeline(subject.ema, precision.fp32(run_in.device), transport=subject.transport)
    for words, kind in PARTS.items():
        with part_in_precision(subject.ema, kind, run_in):
            rows[f"trajectory, gd, {words} alone"] = end_of(in_fp32, 1.0)
    return rows


def relative_error(value, reference):
    """|value - reference| / |reference| in Euclidean norms, as a float; 0 where nothing differs."""
    difference, size = (value.double() - reference).norm().item(), reference.norm().item()
    return difference / size if size else math.inf if difference else 0.0


def vanished(gradients, reference):
    """{layer: share of gradients that are zero}, of those that are not zero in the reference.

    An embedding that no sample of the batch uses has no gradient in any precision, and does not count.
    """
    gradients, reference = by_layer(gradients), by_layer(reference)
    present = {layer: vector != 0 for layer, vector in reference.items()}
    return {
        layer: (gradients[layer][there] == 0).double().mean().item() for layer, there in present.items() if there.any()
    }


def columns_on(device):
    """What is measured on a device: TF32 too where there may be some, no BF16 where the card has none."""
    bf16, fp16 = ["bf16 throughout", "bf16"], ["fp16 throughout", "fp16"]
    if device.type != "cuda":
        return ["fp32", *bf16, *fp16]
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return ["fp32", "tf32", *(bf16 if has_bf16 else []), *fp16]


def resolve(column, device):
    """The Precision of a column. Sets TF32 for it."""
    name = column.split()[0]
    return precision.activate("fp32" if name == "tf32" else name, device, tf32=name == "tf32")


def errors_of(subject, device):
    """Relative error of every quantity of a Subject: {row: {column: error}}.

    `bf16` is what training and sampling run, `bf16 throughout` is autocast without FP32 islands in the network.
    """
    with KeepDouble():
        reference = quantities(subject.double(), precision.fp32(device))  # no autocast, so FP64 stays
    errors = {row: {} for row in reference}
    for column in columns_on(device):
        run_in = resolve(column, device)
        measured = subject if column.endswith("throughout") else subject.with_islands(run_in)
        for row, value in quantities(measured, run_in).items():
            errors[row][column] = relative_error(value, reference[row])
    return errors


def zeros_of(subject, device):
    """({layer: (share without the scaler, share with it)}, scale) of the FP16 gradients of a Subject that are zero.

    scale: what the loss was multiplied by for the latter.
    """
    with KeepDouble():
        _, exact, _ = gradients_of_loss(subject.double(), precision.fp32(device))
    run_in = resolve("fp16", device)
    subject = subject.with_islands(run_in)
    _, bare, _ = gradients_of_loss(subject, run_in, scaled=False)
    _, scaled, scale = gradients_of_loss(subject, run_in)
    without, with_scaler = vanished(bare, exact), vanished(scaled, exact)
    return {layer: (without[layer], with_scaler[layer]) for layer in without}, scale


def _shown(error):
    return f"{error:.1e}" if math.isfinite(error) else "not finite"


def markdown(errors, zeros):
    """Both tables, with a heading and a sentence each.

    errors: as errors_of. zeros: {when: what zeros_of gives}, when being words such as "step 2000".
    """
    columns = list(next(iter(errors.values())))
    rows = [[row, *(_shown(found[column]) for column in columns)] for row, found in errors.items()]
    shares = []
    for layer in dict.fromkeys(layer for found, _ in zeros.values() for layer in found):
        pairs = [found.get(layer, (math.nan, math.nan)) for found, _ in zeros.values()]
        shares.append(
            [layer, *("none" if math.isnan(share) else f"{100 * share:.2f} %" for pair in pairs for share in pair)]
        )
    header = [f"{when}, {how}" for when, (_, scale) in zeros.items() for how in ("unscaled", f"scaled by {scale:g}")]
    return (
        "## Relative error against FP64\n\n"
        "|value - exact| / |exact|, in Euclidean norms. BF16 THROUGHOUT is plain autocast; BF16 is what train.py and\n"
        "sample_gd.py run, with embeddings, adaLN modulation and last layer kept in FP32. `field, attention alone` is\n"
        "the field where attention alone runs in the column's precision. A trajectory's error is that of its end.\n\n"
        + table(["quantity", *map(str.upper, columns)], rows)
        + "\n## FP16 gradients that are zero\n\n"
        "The share of those that are not zero in FP64. `none`: FP64 has no gradient there either.\n\n"
        + table(["layer", *header], shares)
    )


def open_subject(args, path, device):
    """(the Subject of a checkpoint and the data that the arguments name, in FP32 on the device; "step 2000").

    Raises UserError.
    """
    saved = checkpoint.load(path)
    architecture.follow_checkpoint(args, saved["args"])
    if not (args.data_path or args.latents):
        for name in ("data_path", "latents", "csv", "image_column", "label_column"):
            setattr(args, name, saved["args"].get(name))
    if (args.data_path is None) == (args.latents is None):
        raise UserError("give either --data-path or --latents: the checkpoint does not say what it was trained on")
    model = architecture.build_model(args)
    checkpoint.load_weights(model, saved["model"], path, saved["args"])
    ema = deepcopy(model)
    checkpoint.load_weights(ema, saved["ema"], path, saved["args"])

    args.flip, args.frame_interval = False, None
    autoencoder = autoencoders.load(args.vae, precision.fp32(device))
    vae = autoencoder if isinstance(autoencoder, autoencoders.VAE) else None
    dataset = latent_cache.LatentCache(args.latents, args) if args.latents else open_data(args, flip=False)
    keys = next(iter(loader.Stream(len(dataset), args.batch_size, 0, 1, args.global_seed)))
    items, labels, _ = next(iter(loader.read(dataset, [keys], 0, False)))
    items = items.to(device)
    seeds.seed_step(args.global_seed, 0, 0)
    x1 = autoencoders.draw(items) if args.latents else autoencoder.encode(autoencoders.to_pixels(items))
    c = {name: saved["args"].get(name, default) for name, default in C_DEFAULTS.items()}
    transport = Transport(args.path_type, args.prediction, sample_eps=args.sample_eps, **c)
    ema = ema.to(device).eval()
    subject = Subject(
        model=model.to(device).eval(),
        ema=ema,
        vae=vae,
        transport=transport,
        x1=x1,
        point=transport.sample(x1),
        labels=labels.to(device),
        noise=EqMPipeline(ema, precision.fp32(device)).noise(range(len(x1)), args.global_seed),
        pixels=vae and vae.decode(x1),
        stepsize=args.stepsize,
        points=args.num_sampling_steps,
        mu=args.mu,
        cfg_channels=args.cfg_channels,
    )
    return subject, f"step {saved['step']}" if "step" in saved else "weights alone"


def main():
    args = parse_args()
    device = distributed.setup(args.device).device
    zeros = {}
    for path in args.ckpt:
        subject, when = open_subject(args, path, device)
        zeros[when] = zeros_of(subject, device)
    text = markdown(errors_of(subject, device), zeros)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written: {reason(error)}") from None
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    cli.run(main)
