"""Take a trained model away: a folder of weights, configuration and card, or a checkpoint of the EMA alone.

    python EqM/export.py --ckpt results/000-EqM-S-4-Linear-velocity-None --out exported --precision bf16
    python EqM/export.py --ckpt CHECKPOINT --strip --out small.pt

What it writes is named wherever a checkpoint is: `sample_gd.py --ckpt exported`, `EqMPipeline.from_pretrained`.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # run by its path: import the package beside this file, whatever else is installed
    sys.path = [str(HERE.parent), *(folder for folder in sys.path if Path(folder).resolve() != HERE)]
if __name__ == "__main__":
    from EqM.run import stops

    stops.end_at_once()  # until main handles them: what follows takes seconds to import

import csv
import json
import shutil
from argparse import Namespace

import torch

from EqM import architecture, cli
from EqM.data import media
from EqM.engine.ema import held_of_start
from EqM.engine.precision import DTYPES, Precision
from EqM.metrics.report import NAMES
from EqM.pipeline import EqMPipeline, young
from EqM.run import checkpoint, distributed
from EqM.run.errors import UserError, printable, reason
from EqM.run.exported import AUTOENCODER, CARD, CONFIG, FORMAT, WEIGHTS
from EqM.transport import C_DEFAULTS

FIGURES = ("Train Loss", "Val Loss", "EMA Val Loss", *NAMES.values())  # on the card


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    cli.add_sampler(parser)
    cli.add_runtime(parser)
    group = parser.add_argument_group("export")
    group.add_argument("--ckpt", required=True, help="checkpoint, or a run folder, whose newest is taken")
    group.add_argument("--out", required=True, help="folder to make; with --strip the file to write")
    group.add_argument("--weights", default="ema", help="ema, model, or one of several averages by name")
    group.add_argument(
        "--precision", choices=DTYPES, default="fp32",
        help="of the weights in the file: those that sampling in it casts to 16 bits; the rest stays FP32",
    )  # fmt: skip
    group.add_argument(
        "--sheet", type=cli.count, default=16, help="samples on the card, drawn as the sampler flags say"
    )
    group.add_argument("--push", metavar="USER/NAME", help="upload the folder to this repository of the hub")
    group.add_argument(
        "--strip", action="store_true", help="write a checkpoint of these weights alone, a quarter of it"
    )
    args = parser.parse_args()
    if args.strip and (args.push or args.precision != "fp32"):
        parser.error("--strip writes one FP32 checkpoint, without --precision or --push; drop them, or --strip")
    if args.strip:
        parser.refuse_idle(args, (*cli.DESCENT, "sheet", "global_seed"), "with --strip, whose file has no card")
    elif not args.sheet:
        parser.refuse_idle(args, ["global_seed"], "with --sheet 0, which draws nothing")
    return args


def main():
    args = parse_args()
    source = checkpoint.locate(args.ckpt)
    saved = checkpoint.load(source)
    weights = checkpoint.weights_named(saved, args.weights, source)
    if Path(args.out).exists():
        raise UserError(f"--out {args.out} exists already; choose another")
    told = {"weights": checkpoint.true_name(saved, args.weights), "held_of_start": held_of_start(saved, args.weights)}
    if line := young(saved, args.weights):
        print(line)
    if args.strip:
        strip(args.out, saved, weights, told)
        return
    flags = settled(saved)
    model = architecture.build_model(flags)
    checkpoint.load_weights(model, weights, source, saved["args"])
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True)
        write_weights(folder / WEIGHTS, model, args.precision)
        config = describe(args, saved, flags, folder, told)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        sheet = draw(args, folder) if args.sheet else None
        (folder / CARD).write_text(card(config, sheet, figures(source)), encoding="utf-8")
    except BaseException as error:  # half an export would look like a whole one
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"--out {args.out} cannot be written: {reason(error)}") from None
        raise
    print(f"Wrote {WEIGHTS}, {CONFIG} and {CARD} to {folder}")
    if args.push:
        print(f"Uploaded to {push(folder, args.push)}")


def strip(out, saved, weights, told):
    """Write a checkpoint that holds these weights alone, and what they are.

    told: the weights' true name, and how much of its start an average holds.
    """
    kept = {name: saved[name] for name in ("class_names", "step") if name in saved}
    trained_with = saved["args"]
    if told["weights"] in checkpoint.averages(saved):
        decays = {checkpoint.average_name(decay): decay for decay in checkpoint.decays_of(trained_with)}
        trained_with = {**trained_with, "ema_decay": decays.get(told["weights"])}
    checkpoint.save(out, {"ema": weights, **told, "args": trained_with, **kept})
    print(f"Wrote {out}, {Path(out).stat().st_size / 2**20:,.1f} MiB")


def settled(saved):
    """The flags of the checkpoint's model, those it does not say as published."""
    flags = Namespace(**dict.fromkeys(architecture.MODEL_DEFAULTS))
    architecture.follow_checkpoint(flags, saved["args"])
    return flags


