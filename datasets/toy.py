"""EqM in two dimensions: learns a small set of points, draws what was learned, and shows how c(t) and lambda matter.

    python datasets/toy.py                                  # two moons; results/toy.png and a table, under a minute
    python datasets/toy.py --data spiral --ebm dot          # with an explicit energy, drawn beside its field

The network is a small MLP; transport and samplers are those of the images and clips. Every row of the picture and of
the table is one c(t). The distances are to the nearest point of the other set: "to data" is large where samples stop
short or stray, "from data" where they leave a part of the data out. Read both: samples that all end in one place of
the data are close to it. In two dimensions data need not be where EqM's field vanishes, so that following it longer
gathers samples in fewer places; with more dimensions (images) noise hardly ever lies between data points.
"""

import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from EqM import cli
from EqM.run.errors import UserError
from EqM.samplers import SAMPLERS, Descent
from EqM.transport import Transport

SCHEDULES = {  # rows: the arguments of Transport
    "constant": {"c_schedule": "constant"},
    "linear": {"c_schedule": "linear"},
    "truncated, the default": {},
    "truncated, a 0.95": {"c_start": 0.95},
    "truncated, lambda 1": {"c_scale": 1.0},
    "truncated, lambda 16": {"c_scale": 16.0},
    "piecewise, peak 2": {"c_schedule": "piecewise", "c_peak": 2.0},
}
LAMBDA = 4.0  # of the default, which the step size is made for
WIDTH, BATCH, LEARNING_RATE = 96, 256, 3e-3
SAMPLES, TRACKS = 1000, 40  # samples to measure and to draw, and those whose way is drawn
SPREAD = 0.03  # standard deviation of the data about its curve or centre
REACH = 2.6  # half the side of the pictures
POINTS, STEPSIZE = 250, 0.0034  # together long enough for the default c to bring noise to data
ADAM_STEPSIZE = 0.02


def draw_data(name: str, count: int, generator: torch.Generator) -> Tensor:
    """Points of a set, (count, 2), of about unit variance: "moons", "gaussians" or "spiral"."""
    u = torch.rand(count, generator=generator)
    if name == "moons":
        upper = torch.rand(count, generator=generator) < 0.5
        x, y = torch.cos(math.pi * u), torch.sin(math.pi * u)
        clean = torch.where(upper[:, None], torch.stack([x - 0.5, y - 0.25], 1), torch.stack([0.5 - x, 0.25 - y], 1))
        clean = clean * 1.3
    elif name == "gaussians":
        angle = (u * 8).floor() * math.pi / 4
        clean = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    else:
        angle = 3 * math.pi * u.sqrt()  # evenly along the curve, not in the angle
        clean = angle[:, None] / (3 * math.pi) * 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return clean + SPREAD * torch.randn(count, 2, generator=generator)


class Toy(nn.Module):
    """An MLP f of two numbers, without time. ebm as in EqM.models: the field is f, or dE/dx of an explicit energy."""

    def __init__(self, ebm: str = "none") -> None:
        super().__init__()
        self.ebm = ebm
        self.net = nn.Sequential(
            nn.Linear(2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2),
        )  # fmt: skip

    def potential(self, x: Tensor) -> Tensor:
        """E, whose gradient the field climbs, (N,)."""
        out = self.net(x)
        return -out.square().sum(1) / 2 if self.ebm == "l2" else (x * out).sum(1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The field at x (N, 2); t is ignored."""
        if self.ebm == "none":
            return self.net(x)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.potential(x).sum(), x, create_graph=differentiable)[0]


def train(model: Toy, transport: Transport, data: Tensor, steps: int) -> None:
    """Fit the model's field to the transport's target, on random batches of data (M, 2)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        point = transport.sample(data[torch.randint(len(data), (BATCH,))])
        loss = transport.loss(model(point.xt, point.t), point).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def distances(samples: Tensor, data: Tensor) -> tuple[float, float]:
    """Mean distance from a sample to the nearest data point, and from a data point to the nearest sample."""
    apart = torch.cdist(samples, data)
    return apart.min(1).values.mean().item(), apart.min(0).values.mean().item()


@torch.no_grad()
def follow(model: Toy, noise: Tensor, sampler: str, stepsize: float, seed: int) -> tuple[Tensor, Tensor]:
    """Where noise (N, 2) ends, and the way of the first TRACKS of it, (steps, TRACKS, 2)."""
    seen = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x[:TRACKS])
        return model(x, t)

    def kick(row: int, step: int) -> Tensor:
        return torch.randn(2, generator=torch.Generator().manual_seed(seed + row * POINTS + step))

    heat = {"temperature": 0.01, "noise": kick} if sampler == "langevin" else {}
    end = Descent(POINTS, stepsize, sampler, **heat).run(field, noise).x
    whole = [x for x in seen if len(x) == TRACKS]  # dopri5's samples leave one by one
    return end, torch.stack([*whole, end[:TRACKS]] if sampler != "dopri5" else whole)


