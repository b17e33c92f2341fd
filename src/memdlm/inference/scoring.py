"""How likely a model finds a continuation."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from memdlm.diffusion.likelihood import Likelihood, monte_carlo_nll
from memdlm.errors import ConfigError
from memdlm.inference.checking import check_count, check_scoring
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.border.foreign import check_places
from memdlm.models.networks.checking import check_token
from memdlm.models.networks.soundness import blaming
from memdlm.randomness import derive


def score(
    model: nn.Module,
    prompt_ids: Tensor,
    target_ids: Tensor,
    num_samples: int = 128,
    *,
    memory: ParametricMemory | None = None,
    generator: torch.Generator | None = None,
    mask_token_id: int | None = None,
    batch_size: int = 16,
    right_shift_logits: bool | None = None,
    attention_pattern: AttentionPattern | None = None,
) -> Likelihood:
    """Bound -log p(target | prompt) in nats by Monte Carlo, with `.stderr`; a `memory` writes the prompt first.

    `prompt_ids` [P] and `target_ids` [T] are 1-D; `right_shift_logits` means the same as in `GenerationConfig`. The
    mask token comes from `mask_token_id`, the memory, or the model's configuration; raises ConfigError when none of
    them has it. `attention_pattern` None means full attention, as published for every family.
    """
    check_scoring(model, prompt_ids, target_ids, memory, generator, attention_pattern)
    num_samples, batch_size = check_count(num_samples, "num_samples"), check_count(batch_size, "batch_size")
    mask = mask_token_id
    if mask is None:
        mask = memory.mask_token_id if memory is not None else getattr(model.config, "mask_token_id", None)
    if mask is None:
        raise ConfigError(
            "mask_token_id: the model's configuration has none; pass mask_token_id=tokenizer.mask_token_id."
        )
    check_token(mask, "mask_token_id", model)
    check_places(model, prompt_ids.numel() + target_ids.numel(), "the text")
    generator = derive("memdlm.score", 0) if generator is None else generator
    device = next(model.parameters()).device
    prompt_ids = prompt_ids.to(device, torch.int64, non_blocking=True)
    target_ids = target_ids.to(device, non_blocking=True)
    writes = memory is not None and prompt_ids.numel() > 0
    with (
        memory.write(prompt_ids[None], generator=generator) if memory is not None and writes else nullcontext(),
        torch.no_grad(),
        blaming(model),
    ):
        return monte_carlo_nll(
            ModelDenoiser(model, attention_pattern=attention_pattern, right_shift_logits=right_shift_logits),
            prompt_ids,
            target_ids,
            mask_token_id=int(mask),
            num_samples=num_samples,
            batch_size=min(batch_size, num_samples),
            generator=generator,
        )
