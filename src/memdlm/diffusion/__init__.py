"""Masked diffusion on plain tensors and a denoiser: schedules, noising, loss, likelihood, and the reverse loop."""

from memdlm.diffusion.blocks import absolute_blocks, absolute_blocks_from, blocks_after_prompt
from memdlm.diffusion.choice import CONFIDENCES, Confidence, LowConfidence, RandomOrder, TokenSampler, make_confidence
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
from memdlm.diffusion.masking import (
    BlockTimes,
    Corrupted,
    corrupt,
    corrupt_blocks,
    draw_times,
    maskable_positions,
    positions_of,
)
from memdlm.diffusion.reveal import Above, AtLeast, Even, Factor, Reveal, Scheduled, reveal_counts
from memdlm.diffusion.sampling import Edit, Step, denoise_canvas
from memdlm.diffusion.schedules import SCHEDULES, Cosine, Linear, Schedule, make_schedule
from memdlm.diffusion.stopping import EosStop, StableAnswer

__all__ = [
    "CONFIDENCES",
    "NORMS",
    "SCHEDULES",
    "WEIGHTINGS",
    "Above",
    "AtLeast",
    "BlockTimes",
    "ClassifierFree",
    "Confidence",
    "Corrupted",
    "Cosine",
    "Edit",
    "EosStop",
    "Even",
    "Factor",
    "Likelihood",
    "Linear",
    "LowConfidence",
    "MaskedLoss",
    "Planner",
    "RandomOrder",
    "Reveal",
    "Schedule",
    "Scheduled",
    "StableAnswer",
    "Step",
    "TokenSampler",
    "absolute_blocks",
    "absolute_blocks_from",
    "blocks_after_prompt",
    "corrupt",
    "corrupt_blocks",
    "cross_entropy",
    "denoise_canvas",
    "draw_times",
    "is_greedy",
    "make_confidence",
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
