"""What the measuring scripts say alike: the machine they ran on, and tables in Markdown."""

import os
import platform
from pathlib import Path

import torch


def machine(device):
    """GPU if it is one, processor, PyTorch and Python, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    card = f"{torch.cuda.get_device_name(device)}; " if device.type == "cuda" else ""
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    return f"{card}{processor}, {os.cpu_count()} cores; {versions}"


def table(header, rows):
    """A Markdown table. header: cells; rows: lists of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
