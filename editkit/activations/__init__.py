"""Activations: what is in them (probes), and how training can shape them (shaping)."""
