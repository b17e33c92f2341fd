"""What the values of `remasking` stand for: the names of ours and of the published samplers, in one table."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Algorithm:
    """In which order predictions are committed, and what follows for how many of them a step commits."""

    order: str
    """A name of `memdlm.diffusion.CONFIDENCES`."""
    is_static: bool = False
    """A step commits a fixed number; confidences decide only which."""
    has_threshold: bool = False
    """A step commits what is surer than `threshold`."""
    has_bound: bool = False
    """A step commits as many as `eb_threshold` allows."""
    is_stochastic: bool = False
    """The counts are drawn."""


ALGORITHMS: dict[str, Algorithm] = {
    "low_confidence": Algorithm(order="low_confidence"),
    "random": Algorithm(order="random"),
    # Dream
    "maskgit_plus": Algorithm(order="low_confidence"),
    "topk_margin": Algorithm(order="topk_margin"),
    "entropy": Algorithm(order="entropy"),
    "origin": Algorithm(order="random", is_stochastic=True),
    # SDAR
    "sequential": Algorithm(order="sequential"),
    "low_confidence_static": Algorithm(order="low_confidence", is_static=True),
    "low_confidence_dynamic": Algorithm(order="low_confidence", has_threshold=True),
    "entropy_bounded": Algorithm(order="entropy", has_bound=True),
}
