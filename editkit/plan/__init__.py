"""What a run will take, before it starts: memory, operations, and about how long."""

from editkit.plan.plan import Plan, plan_of, planned, require_fit

__all__ = ["Plan", "plan_of", "planned", "require_fit"]
