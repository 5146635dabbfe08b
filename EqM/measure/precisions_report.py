"""Figures, tables and curves of runs in several precisions and seeds, for compare_precisions.py."""

import math

import numpy as np
from matplotlib.figure import Figure

from EqM.measure.report import table

COLOURS = {"fp32": "black", "bf16": "tab:blue", "fp16": "tab:orange"}
FINAL_PART = 0.1  # of the steps, over which the final loss is a mean


def band(axes, steps, runs, name):
    """Draw the mean over seeds and, around it, the range. runs: (seeds, logged steps)."""
    axes.plot(steps, runs.mean(axis=0), label=name.upper(), color=COLOURS[name], linewidth=1)
    axes.fill_between(steps, runs.min(axis=0), runs.max(axis=0), alpha=0.2, color=COLOURS[name], linewidth=0)


def draw_losses(history):
    """Loss curves with their range over seeds; their difference from FP32 of the same seed; its size beside noise."""
    figure = Figure(figsize=(8, 10), layout="constrained")
    losses, differences, sizes = figure.subplots(3, 1, sharex=True)
    reference, steps = history["fp32"]["Train Loss"], history["fp32"]["step"][0]
    for name, columns in history.items():
        band(losses, steps, columns["Train Loss"], name)
        if name != "fp32":
            difference = columns["Train Loss"] - reference
            band(differences, steps, difference, name)
            sizes.plot(steps, abs(difference).mean(axis=0), label=name.upper(), color=COLOURS[name], linewidth=1)
    if len(reference) > 1:
        deviation = reference.std(axis=0, ddof=1)
        sizes.plot(steps, deviation, "k--", linewidth=1, label="FP32, standard deviation between seeds")
    losses.set(ylabel="training loss", yscale="log", title="Mean over seeds, shaded: their range")
    differences.set(ylabel="loss minus FP32's, same seed")
    sizes.set(ylabel="size of that difference", yscale="log", xlabel="step")
    for axes in (losses, differences, sizes):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.grid(alpha=0.3)
    return figure


def draw_history(history):
    """Gradient norm of all precisions; scale and skipped steps of FP16's runs."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    norm, scale, skipped = figure.subplots(3, 1, sharex=True)
    for name, columns in history.items():
        band(norm, columns["step"][0], columns["Grad Norm"], name)
    for i in range(len(history.get("fp16", {}).get("step", []))):
        columns = history["fp16"]
        scale.step(columns["step"][i], columns["Scale"][i], where="post", label=f"FP16, run {i + 1}")
        skipped.step(columns["step"][i], columns["Skipped Steps"][i], where="post", label=f"FP16, run {i + 1}")
    norm.set(ylabel="gradient norm before clipping", yscale="log")
    scale.set(ylabel="scale of the loss")
    scale.set_yscale("log", base=2)
    skipped.set(ylabel="steps skipped so far", xlabel="step")
    for axes in (norm, scale, skipped):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.grid(alpha=0.3)
    return figure


def plus_minus(values, digits=4, unit=1.0):
    """Mean of an array over seeds and, if there are several, the standard deviation between them."""
    values = unit * np.asarray(values)
    deviation = f" ± {spread(values):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def decibels(value):
    return f"{value:.1f} dB" if math.isfinite(value) else "identical"


def training_table(history, losses, held_out, between):
    header = [
        "trained in", "final loss", "minus FP32's, same seed", "held-out loss (EMA)", "gradient norm",
        "scale at the end", "skipped steps", "steps/s", "samples against FP32's checkpoint",
    ]  # fmt: skip
    rows = []
    for name, columns in history.items():
        difference = "" if name == "fp32" else plus_minus(losses[name] - losses["fp32"])
        several = len(losses[name]) > 1
        likeness = decibels(between[name]) if name != "fp32" or several else ""
        rows.append([
            name.upper(),
            plus_minus(losses[name]),
            difference,
            plus_minus(held_out[name]) if len(held_out[name]) else "",
            plus_minus(columns["Grad Norm"][:, -1], 2),
            ", ".join(f"{scale:g}" for scale in columns["Scale"][:, -1]) if name == "fp16" else "",
            ", ".join(f"{count:g}" for count in columns["Skipped Steps"][:, -1]),
            f"{np.median(columns['Train Steps/Sec']):.1f}",
            likeness + (" (another seed)" if name == "fp32" and several else ""),
        ])  # fmt: skip
    return table(header, rows)


def yardstick(losses):
    """How large differences of the final loss are beside the spread between seeds, in one sentence a precision."""
    seeds = spread(losses["fp32"])
    if not seeds > 0:
        return "One seed has no spread: the differences have no yardstick.\n"
    shares = {name: abs((loss - losses["fp32"]).mean()) / seeds for name, loss in losses.items() if name != "fp32"}
    told = "".join(
        f"; {name.upper()}'s mean difference from FP32 is {share:.3f} of that" for name, share in shares.items()
    )
    return f"Between seeds FP32's final loss deviates by {seeds:.4f}{told}.\n"


def sampling_table(args, found):
    def cell(trained, sampled):
        figures = found[trained, sampled]
        worst = f" (worst {decibels(figures['worst'])})" if math.isfinite(figures["worst"]) else ""
        likeness = "" if sampled == "fp32" else decibels(figures["psnr"]) + worst
        score = f"{plus_minus(figures['scores'], 1, 100)} %" if figures["scores"] else ""
        figure = f"{figures['figure'][0]} {plus_minus(figures['figure'][1], 2)}" if figures["figure"] else ""
        return "; ".join(filter(None, [likeness, score, figure])) or "the reference"

    rows = [[name.upper(), *(cell(name, sampled) for sampled in args.precisions)] for name in args.precisions]
    return table(["trained in", *(f"sampled in {name.upper()}" for name in args.precisions)], rows)


def spread(values):
    """Standard deviation over seeds; nan of a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def final_losses(history):
    """{precision: loss of each seed, (seeds,)}: the mean over the last part of the logged steps."""
    return {
        name: columns["Train Loss"][:, -max(1, round(FINAL_PART * columns["step"].shape[1])) :].mean(axis=1)
        for name, columns in history.items()
    }
