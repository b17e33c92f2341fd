"""Long texts chunk by chunk: one chunk is the whole text, several are several writes, and memory stays flat."""

import pytest
import torch
from torch.testing import assert_close

from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.randomness import derive
from tiny import CONFIGS, MASK, PAD, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))


def memory_of(model, **options):
    options = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 1.0, **options}
    return ParametricMemory(model, MemoryConfig(**options), mask_token_id=MASK)


def values(memory, ids, **arguments):
    with memory.write(ids, **{"generator": rng(), **arguments}) as written:
        return [written.losses, *(tensor.clone() for tensor in memory.fast.tensors())]


@every_family
@pytest.mark.parametrize("length", [9, 40])
def test_one_chunk_is_the_unchunked_write(family, length):
    model, ids = tiny(family), random_ids(2, 9)
    assert_close(values(memory_of(model, chunk_length=length), ids), values(memory_of(model), ids), rtol=0, atol=0)


@every_family
def test_every_chunk_goes_on_where_the_last_one_ended(family):
    model, ids = tiny(family, torch.float64), random_ids(2, 12)
    strided = {"masking_strategy": "strided", "num_inner_steps": 1}
    losses, *after = values(memory_of(model, chunk_length=8, **strided), ids)
    first, *_ = values(memory_of(model, **strided), ids[:, :8])
    assert losses.shape == (2, 2)
    assert_close(losses[:1], first, rtol=0, atol=0)
    assert not any(torch.equal(a, b) for a, b in zip(after[1::2], _[1::2], strict=True))


@every_family
def test_a_shorter_text_in_the_batch_is_written_as_alone(family):
    model, ids = tiny(family, torch.float64), random_ids(2, 12)
    keep = torch.arange(12) < torch.tensor([12, 3])[:, None]
    memory = memory_of(model, chunk_length=4, masking_strategy="strided", num_inner_steps=1)
    generators = lambda: [derive("row", row) for row in range(2)]
    _, *together = values(memory, ids.masked_fill(~keep, PAD), attention_mask=keep, generator=generators())
    _, *alone = values(memory, ids[1:, :3], generator=generators()[1:])
    for several, one in zip(together, alone, strict=True):
        assert_close(several.select(-3, 1), one.select(-3, 0), rtol=0, atol=1e-9)


def test_nothing_of_a_chunk_is_kept():
    """Bytes that autograd holds at most, at 2 and at 8 chunks."""

    def peak(chunks):
        held, most = 0, 0

        class Kept:
            def __init__(self, tensor):
                nonlocal held, most
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                held += self.size
                most = max(most, held)

            def __del__(self):
                nonlocal held
                held -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor), torch.no_grad():
            with memory_of(tiny("small"), chunk_length=32).write(random_ids(1, 32 * chunks), generator=rng()):
                pass
        return most

    assert peak(8) == peak(2)
