"""Whole jobs that join the other packages: the demo, and a training run from files."""

from memdlm.workflows.demo import DemoPlan, run_demo
from memdlm.workflows.options import DataOptions, ModelOptions, RunOptions
from memdlm.workflows.train import run_training

__all__ = ["DataOptions", "DemoPlan", "ModelOptions", "RunOptions", "run_demo", "run_training"]
