"""What a run tells: log.txt, metrics.csv, loss.png, and trackers when asked for. Only the main rank writes."""

import csv
import os
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from EqM.run import distributed
from EqM.run.errors import UserError, printable, reason

try:
    import resource
except ImportError:  # Windows
    resource = None

PANELS = {  # of loss.png, and the figures each draws as far as there are any
    "loss": ("Train Loss", "Val Loss", "EMA Val Loss"),
    "gradient norm": ("Grad Norm",),
    "FID": ("FID",),
    "FVD": ("FVD",),
}
ALWAYS = ("loss", "gradient norm")


def new_run_folder(args, suffix=""):
    """Make `results/NNN-EqM-S-4-Linear-velocity-None/checkpoints` with the next free number; returns the run's Path.

    suffix: of the name, for what few runs have.
    Runs that start at the same moment get different numbers.
    """
    root = Path(args.results_dir)
    kind = (
        f"{args.model.replace('/', '-')}-{args.path_type}-{args.prediction}-{args.loss_weight}{suffix and '-' + suffix}"
    )
    number = -1
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            number = max([number, *_numbers(root)]) + 1
            folder = root / f"{number:03d}-{kind}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            if _numbers(root).count(number) == 1:
                (folder / "checkpoints").mkdir()
                return folder
            folder.rmdir()  # a run of another kind took this number, whose own look may have come too early to see us
    except OSError as error:
        raise UserError(f"--results-dir {root} cannot be written: {error.strerror}") from None


def _numbers(root):
    heads = (entry.name.split("-")[0] for entry in root.iterdir())
    return [int(head) for head in heads if head.isdecimal()]


def check_trackers(args):
    """Raise UserError unless the trackers that args ask for are installed and logged in; makes nothing.

    For the main rank, before there is a run folder.
    """
    if args.wandb:
        wandb = _import_wandb()
        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise _wandb_refuses(error) from None
    if args.tensorboard:
        _summary_writer()


class RunLog:
    """Lines to the terminal and log.txt, figures of each logged step to metrics.csv, loss.png and trackers.

    folder: the run's; None keeps silent (ranks other than the main one). args: the run's, for the trackers
    that args.wandb and args.tensorboard ask for.
    """

    def __init__(self, folder, args):
        self.folder = folder
        self.trackers = []
        self._columns = []
        self._one_line = threading.Lock()  # a checkpoint is told by the thread that wrote it
        if folder is not None:
            self._text = open(  # noqa: SIM115
                folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace", buffering=1
            )
            if args.wandb:
                self.trackers.append(_wandb(folder, args))
            if args.tensorboard:
                self.trackers.append(_tensorboard(folder))

    def info(self, message):
        if self.folder is None:
            return
        line = f"[{datetime.now():%Y-%m-%d %H:%M:%S}] {printable(message)}"
        with self._one_line:
            tqdm.write(line)
            self._text.write(line + "\n")

    def step(self, step, figures):
        """Log figures, a dict in order. Those of training begin with "Train Loss" and "Train Steps/Sec"."""
        if self.folder is None:
            return
        fields = ", ".join(f"{name}: {_format(name, value)}" for name, value in figures.items())
        self.info(f"(step={step:07d}) {fields}")
        self._row({"step": step, **figures})
        for track in self.trackers:
            track(figures, step)

    def draw(self):
        """Draw loss.png anew from metrics.csv: losses and gradient norm by step."""
        if self.folder is None or not self._metrics.exists():
            return
        from matplotlib.figure import Figure  # takes a second to import

        curves = {name: {} for names in PANELS.values() for name in names}
        with open(self._metrics, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if None in row.values():  # cut by a kill
                    continue
                for name, curve in curves.items():
                    with suppress(KeyError, ValueError):  # a row of other figures
                        curve[int(row["step"])] = float(row[name])  # a resumed run may say a step again
        panels = [panel for panel, names in PANELS.items() if panel in ALWAYS or any(curves[name] for name in names)]
        figure = Figure(figsize=(8, 3 * max(2, len(panels))), layout="constrained")
        for axes, panel in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True):
            drawn = [name for name in PANELS[panel] if curves[name]]
            for name in drawn:
                axes.plot(sorted(curves[name]), [curves[name][step] for step in sorted(curves[name])], linewidth=1)
            axes.set(ylabel=panel, yscale="log")
            axes.grid(alpha=0.3)
            if len(drawn) > 1:
                axes.legend(drawn)
        axes.set_xlabel("step")
        figure.savefig(self.folder / "loss.png", dpi=120)

    @property
    def _metrics(self):
        return self.folder / "metrics.csv"

    def _row(self, row):
        if not self._columns and self._metrics.exists():
            with open(self._metrics, newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file), [])
        if not self._columns or row.keys() - self._columns:
            self._widen(row)
        with open(self._metrics, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _widen(self, names):
        """Give metrics.csv columns of these names too; its rows stay, but for one that a kill cut."""
        rows = []
        if self._columns:
            with open(self._metrics, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(self._columns)][1:]
        new = [name for name in names if name not in self._columns]
        self._columns += new
        partial = self._metrics.with_suffix(".writing")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self._columns, *(row + [""] * len(new) for row in rows)])
        os.replace(partial, self._metrics)


