"""The pass over [noised | clean] gives what a block-causal pass per block gives, and nothing leaks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from block_passes import by_block
from memdlm.diffusion import positions_of
from memdlm.errors import ConfigError
from memdlm.models import BlockCausal, Full, ModelDenoiser, load_model
from memdlm.models.blocks.masks import SEGMENT, BlockDiffusion, DiffusionSegments, segments_for
from memdlm.models.border.block_diffusion import BlockDiffusionDenoiser, prepare_block_diffusion
from memdlm.models.hub.families import decoding_pattern
from memdlm.models.networks.shifting import shift_of
from tiny import A2D, CONFIGS, MASK, V, random_ids, rng, tiny

CPU = torch.device("cpu")
# Networks in which positions meet in attention alone. A shifted one reads across the border of a block.
PURE = [name for name in (*CONFIGS, *A2D) if tiny(name).model.is_cacheable]
FAMILIES = [name for name in PURE if not shift_of(tiny(name))]
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
LENGTH, BLOCK = 11, 4
"""The last block is short."""


def texts(rows=2, length=LENGTH):
    clean = random_ids(rows, length)
    is_masked = torch.rand(clean.shape, generator=rng(1)) < 0.5
    return clean, clean.masked_fill(is_masked, MASK), is_masked


def joined(model, clean, noised, **options):
    """Logits [B, L, V] of the noised half, from one pass."""
    every = torch.arange(noised.numel())
    denoise = BlockDiffusionDenoiser(model, clean, BLOCK, **options)
    return denoise.logits(noised, every).view(*noised.shape, -1)


def cut(monkeypatch, size):
    monkeypatch.setattr("memdlm.models.blocks.masks.SEGMENT", size)


@pytest.mark.parametrize("size", [SEGMENT, 5], ids=["whole", "in segments"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_predicted_behind_the_clean_text_before_it(family, size, monkeypatch):
    model, (clean, noised, _) = tiny(family, torch.float64), texts()
    cut(monkeypatch, size)
    with torch.no_grad():
        assert_close(joined(model, clean, noised), by_block(model, clean, noised, BLOCK), **CLOSE)


@pytest.mark.parametrize("size", [SEGMENT, 3], ids=["whole", "in segments"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_of_a_row_changes_nothing(attention, size, monkeypatch):
    model, (clean, noised, _) = tiny("llada2", torch.float64), texts()
    model.set_attn_implementation(attention)
    keep = torch.arange(LENGTH) < torch.tensor([LENGTH, 6])[:, None]
    cut(monkeypatch, size)
    with torch.no_grad():
        found = joined(model, clean, noised, attention_mask=keep)
        for row, length in enumerate(keep.sum(1).tolist()):
            alone = joined(model, clean[row : row + 1, :length], noised[row : row + 1, :length])
            assert_close(found[row, :length], alone[0], **CLOSE)
        assert_close(found, by_block(model, clean, noised, BLOCK, keep), **CLOSE)


@pytest.mark.parametrize("size", [SEGMENT, 3], ids=["whole", "in segments"])
@pytest.mark.parametrize("family", ["llada2", "dream"])
def test_what_is_not_predicted_is_left_out_and_changes_nothing(family, size, monkeypatch):
    cut(monkeypatch, size)
    model, (clean, noised, is_masked) = tiny(family, torch.float64), texts()
    keep = torch.arange(LENGTH) < torch.tensor([LENGTH, 10])[:, None]
    for start in (0, 3, 4, 7, 8, 9, LENGTH):
        behind = is_masked & keep & (torch.arange(LENGTH) >= start)
        every = {"attention_mask": keep}
        cut_short = BlockDiffusionDenoiser(model, clean, BLOCK, start=start, **every)
        assert cut_short.start in (start // BLOCK * BLOCK, max(0, start - 1) // BLOCK * BLOCK)
        with torch.no_grad():
            found = cut_short.logits(noised, positions_of(behind))
            expected = BlockDiffusionDenoiser(model, clean, BLOCK, **every).logits(noised, positions_of(behind))
        assert_close(found, expected, **CLOSE)


def leaks(model, clean, noised):
    """Whether some block of the noised text sees clean tokens of its own block or of a later one."""
    before = joined(model, clean, noised)
    for start in range(0, LENGTH, BLOCK):
        changed = clean.clone()
        changed[:, start:] = (changed[:, start:] + 1) % MASK
        after = joined(model, changed, noised)
        # Experts take their tokens in another order, hence not bit for bit.
        if (before - after)[:, : start + BLOCK].abs().max() > 1e-9:
            return True
    return False


@pytest.mark.parametrize("size", [SEGMENT, 5], ids=["whole", "in segments"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_noised_block_never_sees_its_own_clean_block(family, size, monkeypatch):
    cut(monkeypatch, size)
    model, (clean, noised, _) = tiny(family, torch.float64), texts()
    with torch.no_grad():
        assert not leaks(model, clean, noised)

        def leaky(self, query, key, noised):
            return (key % noised) // self.block <= (query % noised) // self.block

        monkeypatch.setattr(BlockDiffusion, "sees", leaky)
        assert leaks(model, clean, noised), "the test notices a mask that leaks"


@given(block=st.integers(1, 9), half=st.integers(1, 40), size=st.integers(1, 12), left_out=st.integers(0, 3))
def test_the_parts_are_the_mask(block, half, size, left_out):
    check_parts(BlockDiffusion(block), half, size)
    start = min(left_out, (half - 1) // block) * block
    pattern = BlockDiffusion(block, start)
    whole = BlockDiffusion(block).allowed(2 * half, CPU)
    assert pattern.allowed(2 * half - start, CPU).equal(whole[start:, start:]), "only what is left out is missing"
    assert pattern.places(2 * half - start, CPU)[0].tolist() == [*range(start, half), *range(half)]
    check_segments(DiffusionSegments(pattern, half - start), whole[start:, start:], size)


def check_parts(pattern, half, size):
    block = pattern.block
    whole = pattern.allowed(2 * half, CPU)
    number = torch.arange(half) // block
    own, before = number[:, None] == number, number[:, None] > number
    none = torch.zeros_like(own)
    assert whole.equal(torch.cat((torch.cat((own, before), 1), torch.cat((none, own | before), 1))))
    assert pattern.places(2 * half, CPU)[0].tolist() == [*range(half), *range(half)]
    check_segments(DiffusionSegments(pattern, half), whole, size)


def check_segments(mask, whole, size):
    assert mask.whole(CPU)[0, 0].equal(whole)
    places = torch.arange(len(whole)).flip(0)[None]
    assert mask.rows(places)[0, 0].equal(whole.flip(0))
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, size)
        covered, asked_so_far = torch.zeros_like(whole), 0
        for asked, seen in mask.parts():
            assert asked.start == asked_so_far
            asked_so_far = asked.stop
            keys = torch.cat([torch.arange(each.start, each.stop) for each in seen])
            covered[asked, keys] = mask.of(asked, seen, CPU)[0, 0]
        assert covered.equal(whole), "what a part leaves out is hidden"
        assert asked_so_far == len(whole)


def test_a_long_pass_forms_no_mask_of_all_columns():
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
                self.seen = max(self.seen, out.numel())
            return out

    model, half = tiny("llada2"), 4 * SEGMENT
    ids = random_ids(1, 2 * half)
    with torch.no_grad(), Largest() as largest:
        model(ids, attention_pattern=BlockDiffusion(32))
    assert 0 < largest.seen <= SEGMENT * (half + SEGMENT)
    parts = DiffusionSegments(BlockDiffusion(32), half).parts()
    computed = sum((asked.stop - asked.start) * sum(each.stop - each.start for each in seen) for asked, seen in parts)
    assert computed < 0.4 * (2 * half) ** 2


def test_short_passes_and_given_masks_are_formed_whole():
    hidden = torch.zeros(1, SEGMENT + 2, 4)
    keep = torch.ones(1, SEGMENT + 2, dtype=torch.bool)
    assert segments_for(None, hidden[:, :SEGMENT], BlockDiffusion(4)) is None
    assert segments_for(keep[:, None, None], hidden, BlockDiffusion(4)) is None
    assert segments_for(keep, hidden, BlockDiffusion(4)).is_visible.shape == (1, 1, 1, SEGMENT + 2)


def test_a_network_converted_from_an_autoregressive_one_reads_one_column_to_the_left():
    model, (clean, noised, _) = tiny("dream", torch.float64), texts()
    shifted = BlockDiffusionDenoiser(model, clean, BLOCK)
    # The first column keeps its own output; no column of the second row reads the first row's end.
    positions = torch.arange(noised.numel())
    with torch.no_grad():
        both = model(torch.cat((noised, clean), dim=1), attention_pattern=BlockDiffusion(BLOCK)).logits
        plain = both[:, :LENGTH].flatten(0, 1)
        before = torch.where(positions % LENGTH == 0, positions, positions - 1)
        assert_close(shifted.logits(noised, positions), plain[before], **CLOSE)


def test_several_views_of_a_text_share_its_clean_half():
    model, (clean, noised, _) = tiny("llada2", torch.float64), texts()
    views = noised.repeat_interleave(2, 0)
    views[::2] = MASK
    denoise = BlockDiffusionDenoiser(model, clean, BLOCK)
    with torch.no_grad():
        found = denoise.logits(views, torch.arange(views.numel())).view(4, LENGTH, V)
        assert_close(found, joined(model, clean.repeat_interleave(2, 0), views), **CLOSE)


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in PURE])
def test_networks_that_would_mix_the_halves_are_refused(family):
    model, (clean, noised, is_masked) = tiny(family), texts()
    with pytest.raises(ConfigError, match="token mixing or a sliding window"):
        prepare_block_diffusion(model, BLOCK)
    with pytest.raises(ConfigError, match="token mixing or a sliding window"):
        BlockDiffusionDenoiser(model, clean, BLOCK).logits(noised, positions_of(is_masked))


def test_a_model_that_states_its_block_size_is_decoded_as_it_was_trained(tmp_path):
    model = tiny("a2d_qwen3")
    assert decoding_pattern(model.config) == Full()
    prepare_block_diffusion(model, 8)
    model.save_pretrained(tmp_path)
    assert decoding_pattern(load_model(tmp_path).config) == BlockCausal(8)
    other = tiny("llada2")
    prepare_block_diffusion(other, 8)
    assert decoding_pattern(other.config) == BlockCausal(32), "LLaDA2.x states none: --block_size says it in decoding"


def test_what_makes_no_sense_is_refused():
    model, (clean, _, _) = tiny("llada2"), texts()
    prepare_block_diffusion(model, BLOCK)
    with pytest.raises(ConfigError, match="memdlm's own families"):
        prepare_block_diffusion(torch.nn.Linear(2, 2), BLOCK)
    with pytest.raises(ConfigError, match="2-D attention_mask"):
        BlockDiffusionDenoiser(model, clean, BLOCK, attention_mask=torch.ones(2, 1, LENGTH, LENGTH))
    for block in (0, True, "4"):
        with pytest.raises(ConfigError, match=r"BlockDiffusion\.block must be an integer"):
            BlockDiffusion(block)
    with pytest.raises(ConfigError, match="start 6 is not the start of a block of 4 tokens"):
        BlockDiffusion(4, 6)
    with pytest.raises(ConfigError, match="11 columns are no such pair"):
        ModelDenoiser(model, attention_pattern=BlockDiffusion(BLOCK)).logits(clean, torch.arange(3))
