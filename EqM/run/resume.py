"""Going on: which checkpoint, whether it is of the same run, and what is no longer exact.

Works on plain dicts, paths and callables. `saved` is the content of a checkpoint (checkpoint.load), `args` the dict of
this run's settled arguments, `data` what `data_digest` says of this run's data, or None.
"""

import hashlib
import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from EqM.run import checkpoint, hub
from EqM.run.errors import UserError
from EqM.run.hub import is_hub_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What makes another model or learns from other data: --auto-resume goes on with no run in which one of these differs.
IDENTITY = (
    "model", "image_size", "num_classes", "vae", "uncond", "ebm", "video", "clip_len", "patch_frames", "path_type",
    "prediction", "loss_weight", "disp", "data_path", "latents", "global_seed", "init_from", "init_positions",
    "weights", "c_schedule", "c_start", "c_peak", "c_scale",
)  # fmt: skip
STARTS = ("init_from", "init_positions", "weights")  # of IDENTITY, what a run that goes on has behind it
# What changes the numbers of a run that goes on. With --num-workers they are the same.
NUMBERS = (
    "global_batch_size", "grad_accum_steps", "lr", "lr_schedule", "warmup_steps", "ema_decay", "ema_warmup",
    "ema_std", "max_grad_norm", "train_eps", "flip", "csv", "frame_interval", "vae_precision", "no_tf32", "compile",
    "optimizer", "betas", "weight_decay", "min_lr", "shard", "shard_size", "recompute",
    "no_fused_kernels",
)  # fmt: skip
# Of flags that checkpoints of before do not say, what was done then. Other flags that one side does not say agree.
BEFORE = {
    "c_schedule": "truncated", "c_start": 0.8, "c_peak": 1.0, "c_scale": 4.0,
    "optimizer": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.0, "min_lr": 0.0,
    "init_from": None, "init_positions": None, "weights": "ema", "ema_warmup": False, "ema_std": None,
    "shard": False, "shard_size": None, "recompute": "nothing", "no_fused_kernels": True,
}  # fmt: skip
ON_CUDA = ("no_tf32", "recompute", "no_fused_kernels")  # of NUMBERS, what changes none elsewhere
PLACES = ("data_path", "latents", "csv")  # of the data, which may move
OTHER_PLACES = ("vae", "init_from", "val_path", "val_csv", "val_latents", "eval_reference", "inception", "i3d", "ckpt")
# What these may say besides a place, even where one is called so.
NO_PLACES = {"vae": ("ema", "mse", "none"), "ckpt": ("latest",)}
STATS = 20_000  # how many files at most are asked for their size: a second on a local disk, some on a network's


def same_path(a, b):
    """Whether two texts name one place: `dir`, `dir/`, `./dir`, the absolute path, a link to it."""
    try:
        if str(a).startswith(hub.DATA) or str(b).startswith(hub.DATA):
            return from_anywhere(a) == from_anywhere(b)
        return a == b or os.path.realpath(a) == os.path.realpath(b)
    except (TypeError, ValueError):  # one of them names no place at all
        return False


def absolute(args):
    """args with places on this machine written so that they are found from another working directory too."""
    given = {name: args[name] for name in (*PLACES, *OTHER_PLACES) if args.get(name)}
    places = {name: place for name, place in given.items() if place not in NO_PLACES.get(name, ())}
    return {**args, **{name: from_anywhere(place) for name, place in places.items()}}


def from_anywhere(place):
    """A place with its absolute path; as it is where it names none on this machine, as the hub's data sets do."""
    if str(place).startswith(hub.DATA):
        name, split = hub.data_set(place)
        return hub.DATA + os.path.abspath(name) + (f":{split}" if split else "") if os.path.isdir(name) else place
    return os.path.abspath(place) if os.path.exists(place) else place


def same_vae(a, b):
    """Whether two values of --vae name one autoencoder, as far as names tell."""
    return a == b if {a, b} & {*NO_PLACES["vae"]} or is_hub_name(a) or is_hub_name(b) else same_path(a, b)


def data_digest(names, labels, paths=None):
    """{"items", "digest"} of a data set, in its order: names (texts or bytes, relative to its folder) and labels.

    A cache that describes itself is as well told by its description as the only name.
    paths: of the files, to take their sizes in too: of all up to 20,000, else of every k-th, so that 1.3 million files
    on a network do not take minutes. Another size between those goes unseen; another name or label never does.
    """
    digest = hashlib.blake2b(digest_size=16)
    names = [os.fsencode(name) for name in names]
    digest.update(np.asarray([len(name) for name in names], np.int64).tobytes())
    digest.update(b"".join(names))
    digest.update(np.asarray(labels, np.int64).tobytes())
    if paths is not None:
        every = math.ceil(len(paths) / STATS) or 1
        digest.update(np.asarray([_size(path) for path in paths[::every]], np.int64).tobytes())
    return {"items": len(labels), "digest": digest.hexdigest()}


