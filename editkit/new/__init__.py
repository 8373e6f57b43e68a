"""Packages to start from: `python -m editkit.new method NAME` (or data, metric, family)."""
