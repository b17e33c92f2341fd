"""A block-causal mask that is not formed whole equals the whole one, in every pass that takes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.inference import GenerationConfig, generate
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import BlockCausal
from memdlm.models.blocks.masks import SEGMENT, Segments, segments_for
from memdlm.models.networks.requests import Request
from tiny import CONFIGS, V, random_ids, tiny

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
unwindowed = pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"small_windowed"}))


def cut(monkeypatch, size):
    monkeypatch.setattr("memdlm.models.blocks.masks.SEGMENT", size)
    monkeypatch.setattr("memdlm.inference.views.SEGMENT", size)


@given(block=st.integers(1, 9), first=st.integers(0, 40), width=st.integers(1, 40), more=st.integers(0, 3))
def test_the_parts_are_the_mask(block, first, width, more):
    end = first + width + more
    mask = Segments(block, first, width, end)
    whole = mask.whole(torch.device("cpu"))
    query, key = torch.arange(first, first + width), torch.arange(end)
    assert whole[0, 0].equal(key[None] // block <= query[:, None] // block)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, 4)
        covered = torch.zeros_like(whole)
        for asked, seen in mask.parts():
            covered[..., asked, seen[0]] = mask.of(asked, seen, torch.device("cpu"))
        assert covered.equal(whole), "what a part leaves out is hidden"
    places = torch.arange(width).flip(0)[None]
    assert mask.rows(places).equal(whole[..., places[0], :])


@unwindowed
@pytest.mark.parametrize("is_padded", [False, True])
def test_logits_and_gradients_are_the_whole_mask_s(family, is_padded, monkeypatch):
    ids = random_ids(2, 23)
    keep = torch.arange(23) < torch.tensor([23, 17])[:, None] if is_padded else None
    found = []
    for size in (SEGMENT, 8):
        cut(monkeypatch, size)
        model = tiny(family, torch.float64)
        out = model(ids, keep, attention_pattern=BlockCausal(3)).logits
        out[0].log_softmax(-1)[..., 5].mean().backward()
        request = Request(queries=torch.tensor([[20, 3], [4, 5]]))
        narrowed = model(ids, keep, attention_pattern=BlockCausal(3), request=request).logits
        found.append([out, narrowed, *(p.grad for p in model.parameters() if p.grad is not None)])
    for whole, parts in zip(*found, strict=True):
        assert_close(parts, whole, **CLOSE)


@unwindowed
def test_writes_and_decoding_are_the_whole_mask_s(family, monkeypatch):
    tokenizer = build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])
    prompts = [random_ids(1, length, length)[0].clamp(min=5).tolist() for length in (23, 23)]
    for cache in ("exact", "none"):
        for lengths in ((23, 23), (23, 14)):
            found = []
            for size in (SEGMENT, 8):
                cut(monkeypatch, size)
                model = tiny(family, torch.float64)
                config = MemoryConfig(inner_layer_fraction=0.5, inner_rank=4, inner_alpha=16.0, inner_lr=1.0)
                memory = ParametricMemory(
                    model, config, mask_token_id=tokenizer.mask_token_id, attention_pattern=BlockCausal(4)
                )
                done = generate(
                    model,
                    tokenizer,
                    [prompt[:length] for prompt, length in zip(prompts, lengths, strict=True)],
                    GenerationConfig(max_new_tokens=8, block_size=4, cache=cache),
                    memory=memory,
                    attention_pattern=BlockCausal(4),
                )
                found.append([row.tolist() for row in done.sequences])
            assert found[0] == found[1]


def test_no_mask_is_as_large_as_the_square():
    """Of 2048 columns only a segment's rows are ever there, and no more than a third is computed in vain."""

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
                self.seen = max(self.seen, out.numel())
            return out

    model, ids = tiny("llada2"), random_ids(1, 4 * SEGMENT)
    with torch.no_grad(), Largest() as largest:
        model(ids, attention_pattern=BlockCausal(32))
    assert 0 < largest.seen <= SEGMENT * 4 * SEGMENT
    mask = Segments(32, 0, 4 * SEGMENT, 4 * SEGMENT)
    computed = sum((asked.stop - asked.start) * seen[0].stop for asked, seen in mask.parts())
    assert computed < 0.65 * (4 * SEGMENT) ** 2


def test_what_is_small_or_no_block_mask_is_formed_whole():
    hidden = torch.zeros(2, SEGMENT + 1, 4)
    keep = torch.ones(2, SEGMENT + 1, dtype=torch.bool)
    assert segments_for(None, hidden[:, :SEGMENT], BlockCausal(4)) is None
    assert segments_for(keep[:, None, None], hidden, BlockCausal(4)) is None
    assert segments_for(keep, hidden, BlockCausal(4)).is_visible.shape == (2, 1, 1, SEGMENT + 1)
