"""Edits: changes of weights as values, their algebra, and the forms they leave in."""

from editkit.edits.edit import Applied, Base, Delta, Edit, base_of, dense_delta, low_rank_delta, weight_norm

__all__ = ["Applied", "Base", "Delta", "Edit", "base_of", "dense_delta", "low_rank_delta", "weight_norm"]
