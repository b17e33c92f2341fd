"""Saving work changes no token: caches, ragged batches and early stops against full recomputation, in float64."""

import dataclasses
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.diffusion import denoise_canvas
from memdlm.inference import Decoder, GenerationConfig, generate, infill
from memdlm.inference.canvas import edit_for, reveal_for
from memdlm.inference.views import Asked, Blocks, FinishedBlocks, UpToBlock, WholeRows
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import BlockCausal, Full, ModelDenoiser
from tiny import V, families, rng, tiny

FIRST_WORD = 5
DRAWN = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}


@lru_cache
def network(name):
    return tiny(name, torch.float64)


@lru_cache
def memory_of(name):
    config = MemoryConfig(inner_layer_fraction=0.5, inner_rank=4, inner_alpha=16.0, inner_lr=1.0)
    return ParametricMemory(network(name), config, mask_token_id=words().mask_token_id)


def words(end=None):
    tokenizer = build_word_tokenizer([f"w{index:02}" for index in range(V - FIRST_WORD)])
    if end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def prompts_of(lengths, seed=0):
    return [torch.randint(FIRST_WORD, V, (n,), generator=rng(seed + i)) for i, n in enumerate(lengths)]


def same(mine, theirs):
    assert [row.tolist() for row in mine] == [row.tolist() for row in theirs]


def decoded(model, prompts, config, **arguments):
    """Every step of a decoding: canvas, and how sure every prediction was."""
    return list(Decoder(model, words(), config, **arguments).stream(prompts))


def as_sure(mine, theirs):
    """The same steps from the same predictions: confidences tell far more apart than the likeliest tokens."""
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert one.ids.equal(other.ids)
        assert_close(one.confidence, other.confidence, rtol=1e-9, atol=1e-12)


def plain(model, tokenizer, prompts, config, pattern):
    """Recompute every column of every row at every step, to the end."""
    decoder = Decoder(model, tokenizer, config, attention_pattern=pattern)
    canvas = decoder.prepare(prompts).canvas
    denoise = ModelDenoiser(model, attention_mask=canvas.is_there, attention_pattern=pattern)
    steps = list(
        denoise_canvas(
            denoise,
            canvas.ids,
            canvas.is_open,
            canvas.blocks,
            sampler=decoder.sampler,
            reveal=reveal_for(canvas, decoder.options),
            edit=edit_for(config),
        )
    )
    return [row[:end] for row, end in zip(steps[-1].ids, canvas.response_ends.tolist(), strict=True)], steps


def until_end(row, prompt, *ends):
    is_end = torch.isin(row[prompt.numel() :], torch.tensor(ends))
    return row[: prompt.numel() + int(is_end.int().argmax()) + 1] if is_end.any() else row


BLOCK_OPTIONS = st.fixed_dictionaries(
    {"block_size": st.integers(1, 6)},
    optional={
        "threshold": st.sampled_from([0.05, 0.2, 0.5, 0.95]),
        "editing_threshold": st.sampled_from([0.0, 0.3, 0.9]),
        "top_k": st.integers(1, 6),
        "cfg_scale": st.just(0.7),
    },
)
LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=4)


@pytest.mark.parametrize(
    "family",
    [
        "llada2",
        # The cache is the same for all; of these it is the pattern alone.
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("llada", "lladamoe", "small_windowed", "sdar", "dream")),
    ],
)
@settings(max_examples=10, **DRAWN)
@given(data=st.data(), lengths=LENGTHS, new=st.integers(1, 13), options=BLOCK_OPTIONS, remembers=st.booleans())
def test_block_causal_decoding_with_the_cache_gives_the_tokens_of_recomputation(
    family, data, lengths, new, options, remembers
):
    model, prompts = network(family), prompts_of(lengths, data.draw(st.integers(0, 9)))
    options = {"threshold": 0.3} | options | {"max_new_tokens": new}
    pattern = BlockCausal(options["block_size"])
    memory = memory_of(family) if remembers else None
    config = GenerationConfig(**options, eos_early_stop=False)
    more = {"memory": memory, "attention_pattern": pattern}
    whole = generate(model, words(), prompts, GenerationConfig(**options, cache="none"), **more)
    found = decoded(model, prompts, config, **more)
    as_sure(found, decoded(model, prompts, GenerationConfig(**options, eos_early_stop=False, cache="none"), **more))
    if not remembers and "cfg_scale" not in options:
        recomputed, steps = plain(model, words(), prompts, config, pattern)
        as_sure(found, steps)
        same(whole.sequences, [until_end(r, p, 0) for r, p in zip(recomputed, prompts, strict=True)])
    # Any word that came out may be the one that ends a text.
    said = torch.cat([row[p.numel() :] for row, p in zip(whole.sequences, prompts, strict=True)]).unique().tolist()
    end = data.draw(st.sampled_from(said))
    expected = [until_end(row, p, end) for row, p in zip(whole.sequences, prompts, strict=True)]
    cached = generate(model, words(end), prompts, GenerationConfig(**options), memory=memory, attention_pattern=pattern)
    if end != 0 and not any((row == 0).any() for row in whole.sequences):
        same(cached.sequences, expected)
    singles = [
        generate(model, words(end), [p], GenerationConfig(**options), memory=memory, attention_pattern=pattern)
        for p in prompts
    ]
    same(cached.sequences, [single.sequences[0] for single in singles])
    assert cached.unresolved == 0