@torch.no_grad()
def draw_row(axes, name: str, model: Toy, data: Tensor, end: Tensor, tracks: Tensor) -> None:
    """One c(t): field, energy or norm, trajectories, samples."""
    side = torch.linspace(-REACH, REACH, 121)
    grid = torch.cartesian_prod(side, side)  # x varies slowest
    field = model(grid, torch.zeros(len(grid)))
    norm = field.norm(dim=1)
    arrows = field / norm[:, None]
    sparse = (torch.arange(121) % 8 == 4).nonzero().squeeze(1)
    pick = (sparse[:, None] * 121 + sparse).flatten()
    shades = {"none": norm, "dot": -model.potential(grid), "l2": -model.potential(grid)}[model.ebm]
    extent = (-REACH, REACH, -REACH, REACH)

    axes[0].imshow(norm.view(121, 121).T.numpy(), origin="lower", extent=extent, cmap="Blues")
    axes[0].quiver(*grid[pick].T.numpy(), *arrows[pick].T.numpy(), scale=30, width=0.004)
    axes[1].contourf(side.numpy(), side.numpy(), shades.view(121, 121).T.numpy(), levels=24, cmap="viridis")
    axes[2].plot(*tracks.permute(2, 0, 1).numpy(), linewidth=0.6)
    axes[2].plot(*tracks[0].T.numpy(), ".", color="grey", markersize=3)
    axes[2].plot(*tracks[-1].T.numpy(), ".", color="black", markersize=4)
    axes[3].plot(*data[:SAMPLES].T.numpy(), ".", color="lightgrey", markersize=3)
    axes[3].plot(*end.T.numpy(), ".", color="crimson", markersize=1.5)
    axes[0].set_ylabel(name)
    for axis in axes:
        axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), xticks=[], yticks=[], aspect="equal")


def parse_args():
    parser = cli.Parser(__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("moons", "gaussians", "spiral"), default="moons", help="the set to learn")
    parser.add_argument("--ebm", choices=("none", "dot", "l2"), default="none", help="explicit energy")
    parser.add_argument("--sampler", choices=SAMPLERS, default="gd", help="how to follow the field")
    parser.add_argument("--steps", type=cli.positive_int, default=2000, help="training steps of each c(t)")
    parser.add_argument("--global-seed", type=cli.count, default=0, help="seed of everything random")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "toy.png", help="the picture to write")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(1)  # a network this small loses by sharing its work
    generator = torch.Generator().manual_seed(args.global_seed)
    data, noise = draw_data(args.data, 4000, generator), torch.randn(SAMPLES, 2, generator=generator)
    eta = ADAM_STEPSIZE if args.sampler == "adam" else STEPSIZE
    if args.out.suffix != ".png" or args.out.is_dir():
        raise UserError(f"--out {args.out} must name a .png file")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written to: {error}") from None

    figure = Figure(figsize=(12, 3 * len(SCHEDULES)), layout="constrained")
    axes = figure.subplots(len(SCHEDULES), 4)
    titles = ("field", "norm" if args.ebm == "none" else "energy", "trajectories", "samples on data")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    print(f"{args.data}, {args.sampler}, {POINTS} points; mean distances with eta {eta:g}, then {eta:g} x 4/lambda")
    print(f"{'c(t)':24}" + f"{'to data':>10}{'from data':>12}" * 2)
    for row, (name, schedule) in zip(axes, SCHEDULES.items(), strict=True):
        torch.manual_seed(args.global_seed)
        model, transport = Toy(args.ebm), Transport(**schedule)
        train(model, transport, data, args.steps)
        end, tracks = follow(model, noise, args.sampler, eta, args.global_seed)
        ratio = LAMBDA / schedule.get("c_scale", LAMBDA)
        adapted, _ = follow(model, noise, args.sampler, eta * ratio, args.global_seed)
        figures = (*distances(end, data), *distances(adapted, data))
        print(f"{name:24}{figures[0]:10.3f}{figures[1]:12.3f}{figures[2]:12.3f}{figures[3]:12.3f}", flush=True)
        draw_row(row, name, model, data, end, tracks)
    figure.savefig(args.out, dpi=70)
    print(f"The picture: {args.out}")


if __name__ == "__main__":
    cli.run(main)