def _size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # a file that cannot be read is told when its turn comes


def total_steps(args, items):
    """Steps of a whole run over so many items. args: a dict with epochs, global_batch_size and max_steps."""
    steps = math.ceil(args["epochs"] * items / args["global_batch_size"])
    return min(steps, args.get("max_steps") or steps)


def other_identity(saved, args, data=None):
    """What makes this another run than the checkpoint's, as "name old -> new"; empty if nothing does.

    What an older checkpoint does not say counts as the same. Data that was moved is the same data.
    """
    places = PLACES if _same_data(saved, data) else ()
    names = [name for name in IDENTITY if name not in places and _differs(name, saved["args"], args)]
    return [_arrow(name, saved["args"], args) for name in names]


def what_changed(saved, args, now, data=None):
    """What makes a resumed run differ from one that was never stopped, as "name old -> new"; empty if nothing does.

    now: what is not among the args and the checkpoint holds beside them: precision, world_size, and as far as it
    knows them torch (version) and device (type). Names that an older checkpoint lacks cannot be compared.
    """
    theirs = saved["args"]
    changed = [_arrow(name, saved, now) for name in ("precision", "world_size") if saved.get(name) != now[name]]
    changed += [_arrow(n, saved, now) for n in ("torch", "device") if n in saved and n in now and saved[n] != now[n]]
    changed += [f"{part} missing -> as at the start" for part in _parts(now) if part not in saved]
    if "stand_in" in saved:
        changed.append(f"{saved['stand_in']} missing -> a copy of the other weights")
    same_data = _same_data(saved, data)
    same = {*STARTS, *(PLACES if same_data else ()), *(() if now.get("device") == "cuda" else ON_CUDA)}
    if args.get("latents"):
        same.add("vae_precision")  # nothing is encoded
    names = [name for name in (*NUMBERS, *IDENTITY) if name not in same and _differs(name, theirs, args)]
    changed += [_arrow(name, theirs, args) for name in names]
    if "data" in saved and data is not None and not same_data:
        before, after = saved["data"]["items"], data["items"]
        changed.append(
            f"data {before} -> {after} items" if before != after else "data: names, sizes, labels or order of its items"
        )
    if args.get("disp") and theirs.get("disp") and "recompute" not in theirs:
        changed.append("disp: version 0.2 rounded its distances otherwise")
    changed += _other_end(saved, args, data)
    if "class_names" in saved and now.get("class_names", saved["class_names"]) != saved["class_names"]:
        changed.append("class_names: other classes, or in another order")
    return changed


def _parts(now):
    """What a checkpoint must hold besides weights for the next step and log line to be what they would have been."""
    return ("opt", "schedule", "meter", *(("scaler",) if now["precision"] == "fp16" else ()))


def _other_end(saved, args, data):
    """A cosine schedule falls to zero at the end of the run, so that another end is another learning rate."""
    theirs = saved["args"]
    counts = [theirs.get("epochs"), theirs.get("global_batch_size"), theirs.get("max_steps") or 1]
    told = all(isinstance(count, int) and count > 0 for count in counts)
    if data is None or not told or (args["lr_schedule"], theirs.get("lr_schedule")) != ("cosine", "cosine"):
        return []
    items = saved.get("data", data)["items"]
    before, after = total_steps(theirs, items), total_steps(args, data["items"])
    return [f"end of the cosine {before} -> {after}"] if before != after else []


def _same_data(saved, data):
    return data is not None and saved.get("data") == data


def _differs(name, theirs, ours):
    """Whether a setting means something else there and here; see BEFORE for what one of them does not say."""
    theirs, ours = _settled(theirs), _settled(ours)
    if name not in theirs or name not in ours:
        return False
    if name in STARTS and not ours.get("init_from"):  # nobody says how it began
        return False
    if name in ("clip_len", "patch_frames") and not ours.get("video"):
        return False
    before, after = theirs[name], ours[name]
    if name == "num_classes" and None in (before, after):  # left out: what the data holds
        return False
    if name == "patch_frames":  # left out: as the patch's side, which ends the model's name
        before, after = (str(args[name] or str(args["model"]).rpartition("/")[2]) for args in (theirs, ours))
    if name == "vae":
        return not same_vae(before, after)
    if name == "ema_decay":  # one may be given as a number
        return checkpoint.decays_of(theirs) != checkpoint.decays_of(ours)
    if name in PLACES or name == "init_from":
        return not same_path(before, after)
    return before != after


