"""Pictures of a descent: what a few samples go through, and the norm of the field and the energy at each step.

from EqM.trace import follow
follow(pipe, labels=[0, 3], indices=[0, 1], seed=0, num_sampling_steps=250).save("samples")
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from EqM.data import media
from EqM.run.errors import UserError, printable, reason

SHOWN = 4  # samples that sample_gd.py follows
COLUMNS = 8  # of the film strip
STATES = 60  # of each sample that are kept, about; the animation shows them all
FRAMES = 4  # of a clip, at most
SIDE = 96  # pixels of a frame, at most
DURATION, LAST = 80, 2000  # milliseconds that the animation shows a state, and the last


class State(NamedTuple):
    step: float
    x: torch.Tensor  # (C, [T,] h, w)


class Trace:
    """Observes a descent (samplers.Descent) of a pipeline's samples with these labels; see `follow`."""

    def __init__(self, pipe, labels, points, stop_norm=0.0):
        self.pipe, self.labels, self.stop_norm = pipe, labels, stop_norm
        self.every = max(1, (points - 1) // STATES)
        self.states = [[] for _ in labels]
        self.curves = [[] for _ in labels]  # (step, norm of the field, energy or None) of each; tensors, on the device
        self.has_energy = pipe.model.ebm != "none"

    def __call__(self, rows, steps, x, f):
        norms = f.flatten(1).norm(dim=1)
        energies = self.pipe.energy(x, [self.labels[row] for row in rows]) if self.has_energy else [None] * len(rows)
        for row, step, state, norm, energy in zip(rows, steps, x, norms, energies, strict=True):
            self.curves[row].append((step, norm, energy))
            if not self.states[row] or step >= self.states[row][-1].step + self.every:
                self.states[row].append(State(step, state))

    def end(self, row, x):
        """The sample ended at x."""
        self.states[row].append(State(self.curves[row][-1][0] + 1 if self.curves[row] else 0, x))

    def save(self, folder, strip=True, animation=False):
        """Write trace.png (the film strip) and trace-norm.png (the curves), and trace.gif (the animation).

        Raises UserError if they cannot be written.
        """
        pictures = [self._pictures(states) for states in self.states]
        try:
            if strip:
                self._strip(pictures).save(Path(folder) / "trace.png")
                self._plot().savefig(Path(folder) / "trace-norm.png", dpi=120)
            if animation:
                first, *rest = self._animation(pictures)
                times = [DURATION] * len(rest) + [LAST]
                path = Path(folder) / "trace.gif"
                first.save(path, save_all=True, append_images=rest, duration=times, loop=0)
        except OSError as error:
            raise UserError(f"{folder}: the trace cannot be written ({reason(error)})") from None

    def _pictures(self, states):
        """The states of one sample decoded, small enough to stand beside each other: uint8 (states, T, h, w, 3)."""
        with torch.no_grad():
            decoded = self.pipe.decode(torch.stack([state.x for state in states])).cpu().numpy()
        clips = media.as_clips(decoded)
        T, H = clips.shape[1:3]
        clips = clips[:, [round(i * (T - 1) / max(1, min(T, FRAMES) - 1)) for i in range(min(T, FRAMES))]]
        smaller = -(-H // SIDE)
        return np.stack([[np.asarray(Image.fromarray(frame).reduce(smaller)) for frame in clip] for clip in clips])

    def _name(self, row):
        return printable(self.pipe.composition.written(self.labels[row])[1])

    def _strip(self, pictures):
        tiles, names = [], []
        for row, (states, clips) in enumerate(zip(self.states, pictures, strict=True)):
            for column in range(COLUMNS):
                place = round(column * (len(states) - 1) / (COLUMNS - 1))
                tiles.append(clips[place])
                names.append(f"{self._name(row) if column == 0 else ''} {states[place].step:.0f}".strip())
        return media.contact_sheet(tiles, names, columns=COLUMNS, scale_to=SIDE // tiles[0].shape[0])

    def _animation(self, pictures):
        for place in range(max(map(len, pictures))):
            now = [min(place, len(clips) - 1) for clips in pictures]
            tiles = [clips[at] for clips, at in zip(pictures, now, strict=True)]
            names = [f"{self._name(row)} {self.states[row][at].step:.0f}" for row, at in enumerate(now)]
            yield media.contact_sheet(tiles, names, columns=2, scale_to=64)

    def _plot(self):
        from matplotlib.figure import Figure  # takes a second to import

        figure = Figure(figsize=(7, 6 if self.has_energy else 3.5), layout="constrained")
        kinds = ["norm of the field", *(["energy"] if self.has_energy else [])]
        for which, (axes, kind) in enumerate(
            zip(np.ravel(figure.subplots(len(kinds), 1, sharex=True)), kinds, strict=True)
        ):
            for row, curve in enumerate(self.curves):
                if curve:
                    heights = torch.stack([point[1 + which] for point in curve]).float().tolist()
                    name = self._name(row).replace("$", r"\$")
                    axes.plot([point[0] for point in curve], heights, linewidth=1, label=name)
            axes.set(ylabel=kind)
            axes.grid(alpha=0.3)
            if which == 0 and self.stop_norm:
                axes.axhline(self.stop_norm, color="grey", linestyle="--", linewidth=1, label="stop norm")
        axes.set_xlabel("update")
        if figure.axes[0].get_legend_handles_labels()[0]:
            figure.axes[0].legend(fontsize="small")
        return figure


def follow(pipe, labels, indices, seed=0, num_sampling_steps=250, stop_norm=0.0, **how):
    """The Trace of these samples, which descend once more for it. how: as EqMPipeline.draw takes it."""
    trace = Trace(pipe, labels, num_sampling_steps, stop_norm)
    how |= {"num_sampling_steps": num_sampling_steps, "stop_norm": stop_norm, "observe": trace}
    for ended in pipe.draw(labels, indices, seed, len(indices), **how):
        for index, x in zip(ended.indices, ended.x, strict=True):
            trace.end(list(indices).index(index), x)
    return trace
