"""Averages of a model's weights that follow it, and averages of other lengths after the run.

    python -m EqM.engine.ema results/000-EqM-S-4-Linear-velocity-None --std 0.08 --out ema-std-0.08.pt

makes what `--ema-std 0.08` would have been out of the snapshots that a run with `--ema-std 0.05 0.1` kept.

Power-function averages are those of EDM2 (Karras et al. 2024, arXiv 2312.02696, section 3.1): weights of step tau count
tau^gamma, so that the average's length grows with training, and its standard deviation over tau is sigma_rel of it.
"""

import argparse
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from EqM.run import checkpoint
from EqM.run.checkpoint import average_name
from EqM.run.errors import UserError
from EqM.run.shards import local

NARROWEST, WIDEST = 0.001, 12**-0.5  # sigma_rel; that of an even average, whose gamma is 0, is the widest
FOLDER = "averages"  # of snapshots, beside checkpoints/


class EMA:
    """Frozen copies of a model that follow it: ema <- decay ema + (1 - decay) weights, at every step that is taken.

    decays: one or several. warmup: take min(decay, (1 + n) / (10 + n)) after n steps, so that a young average forgets
    where it started. stds: sigma_rel of power-function averages besides.
    model: the copy of the first decay. models: all, by name.
    """

    def __init__(self, model, decays=0.9999, warmup=False, stds=()):
        decays = decays if isinstance(decays, (list, tuple)) else [decays]
        self.warmup = warmup
        self._rates = [*((decay, None) for decay in decays), *((None, gamma_of(std)) for std in stds)]
        names = [*map(average_name, decays), *(average_name(std=std) for std in stds)]
        self.models = {name: deepcopy(model).eval().requires_grad_(False) for name in names}
        self.model = self.models[names[0]]
        self.counts = warmup or bool(stds)
        self.updates = torch.zeros((), device=next(model.parameters()).device)
        self.follow(model)

    def follow(self, model):
        """Take up the parameters of all networks, which are other objects once the networks have been sharded.

        Of those each rank moves its own part.
        """
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self._theirs, *self._ours = (
            [local(p) for name, p in network.named_parameters() if name in trained]
            for network in (model, *self.models.values())
        )
        self.updates = self.updates.to(self._theirs[0].device)

    @torch.no_grad()
    def update(self, applied):
        """Move towards the model. applied: 0-dim tensor, 1.0 if the optimizer took its step and 0.0 if it
        skipped, in which case nothing changes. The host does not wait for the device.
        """
        lerp = _fused_lerp if self.updates.is_cuda else _lerp
        for ours, (decay, gamma) in zip(self._ours, self._rates, strict=True):
            lerp(ours, self._theirs, self._share(decay, gamma) * applied)
        if self.counts:
            self.updates += applied

    def _share(self, decay, gamma):
        """What the newest weights get, 1 - decay, without the cancellation of that difference where it is small."""
        if gamma is not None:
            return -torch.expm1((gamma + 1) * torch.log1p(-1 / (self.updates + 1)))
        if self.warmup:
            return torch.clamp(9 / (self.updates + 10), min=1 - decay)
        return 1 - decay

    def parts(self):
        """What a checkpoint keeps, by its key there: the first as `ema`, which published tools read."""
        first, *further = self.models
        return {"ema": self.model, **{name: self.models[name] for name in further}} | (
            {"averaging": self} if self.counts else {}
        )

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates.fill_(state["updates"])


def _lerp(ours, theirs, share):
    """ours += share (theirs - ours), lists of tensors. share: 0-dim, on their device, where it stays."""
    torch._foreach_lerp_(ours, theirs, [share] * len(ours))


def _fused_lerp(ours, theirs, share):
    """As _lerp, which on CUDA is a kernel a tensor, in a kernel for all: ours is read and written once, theirs read.

    It is a step of size `share` down (ours - theirs)^2 / 2: SGD with gradient -theirs and weight decay 1.
    """
    torch._fused_sgd_(
        ours, theirs, [], weight_decay=1.0, momentum=0.0, lr=share, dampening=0.0, nesterov=False, maximize=True,
        is_first_step=False,
    )  # fmt: skip


def held_of_start(saved, weights):
    """How much of the weights it began with an average of a checkpoint still holds, 0 to 1, or None if that is unknown.

    saved: as checkpoint.load. weights: as checkpoint.weights_named. With warm-up it is at most a tenth from the first
    step on, and a power-function average forgets its start at the first step. What export.py wrote says it itself.
    """
    args, taken = saved["args"], checkpoint.steps_taken(saved)
    if weights == "model" or saved.get("stand_in") == "ema":
        return None
    if "held_of_start" in saved:
        return saved["held_of_start"]
    decays = checkpoint.decays_of(args)
    named = {average_name(decay): decay for decay in decays} | ({"ema": decays[0]} if decays else {})
    if weights not in named or taken is None or args.get("ema_warmup"):
        return None
    return named[weights] ** taken


