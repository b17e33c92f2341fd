"""A model's loss on masked tokens of a text, which shows what a memory improves or harms.

The masks are independent of those of any write. An open memory is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memdlm.diffusion.likelihood import finite
from memdlm.diffusion.losses import Nats
from memdlm.diffusion.masking import positions_of
from memdlm.errors import DataError
from memdlm.memory.files.saved import SavedMemory
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.networks.soundness import blaming
from memdlm.randomness import derive
from memdlm.types import PositionSet


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedText:
    """One text, and the tokens that each view hides; a token is scored in the views that hide it."""

    ids: Tensor
    """[L] int64."""
    is_masked: PositionSet
    """[n, L]: one row per view."""

    @property
    def num_scored(self) -> int:
        """Number of predictions that the loss averages."""
        return int(self.is_masked.sum())


def masked_text(ids: Tensor, *, ratio: float, views: int, generator: torch.Generator) -> MaskedText:
    """Hide about `ratio` of the tokens of `ids` [L] in each of `views` views, and at least one.

    No token is hidden twice before all have been hidden once. Raises DataError for a text without tokens.
    """
    length = ids.numel()
    if length == 0:
        raise DataError("the text has no tokens; there is nothing to predict.")
    count = min(length, max(1, round(ratio * length)))
    rounds = -(-views * count // length)
    order = torch.cat([torch.randperm(length, generator=generator) for _ in range(rounds)])
    is_masked = torch.zeros(views, length, dtype=torch.bool)
    for view in range(views):
        is_masked[view, order[view * count : (view + 1) * count]] = True
    return MaskedText(ids=ids.cpu(), is_masked=is_masked)


@torch.no_grad()
def masked_loss(
    model: nn.Module,
    text: MaskedText,
    *,
    mask_token_id: int,
    window: int | None = None,
    batch_size: int = 8,
    right_shift_logits: bool | None = None,
    attention_pattern: AttentionPattern | None = None,
) -> float:
    """Return the loss in nats per hidden token, averaged over all views. An open memory is read.

    Texts longer than `window` tokens are read in pieces of that length, `batch_size` views at a time.
    `attention_pattern` None is full attention. Raises NotFiniteError when the model computes NaN or infinity.
    """
    length = text.ids.numel()
    window = length if window is None else min(window, length)
    device = next(model.parameters()).device
    denoise = ModelDenoiser(model, attention_pattern=attention_pattern, right_shift_logits=right_shift_logits)
    total = 0.0
    for start in range(0, length, window):
        clean, is_masked = text.ids[start : start + window], text.is_masked[:, start : start + window]
        is_masked = is_masked[is_masked.any(1)]  # a view that hides nothing here has nothing to score
        for rows in is_masked.to(device).split(batch_size) if len(is_masked) else ():
            ids = clean.to(device).expand(len(rows), -1)
            positions = positions_of(rows)
            nats = denoise.read(ids.masked_fill(rows, mask_token_id), positions, Nats(ids.flatten()[positions]))
            total += float(nats.double().sum())
    with blaming(model):
        return finite(total, "the loss") / text.num_scored


def loss_under(memory: ParametricMemory, text: MaskedText) -> float:
    """Return `masked_loss` of the memory's model, with the chunks and the attention of its writes."""
    return masked_loss(
        memory.model,
        text,
        mask_token_id=memory.mask_token_id,
        window=memory.config.chunk_length,
        right_shift_logits=memory.right_shift_logits,
        attention_pattern=memory.attention_pattern,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Interference:
    """What one text loses by sharing a memory, in nats per hidden token."""

    name: str
    num_tokens: int
    """Number of predictions that each loss averages."""
    without: float
    """Without any memory."""
    own: float
    """With the memory of this text alone."""
    combined: float
    """With the combination."""

    @property
    def cost(self) -> float:
        """How much worse the combination is than the text's own memory."""
        return self.combined - self.own


def interference(
    memory: ParametricMemory,
    texts: Mapping[str, Tensor],
    own: Sequence[SavedMemory],
    combined: SavedMemory,
    *,
    ratio: float = 0.2,
    views: int = 5,
    seed: int = 0,
) -> list[Interference]:
    """Measure, for every text (name -> ids [L]), no memory, its `own` memory and the `combined` one on the same masks.

    Raises MemoryFileError when a memory was written for another model, DataError when there are not as many memories as
    texts.
    """
    if len(texts) != len(own):
        raise DataError(f"there are {len(texts)} texts and {len(own)} memories; give one memory per text, in order.")
    found = []
    for (name, ids), alone in zip(texts.items(), own, strict=True):
        text = masked_text(ids, ratio=ratio, views=views, generator=derive("interference", seed, name))
        without = loss_under(memory, text)
        with memory.recall(alone):
            with_own = loss_under(memory, text)
        with memory.recall(combined):
            with_combined = loss_under(memory, text)
        found.append(
            Interference(name=name, num_tokens=text.num_scored, without=without, own=with_own, combined=with_combined)
        )
    return found
