"""Metrics: one file a protocol, one written definition for each figure."""
