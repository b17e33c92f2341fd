"""Masked diffusion on plain tensors and a denoiser: schedules, noising, loss, likelihood, and the reverse loop."""

from memdlm.diffusion.guidance import ClassifierFree
from memdlm.diffusion.likelihood import Likelihood, is_greedy, monte_carlo_nll, weighted_nll
from memdlm.diffusion.losses import (
    NORMS,
    WEIGHTINGS,
    MaskedLoss,
    Planner,
    cross_entropy,
    masked_loss,
    normalise,
    row_sums,
    weight_of,
)
from memdlm.diffusion.masking import Corrupted, corrupt, draw_times, maskable_positions, positions_of
from memdlm.diffusion.reveal import reveal_counts
from memdlm.diffusion.sampling import (
    COMMITS,
    Commit,
    LowConfidence,
    RandomOrder,
    Rule,
    Step,
    absolute_blocks,
    blocks_after_prompt,
    denoise_canvas,
    make_commit,
)
from memdlm.diffusion.schedules import SCHEDULES, Cosine, Linear, Schedule, make_schedule

__all__ = [
    "COMMITS",
    "NORMS",
    "SCHEDULES",
    "WEIGHTINGS",
    "ClassifierFree",
    "Commit",
    "Corrupted",
    "Cosine",
    "Likelihood",
    "Linear",
    "LowConfidence",
    "MaskedLoss",
    "Planner",
    "RandomOrder",
    "Rule",
    "Schedule",
    "Step",
    "absolute_blocks",
    "blocks_after_prompt",
    "corrupt",
    "cross_entropy",
    "denoise_canvas",
    "draw_times",
    "is_greedy",
    "make_commit",
    "make_schedule",
    "maskable_positions",
    "masked_loss",
    "monte_carlo_nll",
    "normalise",
    "positions_of",
    "reveal_counts",
    "row_sums",
    "weight_of",
    "weighted_nll",
]
