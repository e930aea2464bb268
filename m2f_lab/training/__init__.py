"""Training: one plain loop, checkpoints to continue from, callbacks that report, and a plan beforehand."""

from m2f_lab.training.callbacks import Callback, ProgressBar
from m2f_lab.training.loop import train
from m2f_lab.training.planning import Plan, plan
from m2f_lab.training.run import Run

__all__ = ["Callback", "Plan", "ProgressBar", "Run", "plan", "train"]
