"""A model's parametric memory: write a text into fast weights, read it through any call, leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from memdlm.diffusion.masking import Corrupted, maskable_positions
from memdlm.diffusion.schedules import Linear, Schedule
from memdlm.errors import ConfigError, DataError
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import InnerLoss, Written, run_inner_loop
from memdlm.memory.sites import find_sites
from memdlm.memory.trajectory import Anchor, Draw, trajectory
from memdlm.models.denoiser import ModelDenoiser
from memdlm.models.masks import AttentionPattern
from memdlm.models.wrappers import unwrap_parallel
from memdlm.randomness import Randomness, derive, uniform
from memdlm.types import Ids, PositionSet


class ParametricMemory:
    """Fast weights of `model`, written along a denoising trajectory.

        memory = ParametricMemory(model, MemoryConfig(), mask_token_id=tokenizer.mask_token_id)
        with memory.write(input_ids) as written:
            logits = model(input_ids=other_ids).logits      # reads the memory
        # here the model is bit for bit what it was

    Nothing is added to the model: `state_dict()`, `parameters()` and the training mode never change. One block can
    be open per memory at a time. Raises ConfigError when a target names no projection of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MemoryConfig | None = None,
        *,
        mask_token_id: int,
        schedule: Schedule | None = None,
        right_shift_logits: bool = False,
        attention_pattern: AttentionPattern | None = None,
    ) -> None:
        self.config = MemoryConfig() if config is None else config
        self.model, self.mask_token_id = unwrap_parallel(model), mask_token_id
        self.schedule = Linear() if schedule is None else schedule
        self.right_shift_logits, self.attention_pattern = right_shift_logits, attention_pattern
        self.strategy = self.config.strategy()
        self.update = self.config.update()
        self.loss = InnerLoss(
            objective=self.config.objective(),
            schedule=self.schedule,
            weighting=self.config.loss_weight_type or "uniform",
            norm=self.config.loss_norm_type or "token",
        )
        sites = find_sites(model, self.config.targets, self.config.inner_layer_fraction)
        self.fast = FastWeights(sites, self.config.adapter())
        self._is_open = False

    @contextmanager
    def write(
        self,
        input_ids: Ids,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: Randomness | None = None,
        *,
        anchor: Corrupted | None = None,
        is_padding: PositionSet | None = None,
    ) -> Iterator[Written]:
        """Write `input_ids` [B, L]; inside the block every call of the model reads the result.

        `labels` (default: the ids) are -100 where a token is not to be learned; positions that a 2-D
        `attention_mask` hides, and with `mem_pad_unmask_mode` the collator's `is_padding`, are left out too.
        `anchor` is the noised batch that will be read (training); without one, each learnable token is masked with
        probability `mem_prompt_mask_ratio` (inference). With a memory per row, row i of any later call reads memory
        i (calls with a whole multiple of B rows: neighbouring rows share one). `generator` draws the start of the
        fast weights and the masks: one for the batch or one per row; None: a fixed one.

        Raises DataError for malformed ids and ConfigError when a block of this memory is open already.
        """
        _check_ids(input_ids, labels)
        randomness = derive("memdlm.write", 0) if generator is None else generator
        clean = input_ids
        is_maskable = maskable_positions(input_ids if labels is None else labels, attention_mask)
        if is_padding is not None and self.config.pad_unmask_mode != "none":
            is_maskable = is_maskable & ~is_padding
        per_sample = self.config.per_sample is not False
        denoise = ModelDenoiser(
            self.model,
            attention_mask=attention_mask,
            attention_pattern=self.attention_pattern,
            right_shift_logits=self.right_shift_logits,
        )
        with self._opened():
            self.fast.reset(clean.shape[0] if per_sample else 1, _for_start(randomness, per_sample))
            with self.fast.attached():
                # Gradients are needed even where the caller switched them off; the block itself is left as it is.
                with torch.inference_mode(False), torch.enable_grad():
                    written = self._write(clean, is_maskable, anchor, denoise, randomness)
                yield written if per_sample else _joined(written)

    def _write(
        self,
        clean: Ids,
        is_maskable: PositionSet,
        noised: Corrupted | None,
        denoise: ModelDenoiser,
        randomness: Randomness,
    ) -> Written:
        def draw() -> Tensor:
            return uniform(clean.shape, randomness, clean.device)

        anchor = self._anchor(clean, is_maskable, noised, draw)
        steps = trajectory(
            self.strategy.path(anchor, draw),
            anchor,
            mask_token_id=self.mask_token_id,
            scored=self.config.inner_loss_mask_mode,
        )
        written = run_inner_loop(
            steps,
            fast=self.fast,
            loss=self.loss,
            update=self.update,
            denoise=denoise,
            epochs=self.config.num_inner_epochs,
        )
        # What is read is a constant: no gradient reaches the fast weights (first order).
        self.fast.replace([value.detach() for value in self.fast.tensors()])
        return written

    def _anchor(self, clean: Ids, is_maskable: PositionSet, noised: Corrupted | None, draw: Draw) -> Anchor:
        if noised is None:
            ratio = self.config.prompt_mask_ratio
            is_masked = is_maskable & (draw() < ratio)
            t = torch.full(clean.shape[:1], ratio, device=clean.device)
        else:
            is_masked, t = noised.is_masked & is_maskable, noised.t
        return Anchor(clean=clean, is_maskable=is_maskable, is_masked=is_masked, t=t)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        if self._is_open:
            raise ConfigError("this memory is open already; leave its block before writing again.")
        self._is_open = True
        try:
            yield
        finally:
            self.fast.erase()
            self._is_open = False


def _for_start(randomness: Randomness, per_sample: bool) -> Randomness:
    """One memory for the batch starts from one generator, even when every row draws its masks from its own."""
    if per_sample or isinstance(randomness, torch.Generator):
        return randomness
    return randomness[0]


def _joined(written: Written) -> Written:
    """Drop the sample dimension of a write that all rows shared."""
    return Written(
        losses=written.losses[:, 0],
        grad_norms=written.grad_norms[:, 0],
        num_skipped=written.num_skipped[0],
        num_tokens=written.num_tokens,
    )


def _check_ids(input_ids: Ids, labels: Tensor | None) -> None:
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64:
        raise DataError(
            f"input_ids must be int64 of shape [B, L], got {input_ids.dtype} of shape {tuple(input_ids.shape)}."
        )
    if input_ids.shape[1] == 0:
        raise DataError("input_ids has no tokens: there is nothing to write.")
    if labels is not None and labels.shape != input_ids.shape:
        raise DataError(f"labels have shape {tuple(labels.shape)}, the ids {tuple(input_ids.shape)}; they must agree.")
