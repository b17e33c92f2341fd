"""The outer loss of a run: how its options noise a batch and score it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn

from memdlm.diffusion.schedules import Schedule
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.networks.lower_layers import LowerLayers
from memdlm.training.arguments import DiffusionConfig
from memdlm.training.noise import SOFT, evaluation_noise
from memdlm.training.outer import Batch, learnable, noise_batch, score
from memdlm.training.rows import FIRST_TARGET


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class OuterObjective:
    """MDLM training, or with `block_size` block diffusion; training and evaluation noise and score alike."""

    options: DiffusionConfig
    schedule: Schedule
    mask_token_id: int
    spare_padding: bool = False
    """Padding is never masked (`mem_pad_unmask_mode=both`)."""

    def noised(self, inputs: dict[str, Any], times: Tensor, uniform: Tensor) -> Batch:
        """Noise a collated batch with its draws, see `noise_batch`."""
        return noise_batch(
            inputs,
            times,
            uniform,
            schedule=self.schedule,
            epsilon=self.options.time_epsilon,
            mask_token_id=self.mask_token_id,
            spare_padding=self.spare_padding,
            block=self.options.noise_shape.block,
        )

    def evaluated(self, inputs: dict[str, Any], seed: int, samples: Sequence[int]) -> Batch:
        """Noise an evaluation batch; its rows' noise is always the same."""
        ids = inputs["input_ids"]
        drawn = evaluation_noise(seed, samples, ids.shape, self.options.noise_shape.block)
        return self.noised(inputs, *(each.to(ids.device) for each in drawn))

    def learnable(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the positions [B, L] that may be masked."""
        return learnable(
            inputs["labels"],
            inputs.get("attention_mask"),
            inputs.get("is_padding"),
            spare_padding=self.spare_padding,
        )

    def passed(self, inputs: Mapping[str, Any]) -> int:
        """Return how many columns go through the network for a collated batch, a write apart."""
        rows, length = inputs["input_ids"].shape
        if self.options.block_size is None:
            return int(rows * length)
        left_out = inputs.get(FIRST_TARGET, 0) // self.options.block_size * self.options.block_size
        return int(rows * (2 * length - left_out))

    def softens(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the rows [B] that are soft-masked; None without soft-masking."""
        return inputs[SOFT] < self.options.soft_mask_prob if self.options.soft_mask_prob > 0 else None

    def score(
        self,
        model: nn.Module,
        batch: Batch,
        lower_layers: LowerLayers | None = None,
        attention_pattern: AttentionPattern | None = None,
        *,
        is_soft: Tensor | None = None,
        totals: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Return the `MaskedLoss` of a batch; with `totals` of the optimizer step, it has a differentiable loss."""
        return score(
            model,
            batch,
            schedule=self.schedule,
            weighting=self.options.loss_weight_type,
            right_shift_logits=self.options.right_shift_logits,
            lower_layers=lower_layers,
            planner=self.options.planner(),
            attention_pattern=attention_pattern,
            soft=self.options.soft(self.mask_token_id),
            is_soft=is_soft,
            norm=None if totals is None else self.options.loss_norm_type,
            block_size=self.options.block_size,
            **(totals or {}),
        )
