"""Whole jobs that combine the other packages: the demo, training runs, sessions with a model."""

from memdlm.workflows.runs.options import DataOptions, ModelOptions, RunOptions
from memdlm.workflows.runs.train import run_training
from memdlm.workflows.studies.demo import DemoPlan, run_demo

__all__ = ["DataOptions", "DemoPlan", "ModelOptions", "RunOptions", "run_demo", "run_training"]
