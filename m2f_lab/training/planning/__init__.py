"""Planning a training before it starts: memory and time of a step, measured in processes of their own."""

from m2f_lab.training.planning.planner import Plan, plan

__all__ = ["Plan", "plan"]
