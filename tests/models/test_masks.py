"""The mask contract, on every family: what equals what, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from memdlm.errors import ConfigError
from memdlm.models import BlockCausal, Full
from tiny import CONFIGS, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def model_of(family, attention="sdpa"):
    model = tiny(family, torch.float64)
    model.set_attn_implementation(attention)
    return model


@every_family
@every_attention
@torch.no_grad()
def test_every_way_to_say_full_attention_agrees(family, attention):
    model, ids = model_of(family, attention), random_ids(2, 9)
    expected = model_of(family)(ids).logits
    for mask in (
        None,
        torch.ones(2, 9),
        torch.ones(2, 9, dtype=torch.int64),
        torch.ones(2, 9, dtype=torch.bool),
        torch.ones(1, 1, 9, 9, dtype=torch.bool),
        torch.zeros(2, 1, 9, 9, dtype=torch.float64),
    ):
        if mask is not None and mask.dim() == 2 and mask.is_floating_point():
            with pytest.raises(ConfigError, match="ambiguous"):
                model(ids, mask)
            continue
        assert_close(model(ids, mask).logits, expected, **CLOSE)
    assert_close(model(ids, attention_pattern=Full()).logits, expected, **CLOSE)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(family, attention, lengths, seed):
    model, width = model_of(family, attention), max(lengths) + 2
    ids = random_ids(len(lengths), width, seed)
    keep = torch.arange(width) < torch.tensor(lengths)[:, None]
    for mask in (keep, keep.long()):
        logits = model(ids, mask).logits
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length]).logits[0]
            assert_close(logits[row, :length], alone, **CLOSE)


@every_family
@torch.no_grad()
def test_attention_is_never_causal(family):
    """The last token reaches the first position (within the window), padded or not."""
    model, ids = model_of(family), random_ids(1, 4)
    other = ids.clone()
    other[0, 3] = (ids[0, 3] + 1) % 30
    keep = torch.tensor([[True, True, True, True]])
    for mask in (None, keep):
        assert not torch.allclose(model(ids, mask).logits[0, 0], model(other, mask).logits[0, 0])


@pytest.mark.parametrize("family", ["llada", "lladamoe", "llada2"])
@every_attention
@torch.no_grad()
def test_block_causal_sees_its_block_and_earlier_ones(family, attention):
    model, ids = model_of(family, attention), random_ids(1, 10)
    block = torch.arange(10) // 4
    seen = block[None, :] <= block[:, None]
    expected = model(ids, seen[None, None]).logits
    assert_close(model(ids, attention_pattern=BlockCausal(4)).logits, expected, **CLOSE)
    additive = torch.zeros(1, 1, 10, 10, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    assert_close(model(ids, additive).logits, expected, **CLOSE)
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 30
    assert_close(
        model(changed, attention_pattern=BlockCausal(4)).logits[0, :8],
        model(ids, attention_pattern=BlockCausal(4)).logits[0, :8],
        **CLOSE,
    )


@torch.no_grad()
def test_a_window_hides_what_is_further_away():
    model, ids = model_of("small_windowed"), random_ids(1, 40)
    other = ids.clone()
    other[0, 39] = (ids[0, 39] + 1) % 30
    reach = 2 * (3 + 1) + 1  # two layers of window 3, each after mixing with direct neighbours, and at the embedding
    assert model(ids).logits[0, : 39 - reach].equal(model(other).logits[0, : 39 - reach])


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 9, dtype=torch.float32),
        torch.ones(2, 9, 9, dtype=torch.bool),
        torch.ones(2, 1, 9, 9, dtype=torch.int64),
        torch.ones(2, 8, dtype=torch.bool),
        torch.ones(3, 1, 9, 9, dtype=torch.bool),
    ],
    ids=["float 2-D", "3-D", "integer 4-D", "short", "wrong batch"],
)
def test_anything_ambiguous_is_refused(mask):
    with pytest.raises(ConfigError, match="attention_mask"):
        tiny("small")(random_ids(2, 9), mask)


def test_a_block_needs_a_size():
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        BlockCausal(0)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), rows=st.integers(1, 3), length=st.integers(1, 8), seed=st.integers(0, 99))
@pytest.mark.parametrize("family", ["llada", "lladamoe", "llada2"])
@torch.no_grad()
def test_eager_and_sdpa_agree_on_any_mask(family, data, rows, length, seed):
    """Any keep mask, any block, also rows that see nothing: equal where a query sees something, finite everywhere."""
    ids = random_ids(rows, length, seed)
    keep = torch.rand(rows, length, generator=rng(seed)) < data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    pattern = data.draw(st.sampled_from([Full(), BlockCausal(1), BlockCausal(3)]))
    form = data.draw(st.sampled_from(["bool 2-D", "0/1 2-D", "bool 4-D", "additive 4-D"]))
    seen = keep[:, None, None, :].expand(-1, -1, length, -1)
    mask = {
        "bool 2-D": keep,
        "0/1 2-D": keep.long(),
        "bool 4-D": seen,
        "additive 4-D": torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf")),
    }[form]
    sdpa, eager = (
        MODELS[family, attention](ids, mask, attention_pattern=pattern).logits for attention in ("sdpa", "eager")
    )
    allowed = pattern.allowed(length, ids.device)
    sees = seen[:, 0] if allowed is None else seen[:, 0] & allowed
    # A token whose own column is hidden, or that sees nothing, is padding; nothing that counts may look at it.
    counts = sees.any(-1) & keep
    assert sdpa.isfinite().all()
    assert eager.isfinite().all()
    assert_close(sdpa[counts], eager[counts], **CLOSE)
    if form == "bool 2-D" and isinstance(pattern, Full):
        for row in range(rows):
            other = ids[row].masked_fill(~keep[row], 3)
            again = MODELS[family, "sdpa"](other[None], keep[row : row + 1]).logits[0]
            assert_close(again[counts[row]], sdpa[row][counts[row]], **CLOSE)


class _Lazily(dict):
    def __missing__(self, key):
        self[key] = model_of(*key)
        return self[key]


MODELS = _Lazily()


@pytest.mark.parametrize(
    "family", ["llada2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llada", "lladamoe"))]
)
@torch.no_grad()
def test_a_compiled_model_agrees(family):
    """In the published code, compiling alone turned LLaDA2 causal."""
    torch._dynamo.reset()
    model, ids = tiny(family), random_ids(2, 8)
    keep = torch.arange(8) < torch.tensor([[8], [5]])
    compiled = torch.compile(model, backend="aot_eager")
    for arguments in (
        {},
        {"attention_mask": keep},
        {"attention_mask": torch.ones(2, 8, dtype=torch.int64)},
        {"attention_pattern": BlockCausal(3)},
        {"attention_mask": keep, "attention_pattern": BlockCausal(3)},
    ):
        expected, ours = model(ids, **arguments).logits, compiled(ids, **arguments).logits
        assert_close(ours[keep], expected[keep], rtol=1e-4, atol=1e-5)
