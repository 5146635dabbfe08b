"""The arguments the scripts share, each declared once, and how bad ones are told."""

import argparse
import math
import os
import signal
import sys

from tqdm import tqdm

from EqM import transport
from EqM.architecture import MODEL_DEFAULTS
from EqM.models import EBM_KINDS, EqM_models
from EqM.run import distributed, stops
from EqM.run.errors import UserError, flag_of, is_mendable, is_out_of_memory, print_anything, reason
from EqM.samplers import SAMPLERS, STEPSIZES, Descent
from EqM.transport import C_DEFAULTS, C_SCHEDULES, PATHS, PREDICTIONS

LEFT_OUT = " (left out: as in the checkpoint)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, printed once however many ranks there are.

    parsed: what the process's command was given, for messages from where nobody has it at hand. checks: called with
    this parser and the arguments that it parsed, which they may settle, or call an error.
    """

    parsed = None

    def __init__(self, description):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        self.checks = []

    def parse_args(self, *given):
        Parser.parsed = super().parse_args(*given)
        for check in self.checks:
            check(self, Parser.parsed)
        return Parser.parsed

    def refuse_idle(self, args, names, where):
        """End with one line if any of these args is not at its default. where: it means nothing, in words."""
        defaults = {name: self.get_default(name) for name in names}
        if "stepsize" in defaults:
            defaults["stepsize"] = STEPSIZES[args.sampler]  # which has been filled in
        idle = flags_given(args, defaults)
        if idle:
            self.error(f"{idle}: no effect {where}; drop it, or give what it is for")

    def error(self, message):
        complain(f"{self.prog}: error: {message}", every_rank=False)
        sys.exit(2)


def complain(line, every_rank=True):
    if every_rank or os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)  # which puts it on a line of its own, where a bar stands


def run(main):
    """Run a command's main and exit with its status.

    One line on stderr each, once for all ranks that say the same: what a user can mend, a UserError, a full disk or
    memory that ran out, exits with 2; a rank that stops because another one did with 1; a signal that nobody but this
    function heard with 128 + its number. Everything else is a bug and keeps its traceback.
    """
    Parser.parsed = None
    print_anything()
    undo = stops.handle(stops.interrupt)
    try:
        status = _status_of(main)
    except (stops.Interrupted, KeyboardInterrupt) as stop:  # from _status_of too: launchers stop what is failing
        number = getattr(stop, "number", signal.SIGINT)
        name = signal.Signals(number).name
        complain(f"{_told(f'interrupted by {name}')}: run the same command again to go on")
        status = 128 + number
    finally:
        undo()
    if status:
        sys.exit(status)  # here, where no exception holds on to main's frames: what they opened is closed first


def _told(what):
    """The head of a line about this process: its command, and its rank unless that is the main one."""
    rank = os.environ.get("RANK", "0")
    return f"{os.path.basename(sys.argv[0])}: {what}" + (f" (rank {rank})" if rank != "0" else "")


def _status_of(main):
    try:
        main()
        return 0
    except Exception as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and is_mendable(error)):
            line, status = str(error), 2
        elif is_out_of_memory(error):
            line, status = f"out of memory ({reason(error)}); {less_memory(Parser.parsed)}", 2
        elif distributed.is_peers(error):
            line, status = "this rank stops because another one did; its own message says why", 1
        elif cause := distributed.cause(error):
            line, status = f"the ranks cannot talk to each other: {cause}", 2
        else:
            raise
    if distributed.is_first_to_say(line):
        complain(f"{_told('error')}: {line}")
    return status


def flags_given(args, defaults):
    """The flags of args that are not at these defaults, {name: default}, in words; nothing if all are."""
    return " and ".join(flag_of(name) for name, default in defaults.items() if getattr(args, name) != default)


def less_memory(args):
    """What needs less memory than these args, which may be None, in words."""
    given = vars(args) if args else {}
    ways = [
        f"a smaller {flag_of(name)} than {given[name]}"
        for name in ("global_batch_size", "batch_size")
        if given.get(name, 1) > 1
    ]
    if given.get("grad_accum_steps", math.inf) < given.get("global_batch_size", 1):
        ways.append(f"more --grad-accum-steps than {given['grad_accum_steps']}")
    if given.get("grad_checkpointing") is False and given.get("ebm") == "none":
        in_16_bits = given.get("use_bf16") or given.get("use_amp")
        if "recompute" in given and given["recompute"] in (("nothing",) if in_16_bits else ("nothing", None)):
            ways.append("--recompute elementwise")
        ways.append("--grad-checkpointing")
    if given.get("shard") is False and given.get("ebm") == "none" and os.environ.get("WORLD_SIZE", "1") != "1":
        ways.append("--shard")
    if given.get("use_bf16") is False and not given.get("use_amp"):
        ways.append("--use-bf16")
    return f"what needs less: {', '.join(ways) or 'a smaller batch or model'}"


def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: a finite int or float within [low, high], or (low, high] if open_low."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'}"
            ) from None
        if not (low <= value <= high) or (open_low and value == low) or math.isinf(value):
            above = "above" if open_low else "at least"
            bound = f" and at most {high:g}" if high != math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {above} {low:g}{bound}")
        return value

    return parse


positive_int = number(int, 1)
count = number(int, 0)
positive = number(float, 0, open_low=True)
non_negative = number(float, 0)
fraction = number(float, 0, 1)
below_one = number(float, 0, math.nextafter(1, 0))


def add_model(parser, from_checkpoint=False):
    """Network and what it is trained on. from_checkpoint: flags left out follow the checkpoint."""
    group = parser.add_argument_group("model" + (LEFT_OUT if from_checkpoint else ""))
    default = (lambda name: None) if from_checkpoint else MODEL_DEFAULTS.get
    switch = argparse.BooleanOptionalAction
    group.add_argument(
        "--model",
        choices=EqM_models,
        default=default("model"),
        metavar="EqM-{T,S,B,L,XL}/{2,4,8}",
        help="size and patch",
    )
    group.add_argument("--num-classes", type=positive_int, help="number of classes; left out: what the data holds")
    group.add_argument("--uncond", action=switch, default=default("uncond"), help="zero the time conditioning")
    group.add_argument("--ebm", choices=EBM_KINDS, default=default("ebm"), help="explicit energy")
    group.add_argument(
        "--patch-frames",
        type=positive_int,
        default=default("patch_frames"),
        help="frames of a patch; left out: the patch's side",
    )


def add_encoding(parser, from_checkpoint=False):
    """What one item is: size, length, autoencoder."""
    group = parser.add_argument_group("images or clips" + (LEFT_OUT if from_checkpoint else ""))
    default = (lambda name: None) if from_checkpoint else MODEL_DEFAULTS.get
    switch = argparse.BooleanOptionalAction
    group.add_argument("--image-size", type=positive_int, default=default("image_size"), help="side in pixels")
    group.add_argument(
        "--vae", default=default("vae"), help="ema or mse (Stable Diffusion's), none, a folder, or user/name on the hub"
    )
    group.add_argument("--video", action=switch, default=default("video"), help="clips instead of images")
    group.add_argument("--clip-len", type=positive_int, default=default("clip_len"), help="frames of a clip")


def add_checkpoints_model(parser):
    """What a checkpoint says of its model by itself: network, encoding and transport."""
    for add in (add_model, add_encoding, add_transport):
        add(parser, from_checkpoint=True)


def add_data(parser, required):
    """Where the files are and how they are read."""
    group = parser.add_argument_group("data")
    switch = argparse.BooleanOptionalAction
    group.add_argument("--data-path", required=required, help="folder <class>/<file>, of clips, of parquet; hf:NAME")
    group.add_argument("--csv", help="labels of a flat folder of clips: video_name,tag")
    group.add_argument("--image-column", help="of parquet, Arrow and hf: data, of images or clips; left out: found")
    group.add_argument("--label-column", help="of such data, of classes; left out: found")
    group.add_argument(
        "--frame-interval", type=positive_int, help="random windows of frames this far apart; left out: whole clip"
    )
    group.add_argument("--flip", action=switch, default=True, help="mirror half of the images or clips")
    group.add_argument("--num-workers", type=count, default=4, help="decoding processes per rank")
    group.add_argument("--max-bad-fraction", type=fraction, default=0.01, help="files that may fail to decode")


def add_transport(parser, from_checkpoint=False):
    """Path, prediction and loss weight."""
    group = parser.add_argument_group("transport")
    default = (lambda name: None) if from_checkpoint else MODEL_DEFAULTS.get
    group.add_argument("--path-type", choices=PATHS, default=default("path_type"), help="path from noise to data")
    group.add_argument(
        "--prediction", choices=PREDICTIONS, default=default("prediction"), help="what the model predicts"
    )
    group.add_argument(
        "--sample-eps",
        type=fraction,
        help="sampling stays this far from singular ends of t; left out: what the path needs",
    )


def add_c(parser):
    """The c(t) that a model is trained on, and that its step size depends on."""
    group = parser.add_argument_group("c(t), the magnitude of the target")
    c = C_DEFAULTS.get
    group.add_argument("--c-schedule", choices=C_SCHEDULES, default=c("c_schedule"), help="how c falls towards data")
    group.add_argument(
        "--c-start", type=float, default=c("c_start"), help="t from which truncated and piecewise fall to 0"
    )
    group.add_argument(
        "--c-peak", type=float, default=c("c_peak"), help="piecewise's value at pure noise, a multiple of the scale"
    )
    group.add_argument(
        "--c-scale", type=float, default=c("c_scale"),
        help="lambda, the gradient multiplier; twice as much wants half the step size when sampling",
    )  # fmt: skip


def check_c(parser, args):
    """End with one line if what add_c added makes no c(t), or says what has no effect."""
    settings = {name: getattr(args, name) for name in C_DEFAULTS}
    try:
        transport.check_c(*settings.values())
    except ValueError as error:
        parser.error(str(error))
    other = [name for name, value in settings.items() if value != C_DEFAULTS[name]]
    if other and args.prediction != "velocity":
        first = flag_of(other[0])
        parser.error(f"c(t) is part of the velocity's target; drop {first} or --prediction {args.prediction}")
    unused = [name for name in ("c_start", "c_peak") if name in other and name not in C_SCHEDULES[args.c_schedule]]
    if unused:
        first = flag_of(unused[0])
        parser.error(f"{first} has no effect on --c-schedule {args.c_schedule}; drop it, or choose another")


def add_runtime(parser):
    """Device, seed and workers."""
    group = parser.add_argument_group("runtime")
    group.add_argument("--device", help="cuda, cuda:1, cpu, ...; left out: the GPU where there is one")
    group.add_argument("--global-seed", type=count, default=0, help="seed of everything random")


DESCENT = (  # what add_sampler adds, as EqMPipeline.descend takes it
    "sampler", "num_sampling_steps", "stepsize", "mu", "beta1", "beta2", "temperature", "anneal", "atol", "rtol",
    "stop_norm", "cfg_scale", "cfg_channels",
)  # fmt: skip
READ_BY = {  # the samplers that read a setting, where not all of them do
    "mu": ("ngd", "nag"), "beta1": ("adam",), "beta2": ("adam",), "temperature": ("langevin",), "anneal": ("langevin",),
    "atol": ("dopri5",), "rtol": ("dopri5",),
}  # fmt: skip
ADDED = {  # those that came later, and what samples were made with before
    "beta1": 0.9, "beta2": 0.999, "temperature": 0.0, "anneal": True, "atol": 1e-5, "rtol": 1e-5, "stop_norm": 0.0,
}  # fmt: skip
NO_SDE = (
    "is not offered: it reads the field as a velocity or score, and EqM's, scaled by c(t), is neither; "
    "for noise take --sampler langevin --temperature T"
)
NO_LIKELIHOOD = (
    "is not offered: it integrates the field's divergence as if the field were a velocity, and EqM's, scaled by c(t), "
    "is not; score.py ranks files by energy or by the norm of the field"
)


def sampler_named(text):
    """An argparse type: one of SAMPLERS."""
    if text.lower() == "sde":
        raise argparse.ArgumentTypeError(f"sde {NO_SDE}")
    if text not in SAMPLERS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SAMPLERS)}")
    return text


class Refused(argparse.Action):
    """A flag of the published code that would be wrong here: const says why."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} {self.const}")


