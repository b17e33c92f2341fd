"""The published decoding loops, written down plainly: what decoding is compared with."""

import torch
from torch import Tensor, nn

from memdlm.models import BlockCausal

BLOCK = 32


class Plain:
    """The published loops at temperature 0, on one row."""

    def __init__(self, model: nn.Module, mask: int) -> None:
        self.model, self.mask, self.passes, self.positions = model, mask, 0, 0

    @torch.no_grad()
    def logits(self, ids: Tensor, **arguments: object) -> Tensor:
        self.passes, self.positions = self.passes + 1, self.positions + ids.numel()
        logits = self.model(input_ids=ids, **arguments).logits.float()
        logits[..., self.mask] = float("-inf")
        return logits

    def whole(self, prompt: Tensor, new: int) -> Tensor:
        """One token a step, anywhere in the response; the softmax is taken over the whole canvas."""
        ids = torch.cat((prompt, prompt.new_full((new,), self.mask)))[None]
        for _ in range(new):
            logits = self.logits(ids)
            confidence, token = logits.softmax(-1).max(-1)
            best = confidence.masked_fill(ids != self.mask, -1).argmax(-1)
            ids[0, best] = token[0, best]
        return ids[0]

    def blocks(self, prompt: Tensor, new: int) -> Tensor:
        """Block after block; what is surer than 0.95, but at least an even share: one token if `new` is 32 or more."""
        length = -(-(len(prompt) + new) // BLOCK) * BLOCK
        quota = -(-BLOCK // min(BLOCK, new))
        ids = torch.cat((prompt, prompt.new_full((length - len(prompt),), self.mask)))[None]
        for start in range(len(prompt) // BLOCK * BLOCK, length, BLOCK):
            block = slice(start, start + BLOCK)
            while (ids[0, block] == self.mask).any():
                seen = ids[:, : start + BLOCK]
                confidence, token = (
                    self.logits(seen, attention_pattern=BlockCausal(BLOCK))[0, block].softmax(-1).max(-1)
                )
                confidence = confidence.masked_fill(ids[0, block] != self.mask, -1)
                chosen = confidence > 0.95
                if chosen.sum() < quota:
                    best = confidence.topk(min(quota, int((confidence >= 0).sum()))).indices
                    chosen = torch.zeros_like(chosen).index_fill(0, best, True)
                ids[0, block] = torch.where(chosen, token, ids[0, block])
        return ids[0, : len(prompt) + new]
