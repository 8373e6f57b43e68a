"""What methods cost that are computed from inputs and gradients of tokens: UltraEdit, StableEdit, CrispEdit's text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from editkit.facts import Fact
from editkit.methods.shared.gradients import ROWS, TEXT_ROWS, modules_of, weight_shape
from editkit.models.tokens import spaced, token_counts
from editkit.plan.step import Step
from editkit.settings import CurvatureSettings, MomentSettings, OnePassSettings

if TYPE_CHECKING:
    from editkit.plan.work import Counter

EIGENVECTORS = 12.0  # operations of all of them, for each n³ of a matrix [n, n]
HELD = 3  # matrices [q, p] that are held to find which directions are free: products, in order, and which are


def one_backward_pass(counter: "Counter", facts: Sequence[Fact], settings: OnePassSettings) -> Step:
    """UltraEdit's edit: inputs and gradients at each module, and one solve for each; `settings` resolved."""
    lm = counter.lm
    shapes = [weight_shape(lm, name) for name in modules_of(lm, settings)]
    targets = token_counts(lm, [spaced(fact.target_new) for fact in facts])
    tokens = sum(targets)
    # 1) Passes over the facts.
    rows = min(len(facts), ROWS)
    longest = max(token_counts(lm, [fact.text + spaced(fact.target_new) for fact in facts]))
    whole = counter.passes("", -(-len(facts) // ROWS), rows * longest, backward=True, logits=rows * max(targets))
    # 2) The solves, [T, T] or [p, p]; where gradients are whitened, the eigenvectors of their covariance.
    solves = sum(min(tokens, p) ** 2 * (2 * max(tokens, p) + min(tokens, p) / 3) for _, p in shapes)
    whiten = EIGENVECTORS * sum(q**3 for q, _ in shapes) if settings.whitens else 0
    kept = tokens * sum(q + p for q, p in shapes)
    square = max(min(tokens, p) ** 2 + (q**2 if settings.whitens else 0) for q, p in shapes)
    operations = solves + whiten
    return Step(
        "gradients",
        whole.operations + operations,
        whole.seconds + operations / counter.speed.float64,
        device=whole.device,
        host=8 * (2 * kept + 3 * square),
        note=f"{len(facts)} facts, one backward pass",
    )


def statistics(counter: "Counter", settings: OnePassSettings) -> Step:
    """The mean and variance that UltraEdit begins with; `settings` resolved."""
    tokens = settings.warm_up or 0
    shapes = [weight_shape(counter.lm, name) for name in modules_of(counter.lm, settings)]
    text = running_text(counter, tokens)
    host = 8 * min(tokens, TEXT_ROWS * MomentSettings().block) * sum(q + p for q, p in shapes)
    return replace(text, name="statistics of running text", host=host, note=f"{tokens:,} tokens")


def curvatures(counter: "Counter", settings: CurvatureSettings) -> Step:
    """CrispEdit's A and B of running text, and their eigenvectors; `settings` resolved."""
    downs = [counter.sizes.down[layer] for layer in settings.blocks]
    text = running_text(counter, settings.tokens)
    shapes = [(down.d_model, down.d_ff * down.experts) for down in downs]
    squares = sum(q**2 + p**2 for q, p in shapes)
    operations = 2 * settings.tokens * squares + EIGENVECTORS * sum(q**3 + p**3 for q, p in shapes)
    held = 8 * (2 * squares + HELD * max(q * p for q, p in shapes))
    return Step(
        "curvature of running text",
        text.operations + operations,
        text.seconds + operations / counter.speed.float64,
        device=text.device,
        host=held,
        note=f"{settings.tokens:,} tokens",
    )


def running_text(counter: "Counter", tokens: int) -> Step:
    """Passes over so many tokens of running text, forward and backward, each token with its logits."""
    block = MomentSettings().block
    rows = -(-tokens // (block - 1))
    each = min(rows, TEXT_ROWS) * block
    return counter.passes("", -(-rows // TEXT_ROWS), each, backward=True, logits=each)
