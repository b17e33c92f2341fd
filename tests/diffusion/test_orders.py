"""In which order predictions are committed: the rules of Dream and SDAR against their formulas, and laws of all."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import MASK, Table, V
from test_sampling import Lines, canvas_of, first_step, rng
from torch.testing import assert_close

from memdlm.diffusion import (
    CONFIDENCES,
    EntropyBounded,
    Shares,
    TokenSampler,
    denoise_canvas,
    make_confidence,
)
from memdlm.errors import ConfigError

LOGITS = 3 * torch.randn(200, V, generator=rng(3), dtype=torch.float64)
COMPARING = sorted(name for name, each in CONFIDENCES.items() if each.compares)


def sampler(name, **options):
    return TokenSampler(mask_token_id=MASK, remasking=make_confidence(name), **options)


def unmasked(logits):
    """Lines whose likeliest token is not the mask token: there the published confidences hold as they are."""
    return logits[logits.argmax(-1) != MASK]


def published(name, probabilities, token):
    """The confidences of `sample_tokens` (Dream), from probabilities after temperature, top_p and top_k."""
    if name == "low_confidence":
        return probabilities.gather(-1, token[:, None]).squeeze(1)
    if name == "topk_margin":
        ranked = probabilities.sort(-1, descending=True).values
        return ranked[:, 0] - ranked[:, 1]
    return (probabilities * (probabilities + 1e-10).log()).sum(-1)


def nucleus(logits, top_p):
    """Keep the likeliest tokens up to and including the one that crosses `top_p`, one line at a time."""
    kept = torch.full_like(logits, -torch.inf)
    for line, out in zip(logits, kept, strict=True):
        total = 0.0
        for token in line.argsort(descending=True).tolist():
            out[token] = line[token]
            total += float(line.softmax(-1)[token])
            if total > top_p:
                break
    return kept


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("temperature", [0.0, 0.4])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 2, "top_p": 0.8}], ids=str)
def test_confidences_are_those_of_the_filtered_distribution(name, temperature, filters):
    logits = unmasked(LOGITS)
    rule = sampler(name, temperature=temperature, is_tempered=True, is_top_p_first=True, **filters)
    token, sure = rule.choose(logits, rng())
    left = logits / (temperature or 1)
    if "top_p" in filters:
        left = nucleus(left, filters["top_p"])
    if "top_k" in filters:
        least = left.topk(filters["top_k"], dim=-1).values[:, -1:]
        left = left.masked_fill(left < least, -torch.inf)
    assert_close(sure, published(name, left.softmax(-1), token))


def test_the_order_of_the_filters_counts():
    """Of (0.5, 0.3, 0.2), top_p=0.6 leaves two tokens; of the best two alone, (0.625, 0.375), it leaves one."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    logits = torch.nn.functional.pad(logits, (0, V - 3), value=-torch.inf)
    for is_top_p_first, expected in ((True, 0.625), (False, 1.0)):
        rule = sampler("low_confidence", top_k=2, top_p=0.6, is_top_p_first=is_top_p_first)
        assert rule.choose(logits)[1].item() == pytest.approx(expected)


def test_unfiltered_confidences_do_not_become_certain():
    """SDAR as published reads them after top_k, so that top_k=1 commits whole blocks whatever the threshold."""
    for is_filtered in (True, False):
        _, sure = sampler("low_confidence", top_k=1, is_filtered=is_filtered).choose(unmasked(LOGITS))
        assert bool((sure == 1).all()) is is_filtered
        if not is_filtered:
            assert_close(sure, unmasked(LOGITS).softmax(-1).max(-1).values)


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("alg_temp", [0.0, 1e-4])
def test_where_the_mask_token_is_likeliest_the_prediction_comes_late(name, alg_temp):
    """The published code commits the mask token there, which leaves the position open; ours waits as well."""
    logits = LOGITS[:40].clone()
    logits[20:, MASK] = 30.0
    token, sure = sampler(name, alg_temp=alg_temp).choose(logits, rng())
    assert not (token == MASK).any()
    clear = (LOGITS[:20].argmax(-1) != MASK).nonzero().squeeze(1)
    assert sure[20:].max() < sure[clear].min()