def gamma_of(std):
    """Exponent gamma of the power function whose relative standard deviation is std, in (0, 12^-0.5]. Algorithm 2.

    The largest root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which is a cubic in gamma.
    """
    square = std**-2
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


def inner_product(t_a, gamma_a, t_b, gamma_b):
    """Integral over tau of the product of two averages' weights; arrays of times t and exponents, broadcast.

    An average at t weighs tau by (gamma + 1) tau^gamma / t^(gamma + 1), up to t. Powers of times are taken as one of
    their ratio, which cannot overflow.
    """
    early, late = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma_of_late = np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (early / late) ** gamma_of_late / late


def coefficients(times, gammas, time, gamma):
    """Of snapshots at `times` with exponents `gammas`, the sum nearest in least squares to an average (time, gamma).

    FP64, shape (snapshots,). Algorithm 3.
    """
    times, gammas = np.asarray(times, np.float64), np.asarray(gammas, np.float64)
    products = inner_product(times[:, None], gammas[:, None], times, gammas)
    return np.linalg.lstsq(products, inner_product(times, gammas, np.float64(time), np.float64(gamma)), rcond=1e-13)[0]


def keep_snapshot(path, state):
    """Write what a reconstruction needs of a checkpoint's content, if it has it, where --keep-checkpoints leaves it.

    path: of that checkpoint. The snapshot is a checkpoint itself, whose `ema` is the first of its averages.
    """
    averages = {name: value for name, value in state.items() if name.startswith(average_name(std=""))}
    if not averages:
        return
    folder = Path(path).parents[1] / FOLDER
    folder.mkdir(exist_ok=True)
    args = {**state["args"], "ema_decay": None}
    more = {key: state[key] for key in ("averaging", "class_names")}
    checkpoint.save(folder / Path(path).name, {"ema": next(iter(averages.values())), **averages, "args": args, **more})


def find_snapshots(runs, step=None):
    """Paths of the snapshots of run folders by step, none after `step`; the last run's where several have one."""
    found = {}
    for run in map(Path, runs):
        found |= {int(path.stem): path for path in (run / FOLDER).glob("*.pt") if path.stem.isdecimal()}
    found = {at: found[at] for at in sorted(found) if step is None or at <= step}
    if not found:
        up_to = "" if step is None else f" up to step {step}"
        raise UserError(f"{', '.join(map(str, runs))}: no snapshot of averages{up_to}; train with --ema-std")
    return list(found.values())


def reconstruct(runs, std, step=None):
    """(checkpoint, error): the average of sigma_rel std at a run's last snapshot, or the last up to `step`.

    runs: its folder; if it went on in another one all of them, in order. error: the distance of the weights' profile
    from the one that was asked for, as a share of that one's norm. Raises UserError if there are no snapshots.
    """
    snapshots = [checkpoint.load(path, "snapshot") for path in find_snapshots(runs, step)]
    head = average_name(std="")
    parts = [  # (time, gamma, weights)
        (float(saved["averaging"]["updates"]), gamma_of(float(name.removeprefix(head))), saved[name])
        for saved in snapshots
        for name in saved
        if name.startswith(head) and saved["averaging"]["updates"] > 0
    ]
    times, gammas = (np.array([part[i] for part in parts]) for i in (0, 1))
    time, gamma = times.max(), gamma_of(std)
    factors = coefficients(times, gammas, time, gamma)
    error = _distance(factors, times, gammas, time, gamma)
    state = {}
    for name, newest in parts[-1][2].items():
        total = sum(factor * weights[name].double() for factor, (_, _, weights) in zip(factors, parts, strict=True))
        state[name] = newest if name == "pos_embed" else total.float()  # which is frozen
    last = snapshots[-1]
    return {"ema": state, "args": last["args"], "class_names": last.get("class_names")}, error


def _distance(factors, times, gammas, time, gamma):
    made = factors @ inner_product(times[:, None], gammas[:, None], times, gammas) @ factors
    wanted = inner_product(time, gamma, time, gamma)
    both = factors @ inner_product(times, gammas, time, gamma)
    return math.sqrt(max(0.0, (made - 2 * both + wanted) / wanted))


def std_type(text):
    """An argparse type: a relative standard deviation."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not NARROWEST <= value <= WIDEST:
        raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {NARROWEST} to {WIDEST:.3f}")
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m EqM.engine.ema", description=reconstruct.__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folder; of a run that went on in others all, in order")
    parser.add_argument("--std", type=std_type, required=True, help="length of the average, sigma_rel")
    parser.add_argument("--step", type=int, help="at the last snapshot up to this step; left out: the last of all")
    parser.add_argument("--out", required=True, help="checkpoint to write, of this average alone")
    args = parser.parse_args(argv)
    try:
        made, error = reconstruct(args.runs, args.std, args.step)
        checkpoint.save(args.out, made)
    except UserError as fault:
        parser.exit(2, f"{parser.prog}: error: {fault}\n")
    print(f"Wrote {args.out}: sigma_rel {args.std:g}, its profile {error:.2%} from the true one")


if __name__ == "__main__":
    main()
