"""How often the field was evaluated for each sample of a folder, kept there so that no kill loses it."""

import csv

from EqM.run.errors import UserError, reason

BINS = 10  # of the histogram
WIDTH = 40  # characters of its longest bar


class Evaluations:
    """Counts of the samples that one rank makes, written before the samples are.

    A rank has a file of its own beside the samples, `evaluations.0.csv`; labels.csv takes their place in the end.
    """

    def __init__(self, folder, rank):
        self.path = folder / f"evaluations.{rank}.csv"

    def note(self, names, counts):
        """Add samples, by the names of their files. Raises UserError if that cannot be written."""
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(zip(names, counts, strict=True))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {reason(error)}") from None


def known(folder):
    """{name of a sample's file: its count} of all ranks of this run and those before it."""
    counts = {}
    oldest_first = folder / "labels.csv", folder / "evaluations.csv", *sorted(folder.glob("evaluations.*.csv"))
    for path in oldest_first:
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                first = ["file", "evaluations"] if path.name != "labels.csv" else None
                for row in csv.DictReader(file, first):
                    count = row.get("evaluations") or ""
                    if count.isdecimal():  # a kill may cut a row
                        counts[row["file"]] = int(count)
    return counts


def gather(folder, told=()):
    """Put what is known into one file, but for the names that labels.csv tells, and drop what ranks wrote before."""
    rest = {name: count for name, count in known(folder).items() if name not in set(told)}
    before = list(folder.glob("evaluations.*.csv"))
    kept, partial = folder / "evaluations.csv", folder / "evaluations.partial"
    with open(partial, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rest.items())
    partial.replace(kept)
    for path in (*before, *([] if rest else [kept])):
        path.unlink()


def summary(counts, most):
    """Mean and histogram of counts, as lines of text. most: what a sample that is never done takes."""
    mean, low, high = sum(counts) / len(counts), min(counts), max(counts)
    share = f" ({100 * mean / most:.0f} %)" if most else ""  # a single sampling point takes none
    lines = [f"Evaluations of the field: {mean:.1f} of {most} on average{share}, {low} to {high}"]
    width = -(-(high - low + 1) // BINS)
    bins = [0] * -(-(high - low + 1) // width)
    for count in counts:
        bins[(count - low) // width] += 1
    for place, size in enumerate(bins):
        first = low + place * width
        words = f"{first}" if width == 1 else f"{first} to {min(first + width - 1, high)}"
        lines.append(f"{words:>14} {'#' * round(WIDTH * size / max(bins))} {size}")
    return "\n".join(lines)