def _format(name, value):
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if "/Sec" in name or "GiB" in name else f"{value:.4f}"


def _import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the wandb package: pip install wandb") from None
    return wandb


def _wandb_refuses(error):
    return UserError(
        f"--wandb cannot start: {reason(error)} `wandb login` once, or `wandb offline` to keep figures here"
    )


def _wandb(folder, args):
    """The run folder is one W&B run, however often it is stopped and resumed: its id lies there."""
    wandb = _import_wandb()
    kept = folder / "wandb-id.txt"
    run_id = kept.read_text(encoding="utf-8").strip() if kept.exists() else ""
    run_id = run_id or uuid.uuid4().hex[:12]
    try:
        wandb.init(project="EqM", name=folder.name, dir=str(folder), config=vars(args), id=run_id, resume="allow")
    except wandb.errors.Error as error:
        raise _wandb_refuses(error) from None
    kept.write_text(run_id + "\n", encoding="utf-8")
    return wandb.log


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter


def _tensorboard(folder):
    writer = _summary_writer()(folder)

    def track(figures, step):
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


def peak_memory(device):
    """Most memory in use so far, in GiB: of the GPU by PyTorch, on a CPU of the whole process; nan on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def progress(items=None, desc=None, *, total=None, initial=0, unit="it", shown=True, lines=True, leave=True):
    """How far along items are, while one takes them, or calls update(n): a bar on a terminal, else a line a minute.

    shown: nothing if False, as on all ranks but the main one. lines: no lines either where another log speaks, or for
    a bar inside another. The rest is tqdm's.
    """
    if shown and lines and not sys.stderr.isatty():
        return Lines(items, desc, total, initial, unit)
    shown = shown and sys.stderr.isatty()
    return tqdm(items, desc, total, leave, initial=initial, unit=unit, disable=not shown)


class Lines:
    """What of tqdm's interface is used here, for a file: a bar drawn over itself would fill it."""

    EVERY = 60.0  # seconds

    def __init__(self, items, desc, total, initial, unit):
        self.items = items
        self.desc = desc
        self.total = len(items) if total is None and hasattr(items, "__len__") else total
        self.first = self.done = initial
        self.unit = unit
        self.since = self.told = time.perf_counter()

    def __iter__(self):
        for item in self.items:
            yield item
            self.update()

    def update(self, n=1):
        self.done += n
        now = time.perf_counter()
        if now - self.told >= self.EVERY:
            self.told = now
            rate = (self.done - self.first) / (now - self.since)
            of = f" of {self.total}" if self.total else ""
            left = f", {tqdm.format_interval((self.total - self.done) / rate)} left" if self.total and rate else ""
            head = f"{self.desc}: " if self.desc else ""
            print(f"{head}{self.done}{of}, {rate:.3g} {self.unit}/s{left}", file=sys.stderr, flush=True)

    def close(self):
        """Nothing is left to draw."""


class Clock:
    """Steps per second since the last question."""

    def __init__(self):
        self.since, self.steps = time.perf_counter(), 0

    def tick(self):
        self.steps += 1

    def rate(self):
        now = time.perf_counter()
        rate = self.steps / (now - self.since)
        self.since, self.steps = now, 0
        return rate


class Meter:
    """Running means of figures that live on the device; the host waits for them only when it asks."""

    def __init__(self, device):
        self.device = device
        self.sums, self.counts = {}, {}

    @torch.no_grad()
    def add(self, name, value, weight=1.0):
        """Take in a 0-dim tensor. weight: 0-dim tensor or float; a value of weight 0 may be inf or NaN."""
        zero = torch.zeros((), device=self.device)
        self.sums[name] = self.sums.get(name, zero) + torch.where(weight > zero, value.detach() * weight, zero)
        self.counts[name] = self.counts.get(name, zero) + weight

    def _stacked(self):
        return torch.stack([*self.sums.values(), *self.counts.values()])

    def state_dict(self):
        """What has come in on every rank since the last means(). Every rank must call it."""
        return {"names": list(self.sums), "ranks": distributed.gather(self._stacked()) if self.sums else []}

    def load_state_dict(self, state, rank):
        """Take up where this rank was; from another number of ranks, or between log lines, start empty."""
        if rank < len(state["ranks"]):
            sums, counts = state["ranks"][rank].to(self.device).view(2, -1).unbind()
            self.sums = dict(zip(state["names"], sums.unbind(), strict=True))
            self.counts = dict(zip(state["names"], counts.unbind(), strict=True))

    def means(self):
        """Means over steps and ranks since the last call, as floats; nan where nothing came in."""
        sums, counts = distributed.mean(self._stacked()).view(2, -1).tolist()
        names = list(self.sums)
        self.sums, self.counts = {}, {}
        return {n: s / c if c else float("nan") for n, s, c in zip(names, sums, counts, strict=True)}
