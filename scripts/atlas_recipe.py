"""The settings of the atlas model's training."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Every setting of the training; the model card prints it."""

    seed: int = 0
    vocab_size: int = 1024  # small on purpose: subjects are several pieces, so identity has to be composed
    n_layer: int = 8
    n_embd: int = 192
    n_head: int = 8
    n_positions: int = 256
    steps: int = 13_000
    sequences: int = 8  # a step
    length: int = 96  # tokens a sequence
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.1
    routed: float = 0.9  # share of sequences under the routing mask, the dropout and the interchange
    contained: float = 0.5  # share of routed sequences whose subjects see nothing outside their own mention
    extract_from: int = 5  # first layer in which other tokens may read a subject
    drop_first_mlp: float = 0.5  # layer 0's MLP at subject tokens, share of routed sequences
    drop_late_mlps: float = 0.7  # MLPs from `extract_from` on at non-subject tokens, share, drawn per layer
    interchanged: float = 0.5  # share of draws in routed sequences that swap parts of two subjects' states
    noise: float = 2.0  # largest noise on the parts of a state that are not asked for, in units of its rms
    noise_asked: float = 0.6  # and on the part that is
    prose: float = 0.08  # share of sequences that are running prose
    shifted: float = 0.25  # share of sequences that start at a random position
    weight_prompt: float = 0.15
    weight_stop: float = 0.3
    weight_prose: float = 0.5

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a warm-up, then half a cosine down to a fiftieth."""
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.lr * min(1.0, (step + 1) / self.warmup) * cosine
