"""The loss on masked tokens: equal to its definition, and what interference is made of."""

import dataclasses

import pytest
import torch

from memdlm.errors import DataError
from memdlm.evaluation.masked_loss import MaskedText, interference, loss_under, masked_loss, masked_text
from memdlm.memory import MemoryConfig, ParametricMemory, concatenate
from tiny import CONFIGS, MASK, predicted, random_ids, rng, tiny

IDS = random_ids(1, 23)[0]
CONFIG = MemoryConfig(inner_rank=4, inner_layer_fraction=0.5, inner_lr=0.1, masking_strategy="strided")


@pytest.mark.parametrize("views", [1, 4, 5, 7])
def test_no_token_is_hidden_twice_before_all_were_hidden_once(views):
    text = masked_text(IDS, ratio=0.2, views=views, generator=rng())
    counts = text.is_masked.sum(0)
    assert text.num_scored >= 5 * views - views // 5
    assert counts.max() - counts.min() <= 1
    assert masked_text(IDS[:1], ratio=0.2, views=2, generator=rng()).is_masked.all()
    with pytest.raises(DataError, match="no tokens"):
        masked_text(IDS[:0], ratio=0.2, views=1, generator=rng())


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("window", [None, 7])
@torch.no_grad()
def test_it_is_the_mean_cross_entropy_of_what_is_hidden(family, window):
    model = tiny(family, torch.float64)
    text = masked_text(IDS, ratio=0.2, views=4, generator=rng())
    values = []
    for hidden in text.is_masked:
        for start in range(0, 23, window or 23):
            clean, part = IDS[start : start + (window or 23)], hidden[start : start + (window or 23)]
            logits = predicted(model, clean.masked_fill(part, MASK)[None])[0]
            values.append(-logits.log_softmax(-1).gather(1, clean[:, None])[part])
    expected = torch.cat(values)
    assert len(expected) == text.num_scored
    found = masked_loss(model, text, mask_token_id=MASK, window=window, batch_size=3)
    assert abs(found - expected.mean()) < 1e-12


def test_it_is_measured_under_the_attention_of_the_write():
    """Block-causal: what a later block holds does not change the loss on an earlier one."""
    config = dataclasses.replace(CONFIG, attention="decode")
    memory = ParametricMemory(tiny("llada2", torch.float64), config, mask_token_id=MASK)
    ids = random_ids(1, 64)[0]
    is_masked = (torch.arange(64) < 32)[None] & (torch.arange(64) % 3 == 0)
    changed = ids.where(torch.arange(64) < 32, 5)
    texts = [MaskedText(ids=each, is_masked=is_masked) for each in (ids, changed)]
    losses = [loss_under(memory, text) for text in texts]
    assert abs(losses[0] - losses[1]) < 1e-12
    full = [masked_loss(memory.model, text, mask_token_id=MASK) for text in texts]
    assert abs(full[0] - full[1]) > 1e-3


def test_interference_compares_none_own_and_combined_on_the_same_masks():
    model = tiny("small", torch.float64)
    memory = ParametricMemory(model, CONFIG, mask_token_id=MASK)
    texts, own = {"a": IDS, "b": random_ids(1, 17, seed=1)[0]}, []
    for ids in texts.values():
        with memory.write(ids[None]):
            own.append(memory.export())
    first, second = interference(memory, texts, own, concatenate(own))
    assert (first.name, second.name) == ("a", "b")
    assert first.own < first.without
    assert first.cost == first.combined - first.own != 0
    alone, _ = interference(memory, texts, own, own[0])
    assert alone.own == alone.combined == first.own
    nothing, _ = interference(memory, texts, own, concatenate(own, [0, 0]))
    assert abs(nothing.combined - nothing.without) < 1e-12
    with pytest.raises(DataError, match="2 texts and 1 memories"):
        interference(memory, texts, own[:1], own[0])
