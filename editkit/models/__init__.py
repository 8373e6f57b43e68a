"""Models: loading them, and where each family keeps its parts."""