def write_weights(path, model, precision):
    """The model's state as safetensors, in the precision that sampling would cast it to."""
    from safetensors.torch import save_file  # comes with diffusers

    Precision(precision, torch.device("cpu"), "export").cast_weights(model.requires_grad_(False))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def describe(args, saved, flags, folder, told):
    """The content of config.json. told: as `strip`. A local autoencoder is copied into the folder."""
    vae = flags.vae
    if Path(vae).is_dir():
        shutil.copytree(vae, folder / AUTOENCODER)
        vae = AUTOENCODER
    c = {name: saved["args"].get(name, default) for name, default in C_DEFAULTS.items()}
    return {
        "format": FORMAT,
        "args": {**vars(flags), "vae": vae, **c},
        "class_names": saved.get("class_names"),
        **told,
        "precision": args.precision,
        "step": saved.get("step"),
        "advice": {name: getattr(args, name) for name in cli.DESCENT},
    }


def draw(args, folder):
    """Write the card's contact sheet, by the export itself; returns its name."""
    device = distributed.device_named(args.device)
    pipe = EqMPipeline.from_pretrained(folder, precision=args.precision, device=device, tell=str)
    result = pipe(classes=["all"], num_samples=args.sheet, seed=args.global_seed, **pipe.advice)
    names = [printable(pipe.class_names[label]) for label in result.labels]
    media.contact_sheet(list(media.as_clips(result.samples)), names).save(folder / "samples.png")
    return "samples.png"


def figures(source):
    """{name: (value, step)} of the last figures of the checkpoint's run up to its step, empty where there are none."""
    path = Path(source)
    table = path.parent.parent / "metrics.csv"
    if not path.stem.isdecimal() or not table.is_file():
        return {}
    found = {}
    with open(table, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = row.get("step") or ""
            if step.isdecimal() and int(step) <= int(path.stem):
                found |= {name: (row[name], int(step)) for name in FIGURES if row.get(name)}
    return found


def card(config, sheet, numbers):
    """The text of README.md."""
    args, names, advice = config["args"], config["class_names"] or [], config["advice"]
    shape = f"{args['clip_len']} frames of " if args["video"] else ""
    title = f"{args['model']}, {shape}{args['image_size']} x {args['image_size']}"
    classes = ", ".join(map(printable, names[:20])) + (", ..." if len(names) > 20 else "")
    lines = [
        "---", "tags: [equilibrium-matching, eqm]", "---", f"# {title}", "",
        "An Equilibrium Matching model (arXiv 2510.02300): samples descend its learned field.", "",
    ]  # fmt: skip
    lines += [f"![Samples, one of each class in turn]({sheet})", ""] if sheet else []
    lines += [
        "```python",
        "from EqM import EqMPipeline",
        f'pipe = EqMPipeline.from_pretrained("this folder", precision="{config["precision"]}")',
        'samples = pipe(classes=["all"], num_samples=16, **pipe.advice).samples',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| classes | {len(names) or args['num_classes']}{': ' + classes if classes else ''} |",
        f"| weights | {config['weights']}"
        + (f" at step {config['step']:,}" if config["step"] else "")
        + f", {config['precision']} |",
        f"| autoencoder | {args['vae']} |",
        *(f"| {name.replace('_', ' ')} | {advice[name]} |" for name in cli.settings_read(advice)),
        *(f"| {name} | {value} (step {step:,}) |" for name, (value, step) in numbers.items()),
    ]
    return "\n".join(lines) + "\n"


def push(folder, name):
    """Upload an export to a repository of the hub, which is made if it is not there; returns its address."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("--push needs the huggingface_hub package: pip install huggingface_hub") from None
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=str(folder)))
    except Exception as error:  # the client raises whatever its transport does
        raise UserError(
            f"--push {name} failed: {reason(error)}; {folder} is whole, and `hf auth login` logs in"
        ) from None


if __name__ == "__main__":
    cli.run(main)