@pytest.mark.parametrize("name", COMPARING)
def test_postponed_tokens_come_last(name):
    token, _ = sampler(name).choose(LOGITS)
    often = int(token.mode().values)
    _, sure = sampler(name, postpone=(often,)).choose(LOGITS)
    assert sure[token == often].max() <= sure[token != often].min()
    assert torch.isfinite(sure).all()


def test_drawn_positions_follow_the_softmax_without_replacement():
    """Two of three positions: the first is i with p_i, the second then j with p_j / (1 - p_i)."""
    sure, alg_temp, count = torch.tensor([0.9, 0.5, 0.2]), 0.5, 40000
    others = (1 - sure) / (V - 1)
    logits = torch.cat((sure[:, None], others[:, None].expand(-1, V - 1)), dim=1).log().repeat(count, 1)
    top = sampler("low_confidence", alg_temp=alg_temp).choose(logits, rng())[1].view(count, 3)
    p = (sure / alg_temp).softmax(-1)
    order = top.argsort(-1, descending=True)
    for i in range(3):
        for j in range(3):
            if i != j:
                share = ((order[:, 0] == i) & (order[:, 1] == j)).double().mean()
                assert share == pytest.approx(float(p[i] * p[j] / (1 - p[i])), abs=0.01)


def test_a_cold_draw_is_the_order_of_confidence():
    for name in COMPARING:
        sure = sampler(name).choose(LOGITS)[1]
        cold = sampler(name, alg_temp=1e-9).choose(LOGITS, rng())[1]
        assert cold.argsort().equal(sure.argsort())


def test_drawing_positions_needs_a_generator():
    assert sampler("entropy", alg_temp=0.1).draws
    with pytest.raises(ConfigError, match=r"alg_temp 0.1 draws the order: pass a generator"):
        sampler("entropy", alg_temp=0.1).choose(LOGITS)


@settings(max_examples=30)
@given(
    prompts=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    new=st.integers(1, 9),
    block=st.integers(1, 12),
    steps=st.integers(1, 12),
    name=st.sampled_from(sorted(CONFIDENCES)),
)
def test_shares_of_a_whole_block_never_touch_what_is_given(prompts, new, block, steps, name):
    """SDAR as published writes over the prompt's end where a share is larger than what is open."""
    ids, is_open = canvas_of(prompts, new)
    column = torch.arange(ids.shape[1]).expand_as(ids)
    blocks = [(column >= start) & (column < start + block) for start in range(0, ids.shape[1], block)]
    made = list(
        denoise_canvas(
            Table(),
            ids,
            is_open,
            blocks,
            sampler=sampler(name),
            reveal=Shares(block_size=block, steps=steps),
            generator=rng(),
        )
    )
    final = made[-1].ids
    assert final[~is_open].equal(ids[~is_open])
    assert not (final == MASK).any()
    share = -(-block // min(steps, block))
    assert max(int(step.is_new.sum(1).max()) for step in made) <= share


def test_sequential_goes_from_left_to_right():
    ids, is_open = canvas_of([3], 8)
    made = denoise_canvas(
        Table(), ids, is_open, [is_open], sampler=sampler("sequential"), reveal=Shares(block_size=8, steps=3)
    )
    assert [step.is_new[0].nonzero().squeeze(1).tolist() for step in made] == [[3, 4, 5], [6, 7, 8], [9, 10]]


@pytest.mark.parametrize(
    ("bound", "committed"), [(0.35, 2), (0.3, 1), (0.31, 2), (1e-9, 1), (0.75, 3), (100.0, 4)], ids=str
)
def test_the_entropy_bound_is_on_the_sum(bound, committed):
    step = first_step((-0.1, -0.2, -0.4, -0.8), reveal=EntropyBounded(bound=bound))
    assert int(step.is_new.sum()) == committed


def test_entropies_are_taken_over_the_vocabulary():
    lines = torch.full((6, V), -torch.inf)
    for place in range(6):
        lines[place, : place + 1] = 0.0
    ids, is_open = canvas_of([0], 6)
    made = denoise_canvas(
        Lines(lines),
        ids,
        is_open,
        [is_open],
        sampler=sampler("entropy"),
        reveal=EntropyBounded(bound=math.log(6) + 1e-6),
    )
    # Entropies are log 1 to log 6; those of the first three add up to log 6.
    assert next(iter(made)).is_new[0].nonzero().squeeze(1).tolist() == [0, 1, 2]
