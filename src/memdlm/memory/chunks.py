"""Texts longer than what is written at once: one chunk after the other, into the same fast weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memdlm.diffusion.masking import Corrupted
from memdlm.memory.inner_loop import Written
from memdlm.types import Ids, PositionSet


@dataclass(frozen=True, slots=True)
class Text:
    """What a write is given."""

    clean: Ids
    is_maskable: PositionSet
    mask: Tensor | None
    """[B, L] attention mask, or 4-D."""
    anchor: Corrupted | None

    def chunks(self, length: int | None, overlap: int = 0) -> Iterator["Text"]:
        """Yield the text in pieces of at most `length` columns; a text that fits is yielded as it is.

        Each piece but the first begins with the last `overlap` columns of the one before, which it shows and does not
        write again.
        """
        total = self.clean.shape[1]
        if length is None or total <= length:
            yield self
            return
        for start in range(0, total - overlap, length - overlap):
            part = slice(start, start + length)
            anchor, is_maskable = self.anchor, self.is_maskable[:, part]
            if anchor is not None:
                anchor = Corrupted(anchor.ids[:, part], anchor.is_masked[:, part], anchor.t)
            if start > 0 and overlap > 0:
                is_maskable = is_maskable.clone()
                is_maskable[:, :overlap] = False
            yield Text(self.clean[:, part], is_maskable, self._mask(part), anchor)

    def emptied(self) -> "Text":
        """Return the text with nothing to write."""
        return replace(self, is_maskable=torch.zeros_like(self.is_maskable))

    def _mask(self, part: slice) -> Tensor | None:
        if self.mask is None:
            return None
        if self.mask.dim() == 4:
            rows = part if self.mask.shape[2] > 1 else slice(None)
            return self.mask[:, :, rows, part]
        cut = self.mask[:, part].clone()
        # Attention needs something to look at, also where a shorter text has ended.
        cut[:, 0] = 1
        return cut


def joined(written: Sequence[Written]) -> Written:
    """Return the record of all chunks, in order."""
    if len(written) == 1:
        return written[0]
    return Written(
        losses=torch.cat([each.losses for each in written]),
        grad_norms=torch.cat([each.grad_norms for each in written]),
        num_skipped=torch.stack([each.num_skipped for each in written]).sum(0),
        num_tokens=sum(each.num_tokens for each in written),
    )
