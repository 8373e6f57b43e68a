"""Edits: changes of weights as values, their algebra, and the forms they leave in."""

from editkit.edits.base import Base, base_of
from editkit.edits.delta import Delta, dense_delta, joined, low_rank_delta
from editkit.edits.edit import Applied, Edit, compressed, relative_norm
from editkit.edits.requantized import Requantized, requantized
from editkit.edits.routing import RoutingChange, routing_change, routing_report
from editkit.edits.spectra import Spectrum, alignment, spectra
from editkit.edits.stacked import apply_files, stack, write_checkpoint

__all__ = [
    "Applied",
    "Base",
    "Delta",
    "Edit",
    "Requantized",
    "RoutingChange",
    "Spectrum",
    "alignment",
    "apply_files",
    "base_of",
    "compressed",
    "dense_delta",
    "joined",
    "low_rank_delta",
    "relative_norm",
    "requantized",
    "routing_change",
    "routing_report",
    "spectra",
    "stack",
    "write_checkpoint",
]
