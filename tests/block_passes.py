"""Block diffusion by its definition: one block-causal pass for every block, the oracle of the joined pass."""

import torch

from memdlm.models.blocks.masks import BlockCausal


def by_block(model, clean, noised, block, keep=None):
    """Logits [B, L, V]: those of block b from a pass over clean blocks 0 .. b - 1 and noised block b."""
    found = []
    for start in range(0, clean.shape[1], block):
        stop = min(start + block, clean.shape[1])
        ids = torch.cat((clean[:, :start], noised[:, start:stop]), dim=1)
        mask = None if keep is None else keep[:, :stop]
        found.append(model(ids, mask, attention_pattern=BlockCausal(block)).logits[:, start:])
    return torch.cat(found, dim=1)
