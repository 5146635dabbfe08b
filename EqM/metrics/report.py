"""How figures are told: a table with its protocol, a plot against the step, a JSON file."""

import json
import os

from EqM.run.errors import UserError, printable

# name: heading, digits, and whether more is better
FIGURES = {
    "fid": ("FID", 3, False),
    "sfid": ("sFID", 3, False),
    "inception_score": ("IS", 2, True),
    "kid": ("KID", 5, False),
    "kid_error": ("+-", 5, None),
    "precision": ("precision", 4, True),
    "recall": ("recall", 4, True),
    "fvd": ("FVD", 2, False),
    "frame_fid": ("FID of frames", 3, False),
}
NAMES = {  # as logs, metrics.csv and cards have them
    "fid": "FID", "sfid": "sFID", "inception_score": "Inception Score", "kid": "KID", "precision": "Precision",
    "recall": "Recall", "fvd": "FVD", "frame_fid": "Frame FID",
}  # fmt: skip
RANKED_BY = ("fid", "fvd", "frame_fid")  # the lower, the better


def table(results):
    """A text table, a row for each result; what none of them has is left out, and of a single one its checkpoint."""
    wanted = ("step", *FIGURES, *(["checkpoint"] if len(results) > 1 else []))
    columns = [name for name in wanted if any(name in result for result in results)]
    rows = [[FIGURES[name][0] if name in FIGURES else name for name in columns]]
    rows += [[_cell(name, result.get(name)) for name in columns] for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cell(name, value):
    if value is None:
        return "-"
    return f"{value:.{FIGURES[name][1]}f}" if name in FIGURES else printable(value)


def lines(protocol):
    """A protocol as lines `name: value`, what lies in it flat."""
    for name, value in protocol.items():
        parts = value.items() if isinstance(value, dict) else None
        yield f"{name}: {', '.join(f'{key} {each}' for key, each in parts) if parts else value}"


def ranked_by(results):
    """The figure that says which result is best: FID, else FVD, else the FID of frames; None where none has one."""
    return next((name for name in RANKED_BY if any(name in result for result in results)), None)


def best(results):
    """The result that is best by `ranked_by`; None where no result has such a figure."""
    name = ranked_by(results)
    return None if name is None else min((r for r in results if name in r), key=lambda result: result[name])


def draw(results, path):
    """Plot figures against the step."""
    from matplotlib.figure import Figure  # takes a second to import

    results = sorted((result for result in results if "step" in result), key=lambda result: result["step"])
    names = [n for n in FIGURES if n != "kid_error" and any(n in result for result in results)]
    figure = Figure(figsize=(8, 2 * len(names) + 1), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0], names, strict=True):
        there = [result for result in results if name in result]
        axes.plot([result["step"] for result in there], [result[name] for result in there], marker="o")
        axes.set_ylabel(FIGURES[name][0])
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(path, dpi=120)


def save(path, protocol, results):
    """Write {"protocol", "results"} so that the file is there whole or not at all. Raises UserError."""
    partial = f"{path}.writing"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"protocol": protocol, "results": results}, file, indent=1)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}") from None