@families("small", "small_windowed", "llada_switches")
@settings(max_examples=10, **DRAWN)
@given(
    data=st.data(),
    lengths=LENGTHS,
    new=st.integers(1, 13),
    block=st.none() | st.integers(1, 6),
    steps=st.integers(1, 13),
    threshold=st.none() | st.sampled_from([0.05, 0.5]),
    remembers=st.booleans(),
)
def test_bidirectional_decoding_gives_the_tokens_of_recomputation(
    family, data, lengths, new, block, steps, threshold, remembers
):
    model, prompts = network(family), prompts_of(lengths, data.draw(st.integers(0, 9)))
    config = GenerationConfig(max_new_tokens=new, block_size=block, steps=steps, threshold=threshold)
    memory = memory_of(family) if remembers else None
    together = generate(model, words(), prompts, config, memory=memory, attention_pattern=Full())
    if not remembers:
        recomputed, steps = plain(model, words(), prompts, config, Full())
        as_sure(
            decoded(model, prompts, dataclasses.replace(config, eos_early_stop=False), attention_pattern=Full()), steps
        )
        ends = Decoder(model, words(), config).stops
        same(together.sequences, [until_end(r, p, *ends) for r, p in zip(recomputed, prompts, strict=True)])
    singles = [generate(model, words(), [p], config, memory=memory, attention_pattern=Full()) for p in prompts]
    same(together.sequences, [single.sequences[0] for single in singles])


@pytest.mark.parametrize("family", ["llada", "llada2"])
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "remasking": "random", "steps": 3}])
def test_sampled_rows_are_those_of_running_alone(family, options):
    prompts = prompts_of([3, 9, 5])
    config = GenerationConfig(max_new_tokens=9, block_size=4, **options)
    pattern = Full() if "remasking" in options else None

    def draws(index):
        return torch.Generator().manual_seed(40 + index)

    together = generate(
        network(family), words(), prompts, config, generator=[draws(i) for i in range(3)], attention_pattern=pattern
    )
    alone = [
        generate(network(family), words(), [p], config, generator=[draws(i)], attention_pattern=pattern)
        for i, p in enumerate(prompts)
    ]
    same(together.sequences, [single.sequences[0] for single in alone])


@pytest.mark.parametrize("pattern", [BlockCausal(4), Full()], ids=str)
@settings(max_examples=15, **DRAWN)
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(2, 14), min_size=1, max_size=3), block=st.just(4))
def test_infilling_keeps_what_is_given_and_does_not_depend_on_the_batch(pattern, seed, lengths, block):
    model, mask = network("llada2"), words().mask_token_id
    rows = prompts_of(lengths, seed)
    for index, row in enumerate(rows):
        blank = torch.rand(row.numel(), generator=rng(seed + index)) < 0.5
        blank[int(torch.randint(row.numel(), (1,), generator=rng(seed)))] = True
        row[blank] = mask
    config = GenerationConfig(block_size=block, threshold=0.3)
    together = infill(model, words(), rows, config, attention_pattern=pattern)
    assert together.unresolved == 0
    for row, done in zip(rows, together.sequences, strict=True):
        assert done[row != mask].equal(row[row != mask])
    singles = [infill(model, words(), [row], config, attention_pattern=pattern).sequences[0] for row in rows]
    same(together.sequences, singles)
    decoder = Decoder(model, words(), GenerationConfig(block_size=block, threshold=0.3, cache="none"))
    if isinstance(pattern, BlockCausal):
        same(together.sequences, decoder.infill(rows).sequences)


def test_each_pass_takes_the_columns_it_must():
    lengths = torch.tensor([24, 16])

    def asked(*cells):
        return Asked.of(torch.tensor([row * 24 + column for row, column in cells]), 24)

    def columns(view, *cells):
        part = view.plan(asked(*cells))
        view.done(asked(*cells), part)
        return list(zip(part.first.tolist(), part.last.tolist(), strict=True))

    first, second = [(0, 9), (0, 10), (1, 4)], [(0, 10)]
    assert columns(WholeRows(lengths), *first) == [(0, 24), (0, 16)]
    assert columns(UpToBlock(lengths, Blocks.from_first(8, 2)), *first) == [(0, 16), (0, 8)]
    view = FinishedBlocks(lengths, Blocks.from_first(8, 2), 24)
    assert columns(view, *first) == [(0, 16), (0, 8)]
    assert columns(view, *second) == [(8, 16)]
    assert columns(view, (0, 17), (1, 8)) == [(8, 24), (0, 16)]
    assert columns(view, (0, 17)) == [(16, 24)]


def test_finished_rows_and_finished_blocks_cost_nothing():
    prompts = prompts_of([40, 41])
    options = {"max_new_tokens": 8, "block_size": 4, "threshold": 1.0, "suppress_tokens": (0,)}
    config = GenerationConfig(**options)
    cached = generate(network("llada2"), words(), prompts, config)
    plainly = generate(network("llada2"), words(), prompts, GenerationConfig(**options, cache="none"))
    same(cached.sequences, plainly.sequences)
    assert cached.num_forward_passes == plainly.num_forward_passes
    assert cached.num_token_positions < plainly.num_token_positions / 4
    said = cached.sequences[0][40:].tolist()
    stopped = generate(network("llada2"), words(said[0]), prompts[:1], config)
    assert stopped.sequences[0].tolist() == cached.sequences[0][:41].tolist()
    assert stopped.num_forward_passes < cached.num_forward_passes