def add_sampler(parser):
    """How to descend."""
    group = parser.add_argument_group("sampler")
    switch = argparse.BooleanOptionalAction
    group.add_argument(
        "--sampler",
        type=sampler_named,
        default="gd",
        metavar="{" + ",".join(SAMPLERS) + "}",
        help="gd and ngd as published; see updates.py",
    )
    group.add_argument(
        "--stepsize",
        type=positive,
        help=f"eta, the step along the field; left out: {STEPSIZES['gd']}, adam {STEPSIZES['adam']}",
    )
    group.add_argument(
        "--num-sampling-steps", type=positive_int, default=250, help="sampling points; one more than updates"
    )
    group.add_argument("--mu", type=fraction, default=0.3, help="momentum of ngd and nag")
    group.add_argument("--beta1", type=fraction, help="adam's decay of the mean")
    group.add_argument("--beta2", type=fraction, help="adam's decay of the square")
    group.add_argument("--temperature", type=non_negative, help="langevin's; 0 adds no noise")
    group.add_argument("--anneal", action=switch, help="let the temperature fall to 0 at the last step")
    group.add_argument("--atol", type=positive, help="dopri5's absolute tolerance")
    group.add_argument("--rtol", type=non_negative, help="dopri5's relative tolerance")
    group.add_argument(
        "--stop-norm",
        type=non_negative,
        help="a sample is done when its field's norm is at most this; 0: never before the end",
    )
    group.set_defaults(**ADDED)
    group.add_argument("--cfg-scale", type=non_negative, default=4.0, help="guidance; 1 is none")
    group.add_argument(
        "--cfg-channels", type=positive_int, default=3, help="how many leading channels are guided, 3 as published"
    )
    group.add_argument(
        "--likelihood", action=Refused, nargs=0, const=NO_LIKELIHOOD, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.checks.append(_check_sampler)


def _check_sampler(parser, args):
    """Fill in the sampler's own step size. An error if its settings contradict each other."""
    args.stepsize = args.stepsize or STEPSIZES[args.sampler]
    settings = {name: getattr(args, name) for name in ("mu", "temperature", "anneal", "atol", "rtol", "stop_norm")}
    if args.num_sampling_steps == 1 and getattr(args, "start", None) is None:
        parser.error("argument --num-sampling-steps: 1 is out of range: without --start it must be at least 2")
    try:
        Descent(
            args.num_sampling_steps,
            args.stepsize,
            args.sampler,
            betas=(args.beta1, args.beta2),
            noise=lambda row, step: None,
            **settings,
        )
    except ValueError as error:
        given = [name for name, default in ADDED.items() if getattr(args, name) != default]
        parser.error(f"{' '.join(map(str, words_of(args, ['sampler', *given])))}: {error}")


def settings_read(how):
    """Names of DESCENT that mean something beside the others. how: the value of each."""
    idle = {name for name, samplers in READ_BY.items() if how["sampler"] not in samplers}
    if not how["stop_norm"]:
        idle.add("stop_norm")
    if how["cfg_scale"] <= 1:
        idle.add("cfg_channels")
    return [name for name in DESCENT if name not in idle]


def words_of(args, names=DESCENT):
    """The command line that says what these flags say in args; left out, all that add_sampler adds."""
    words = []
    for name in names:
        value = getattr(args, name)
        words += [flag_of(name if value else f"no_{name}")] if isinstance(value, bool) else [flag_of(name), value]
    return words
