"""Noise schedules: the share alpha(t) of tokens that survive at time t, and the loss weight that follows from it."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch

from memdlm.errors import ConfigError, unknown
from memdlm.types import Elementwise

STABILISER = 1e-6
"""Added to the masking probability before dividing by it, as in the published code."""


class Schedule(ABC):
    """alpha falls from 1 at t = 0 (clean) to 0 at t = 1; a token is masked with probability 1 - alpha(t)."""

    @abstractmethod
    def alpha(self, t: Elementwise) -> Elementwise:
        """Return the survival probability, elementwise."""

    @abstractmethod
    def alpha_derivative(self, t: Elementwise) -> Elementwise:
        """Return d alpha / dt, elementwise."""

    def loss_weight(self, t: Elementwise) -> Elementwise:
        """Return -alpha'(t) / (1 - alpha(t)): the factor that makes the masked loss a bound (about 1/t if linear)."""
        return -self.alpha_derivative(t) / (1 - self.alpha(t) + STABILISER)

    def stay_masked(self, s: float, t: float) -> float:
        """Return the probability that a token masked at time t is still masked at the earlier time s.

        Computed in float32, as published, so that reveal counts match it. Raises ConfigError unless 0 <= s < t <= 1.
        """
        if not 0 <= s < t <= 1:
            raise ConfigError(f"stay_masked needs 0 <= s < t <= 1, got s={s!r}, t={t!r}.")
        times = torch.tensor([s, t], dtype=torch.float32)
        hidden = 1 - self.alpha(times)
        return (hidden[0] / hidden[1]).item()


@final
@dataclass(frozen=True, slots=True)
class Linear(Schedule):
    """alpha(t) = 1 - t."""

    def alpha(self, t: Elementwise) -> Elementwise:
        """Return 1 - t."""
        return 1 - t

    def alpha_derivative(self, t: Elementwise) -> Elementwise:
        """Return -1."""
        return -torch.ones_like(t)


@final
@dataclass(frozen=True, slots=True)
class Cosine(Schedule):
    """alpha(t) = 1 - cos(pi/2 (1 - t))."""

    def alpha(self, t: Elementwise) -> Elementwise:
        """Return 1 - cos(pi/2 (1 - t))."""
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def alpha_derivative(self, t: Elementwise) -> Elementwise:
        """Return -pi/2 sin(pi/2 (1 - t))."""
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))


SCHEDULES: dict[str, type[Schedule]] = {"linear": Linear, "cosine": Cosine}


def make_schedule(name: str) -> Schedule:
    """Return the schedule called `name`; raises ConfigError with the possible names."""
    if name not in SCHEDULES:
        raise ConfigError(unknown("schedule:", name, SCHEDULES))
    return SCHEDULES[name]()
