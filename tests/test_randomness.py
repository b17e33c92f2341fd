"""One rule draws all numbers: of (seed, index) alone, so a seed means the same everywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memdlm.errors import ConfigError
from memdlm.randomness import PART, branched, derive, numbers, seed_tensor, uniform

MOST = 2**64 - 1


def split_mix(counter):
    """SplitMix64's output function on Python's integers."""
    counter = ((counter ^ counter >> 30) * 0xBF58476D1CE4E5B9) & MOST
    counter = ((counter ^ counter >> 27) * 0x94D049BB133111EB) & MOST
    return counter ^ counter >> 31


@given(seed=st.integers(-(2**63), 2**63 - 1), count=st.integers(0, 40))
def test_numbers_are_those_of_the_published_generator(seed, count):
    expected = [split_mix((seed + index * 0x9E3779B97F4A7C15) & MOST) for index in range(count)]
    stream = torch.tensor([seed])
    assert numbers(stream, (count,), torch.float64).tolist() == [(each >> 11) / 2**53 for each in expected]
    assert numbers(stream, (count,)).tolist() == [(each >> 40) / 2**24 for each in expected]


def test_large_draws_continue_small_ones():
    drawn = uniform((2, PART + 3), derive("large"))
    assert drawn.flatten()[:5].equal(uniform((5,), derive("large")))
    streams = torch.tensor([3, 4])
    whole = numbers(streams, (2, PART + 3))
    for row in range(2):
        assert whole[row].equal(numbers(streams[row : row + 1], (PART + 3,)))


@given(width=st.integers(1, 50), more=st.integers(1, 50))
def test_a_row_draws_what_it_draws_alone(width, more):
    rows = [derive("row", row) for row in range(3)]
    together = uniform((3, width + more), rows)
    for row in range(3):
        generator = derive("row", row)
        assert uniform((1, width), [generator])[0].equal(together[row, :width])
        # And is as far along its stream, whatever its width was.
        assert uniform((1, 4), [generator]).equal(uniform((3, 4), [derive("again")] * 2 + [rows[row]])[2:])
        rows[row] = derive("row", row)
        uniform((1, 1), [rows[row]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_uniform_and_do_not_follow_each_other(dtype):
    drawn = uniform((4, 250_000), [derive("quality", row) for row in range(4)], dtype=dtype)
    assert drawn.dtype == dtype
    assert drawn.min() >= 0
    assert drawn.max() < 1
    wide = drawn.double() - 0.5
    assert wide.mean(1).abs().max() < 4 * (1 / 12 / 250_000) ** 0.5
    assert (wide.square().mean(1) * 12 - 1).abs().max() < 0.01
    for lag in (1, 2, 7):
        assert (wide[:, lag:] * wide[:, :-lag]).mean(1).abs().max() * 12 < 0.01
    assert (wide @ wide.T / 250_000 * 12).fill_diagonal_(0).abs().max() < 0.01, "rows do not follow each other"
    counts = torch.histc(drawn.float(), 64, 0, 1)
    assert ((counts - 1e6 / 64).square() / (1e6 / 64)).sum() < 120, "chi-squared of 63 degrees"


def test_branches_are_streams_of_their_own():
    seed = seed_tensor(1, derive("branch"), "cpu")
    places = branched(seed.expand(500), torch.arange(500))
    assert places.unique().numel() == 500
    assert branched(seed, 7).equal(places[7:8])
    own = (numbers(seed, (100_000,)) * 2**24).long().unique()
    other = (numbers(places[3:4], (100_000,)) * 2**24).long().unique()
    assert torch.isin(own, other).sum() < 1000, "no more than by chance"


def test_generators_must_match_the_rows():
    with pytest.raises(ConfigError, match="2 generators for 3 rows"):
        uniform((3, 4), [derive(0), derive(1)])
