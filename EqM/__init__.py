"""Equilibrium Matching (arXiv 2510.02300): training and sampling in FP32, BF16 and FP16."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from EqM.models import EqM_models
    from EqM.pipeline import EqMPipeline

__version__ = "0.3.0"
__all__ = ["EqMPipeline", "EqM_models"]


def __getattr__(name):
    """Import on first use: a command that has only a bad flag to tell needs no network."""
    if name == "EqMPipeline":
        from EqM.pipeline import EqMPipeline

        return EqMPipeline
    if name == "EqM_models":
        from EqM.models import EqM_models

        return EqM_models
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