def _arrow(name, before, after):
    return f"{name} {_settled(before).get(name, 'unknown')} -> {_settled(after)[name]}"


def _settled(args):
    """args with what they do not say, or leave to the precision."""
    args = BEFORE | args
    if args["recompute"] is None:
        in_16_bits = args.get("use_bf16") or args.get("use_amp")
        args["recompute"] = "elementwise" if in_16_bits else "nothing"
    plain = args["recompute"] == "nothing" or args.get("compile") or args.get("grad_checkpointing")
    args["no_fused_kernels"] = bool(args["no_fused_kernels"] or plain)
    return args


def going_on(path, changed):
    """The line that says so. changed: of what_changed."""
    how = f"not exactly as without a stop: {', '.join(changed)}" if changed else "exactly"
    return f"Going on from {path}, {how}"


def check_classes(saved, class_names, allowed=False):
    """Raise UserError if the checkpoint learned other classes, or in another order, unless that is allowed.

    class_names: of this run's data, in the order of their labels. A checkpoint that does not know its own passes.
    """
    theirs = saved.get("class_names")
    if theirs is None or theirs == class_names or allowed:
        return
    if sorted(theirs) == sorted(class_names):
        told = "the same classes in another order"
    else:
        gone = [name for name in theirs if name not in set(class_names)]
        new = [name for name in class_names if name not in set(theirs)]
        told = " and ".join(f"{_few(names)} {words}" for names, words in ((gone, "gone"), (new, "new")) if names)
    raise UserError(
        f"the data has other classes than the checkpoint ({told}), so that a label would mean another class; "
        f"name them as before, or give --allow-other-classes"
    )


def _few(names):
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_goal(step, total, path, in_place):
    """Raise UserError if a checkpoint leaves no step to take, before a run folder is made.

    in_place: the run's own folder goes on, where a run that is exactly finished is no fault: there is nothing to do.
    """
    if step > total or (step == total and not in_place):
        raise UserError(
            f"{path} is at step {step} already, and this run would end at {total}: ask for more --max-steps or --epochs"
        )


@dataclass(frozen=True)
class Choice:
    """path: of the checkpoint to go on from, as text, or None. message: a line for the log, or an empty one."""

    path: str | None
    message: str = ""


def choose(results_dir, args, data=None, required=False):
    """The newest good checkpoint of the newest run that is this one; for one rank, whose Choice all take.

    Of several that are, one whose other settings agree too comes first, so that runs with several learning rates may
    share a folder. Where no run matches, the Choice says what sets the newest one apart, or that it cannot be read, and
    with `required` that is a UserError. Where one does, it says which newer checkpoints cannot be read.
    """
    told, refused, best = "", [], None
    for path, saved in checkpoint.found(results_dir, refused):
        differs = other_identity(saved, args, data)
        if differs:
            told = told or f"{path.parent.parent.name} is another run: {', '.join(differs)}"
            continue
        choice = Choice(str(path), f"Passed over: {'; '.join(refused)}" if refused else "")
        if not any(_differs(name, saved["args"], args) for name in NUMBERS):
            return choice
        best = best or choice
    if best:
        return best
    told = told or "; ".join(refused)
    if required:
        raise UserError(
            f"--ckpt latest: {results_dir} holds no checkpoint of this configuration" + (f"; {told}" if told else "")
        )
    return Choice(None, f"Starting anew, since {told}" if told else "")


def load_on_all(path, load, all_agree):
    """What load(path) returns, on every rank, or an end on every rank: of one alone, the others would wait for ever.

    all_agree: from whether this rank succeeded, whether all did. Raises this rank's UserError, or SystemExit.
    """
    saved = error = None
    try:
        saved = load(path)
    except UserError as raised:
        error = raised
    if all_agree(error is None):
        return saved
    if error is not None:
        raise error
    raise SystemExit(2)  # the rank that cannot read it says why


_held = {}  # by real path, the open files that are this process's locks


def lock_run(folder, flag="--results-dir"):
    """Keep a run folder to this process until it ends in any way; UserError if another one has it. For the main rank.

    The lock is the record kind of POSIX, not flock: data workers, which outlive a killed trainer for seconds, do not
    inherit it, and it works on NFS. Without fcntl nothing is locked.
    """
    path = Path(os.path.realpath(folder)) / "run.lock"
    if path in _held or fcntl is None:
        return
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, for closing it would end the lock
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # both mean that it is held
        file.seek(0)
        holder = file.read(200).strip()
        file.close()
        raise UserError(
            f"{folder} is being written by another process{f' ({holder})' if holder else ''}; "
            f"wait until it ends, or give another {flag}"
        ) from None
    except OSError:  # a file system without locks
        file.close()
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    _held[path] = file
