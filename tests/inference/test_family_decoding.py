"""How Dream, SDAR and BD3LM decode: defaults, caches, batches, memories and draws, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import DRAWN, LENGTHS, as_sure, decoded, memory_of, network, prompts_of, same, words

from memdlm.diffusion import (
    Above,
    EntropyBounded,
    NegativeEntropy,
    Scheduled,
    Shares,
    TokenSampler,
    Truncated,
    denoise_canvas,
)
from memdlm.errors import ConfigError
from memdlm.inference import Decoder, GenerationConfig, PromptCache, generate, infill
from memdlm.inference.algorithms import ALGORITHMS
from memdlm.inference.canvas import reveal_for
from memdlm.models import BlockCausal, Full, MDLMConfig, build_model
from memdlm.types import Denoise
from tiny import tiny


def decoder_of(family, **options):
    return Decoder(network(family), words(), GenerationConfig(**{"max_new_tokens": 12} | options))


def reveal_of(family, **options):
    decoder = decoder_of(family, **options)
    return reveal_for(decoder.prepare(prompts_of([5])).canvas, decoder.options)


def drawing(count, seed=40):
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def test_defaults_are_those_of_the_family():
    dream, sdar, a2d = (decoder_of(family) for family in ("dream", "sdar", "a2d_qwen3"))
    assert isinstance(dream.pattern, Full)
    assert isinstance(dream.sampler.remasking, NegativeEntropy)
    assert reveal_of("dream") == Truncated(steps=12, eps=1e-3)
    assert sdar.pattern == BlockCausal(4)
    assert reveal_of("sdar") == Above(threshold=0.85, block_size=4, steps=4)
    assert isinstance(a2d.pattern, Full)
    assert reveal_of("a2d_qwen3") == Scheduled(steps=12)
    assert decoder_of("a2d_qwen3", attention="bd3lm").pattern == BlockCausal(32)
    flags = [
        (each.sampler.is_tempered, each.sampler.is_filtered, each.sampler.is_top_p_first) for each in (dream, sdar, a2d)
    ]
    assert flags == [(True, True, True), (True, False, False), (False, True, False)]


@pytest.mark.parametrize(
    ("family", "options", "reveal"),
    [
        ("dream", {"steps": 5, "eps": 0.1}, Truncated(steps=5, eps=0.1)),
        ("dream", {"remasking": "origin"}, Truncated(steps=12, is_stochastic=True)),
        ("dream", {"soft_mask": True}, Truncated(steps=12, keeps_empty=True)),
        ("dream", {"transfer_schedule": "dllm"}, Scheduled(steps=12)),
        ("dream", {"remasking": "entropy_bounded"}, EntropyBounded(bound=0.35)),
        ("dream", {"remasking": "maskgit_plus", "threshold": 0.5}, Above(threshold=0.5, block_size=12, steps=12)),
        ("sdar", {"block_size": 8, "steps_per_block": 2}, Above(threshold=0.85, block_size=8, steps=2)),
        ("sdar", {"remasking": "low_confidence_static"}, Shares(block_size=4, steps=4)),
        ("sdar", {"remasking": "sequential", "steps_per_block": 2}, Shares(block_size=4, steps=2)),
        ("sdar", {"remasking": "low_confidence_dynamic"}, Above(threshold=0.85, block_size=4, steps=4)),
        ("dream", {"threshold": 0.5}, Above(threshold=0.5, block_size=12, steps=12)),
        ("sdar", {"eb_threshold": 0.2, "remasking": "entropy"}, EntropyBounded(bound=0.2)),
        ("sdar", {"eb_threshold": 0.2}, EntropyBounded(bound=0.2)),
        ("sdar", {"transfer_schedule": "dllm", "steps": 6}, Scheduled(steps=2)),
        ("sdar", {"remasking": "origin"}, Truncated(steps=4, is_stochastic=True)),
        ("llada", {"remasking": "low_confidence_dynamic"}, Above(threshold=0.85, block_size=12, steps=12)),
        ("llada", {"remasking": "origin"}, Scheduled(steps=12, is_stochastic=True)),
        ("llada", {"remasking": "topk_margin", "transfer_schedule": "dream"}, Truncated(steps=12)),
        ("llada2", {"remasking": "low_confidence_dynamic"}, Above(threshold=0.95, block_size=32, steps=12)),
    ],
    ids=str,
)
def test_options_choose_the_rule(family, options, reveal):
    assert reveal_of(family, **options) == reveal


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llada", {"eps": 0.1}, "eps=0.1 has no effect without Dream's schedule"),
        ("dream", {"eps": 0.1, "threshold": 0.5, "remasking": "low_confidence"}, "eps=0.1 has no effect"),
        ("dream", {"remasking": "origin", "alg_temp": 0.1}, "alg_temp=0.1 has no effect .*'origin'"),
        ("sdar", {"alg_temp": 0.1}, "alg_temp draws which of a fixed number"),
        ("sdar", {"top_k": 3}, "top_k=3 has no effect on this model without a temperature"),
        ("sdar", {"remasking": "low_confidence_static", "threshold": 0.5}, "commits a fixed number of tokens"),
        ("sdar", {"remasking": "sequential", "threshold": 0.5}, "gives no probabilities"),
        ("sdar", {"transfer_schedule": "sdar", "stochastic_transfer": True}, "stochastic_transfer belongs to"),
        ("sdar", {"eb_threshold": 0.3, "remasking": "low_confidence"}, "eb_threshold=0.3 has no effect"),
        ("sdar", {"eb_threshold": 0.3, "threshold": 0.5}, "eb_threshold replaces threshold"),
        ("sdar", {"eb_threshold": 0.3, "steps": 5}, "steps and steps_per_block have no effect"),
        ("llada2", {"remasking": "sequential"}, "remasking='sequential' has no effect on this model"),
        ("llada2", {"remasking": "low_confidence_static"}, "remasking='low_confidence_static' has no effect"),
        ("dream", {"cache": "approximate"}, "cache='approximate' is for"),
        ("sdar", {"stop_tokens": (99,)}, "token 99 is not in the vocabulary"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_refused(family, options, message):
    with pytest.raises(ConfigError, match=message):
        decoder_of(family, **options).prepare(prompts_of([5])).run()


def test_attention_is_said_once():
    config = GenerationConfig(attention="bd3lm")
    with pytest.raises(ConfigError, match="attention='bd3lm' and attention_pattern say the same"):
        generate(network("a2d_qwen3"), words(), prompts_of([3]), config, attention_pattern=Full())


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@pytest.mark.parametrize(("family", "remembers"), [("dream", False), ("sdar", True), ("a2d_qwen3", False)])
def test_rows_of_every_algorithm_are_those_of_running_alone(name, family, remembers):
    """With a temperature, drawn positions and drawn counts; with one memory per row and without."""
    prompts = prompts_of([3, 8, 5])
    draws = ALGORITHMS[name].order not in ("random", "sequential") and not ALGORITHMS[name].has_bound
    is_fixed = draws and name != "low_confidence_dynamic" and (family != "sdar" or name != "low_confidence")
    options = {"alg_temp": 0.2} if is_fixed and name != "maskgit_plus" else {}
    config = GenerationConfig(max_new_tokens=7, temperature=0.7, remasking=name, **options)
    memory = memory_of(family) if remembers else None
    arguments = {"config": config, "memory": memory}
    together = generate(network(family), words(), prompts, generator=drawing(3), **arguments)
    again = generate(network(family), words(), prompts, generator=drawing(3), **arguments)
    same(together.sequences, again.sequences)
    alone = [
        generate(network(family), words(), [prompt], generator=[drawing(3)[index]], **arguments)
        for index, prompt in enumerate(prompts)
    ]
    same(together.sequences, [each.sequences[0] for each in alone])
    assert together.unresolved == 0


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("sdar", "block_causal"),
        ("a2d_qwen3", "bd3lm"),
        slow("sdar", "bd3lm"),
        slow("a2d_qwen3", "block_causal"),
        slow("a2d_llama", "bd3lm"),
    ],
)
@settings(max_examples=10, **DRAWN)
@given(
    lengths=LENGTHS,
    new=st.integers(1, 13),
    block=st.sampled_from([1, 3, 4, 8, 64]),
    name=st.sampled_from(["low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded"]),
    more=st.sampled_from([{}, {"right_shift_logits": True}, {"cfg_scale": 0.7}]),
    remembers=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_block_cache_gives_the_predictions_of_recomputation(
    family, attention, lengths, new, block, name, more, remembers, seed
):
    prompts, memory = prompts_of(lengths, seed), memory_of(family) if remembers else None
    options = {"attention": attention, "block_size": block, "remasking": name, "max_new_tokens": new} | more
    if name == "low_confidence_dynamic":
        options["threshold"] = 0.2
    cached, plain = (
        decoded(
            network(family),
            prompts,
            GenerationConfig(**options, eos_early_stop=False, cache=cache),
            memory=memory,
        )
        for cache in ("exact", "none")
    )
    as_sure(cached, plain)
    singles = [
        decoded(network(family), [p], GenerationConfig(**options, eos_early_stop=False), memory=memory)[-1].ids[0]
        for p in prompts
    ]
    for row, prompt, single in zip(cached[-1].ids, prompts, singles, strict=True):
        assert row[: len(prompt) + new].equal(single[: len(prompt) + new])
        assert row[: len(prompt)].equal(prompt)


class LeftPadded(Denoise):
    """The published layout of BD3LM: one row, padded on the left to a multiple of the block, with a mask of its own."""

    def __init__(self, model, prompt, block):
        self.model, self.block, self.pad = model, block, -prompt % block

    def logits(self, ids, positions):
        padded = torch.nn.functional.pad(ids, (self.pad, 0), value=0)
        column = torch.arange(padded.shape[1])
        is_real, number = column >= self.pad, column // self.block
        seen = is_real[None] & (number[None] <= number[:, None])
        seen |= torch.eye(len(column), dtype=torch.bool)
        places = (column - self.pad).clamp_min(0)[None]
        with torch.no_grad():
            out = self.model(padded, seen[None, None], position_ids=places)
        return out.logits[0, self.pad :][positions]

    def hidden(self, ids, positions):
        raise NotImplementedError


@settings(max_examples=10, **DRAWN)
@given(lengths=LENGTHS, new=st.integers(1, 13), block=st.integers(1, 8), seed=st.integers(0, 9))
def test_blocks_of_bd3lm_lie_as_after_padding_on_the_left(lengths, new, block, seed):
    model, prompts = network("a2d_qwen3"), prompts_of(lengths, seed)
    config = GenerationConfig(attention="bd3lm", block_size=block, max_new_tokens=new, eos_early_stop=False)
    decoder = Decoder(model, words(), config)
    result = list(decoder.stream(prompts))[-1].ids
    for index, prompt in enumerate(prompts):
        canvas = decoder.prepare([prompt]).canvas
        steps = denoise_canvas(
            LeftPadded(model, len(prompt), block),
            canvas.ids,
            canvas.is_open,
            canvas.blocks,
            sampler=TokenSampler(mask_token_id=words().mask_token_id),
            steps_per_block=min(block, new),
        )
        assert list(steps)[-1].ids[0].equal(result[index, : len(prompt) + new])


def test_a_prompt_cache_is_refused_where_blocks_move():
    model, config = network("a2d_qwen3"), GenerationConfig(attention="bd3lm", block_size=4, max_new_tokens=4)
    with pytest.raises(ConfigError, match="attention='bd3lm'"):
        generate(model, words(), prompts_of([3]), config, prompt_cache=PromptCache(model))
    decoder = Decoder(model, words(), config)
    assert decoder.caching(None) is decoder
    assert Decoder(network("sdar"), words()).caching(None).prompt_cache is not None


@pytest.mark.parametrize("shift", [False, True])
def test_a_prompt_cache_gives_the_same_tokens(shift):
    model, config = network("sdar"), GenerationConfig(max_new_tokens=9, right_shift_logits=shift)
    cache, prompts = PromptCache(model), prompts_of([13, 6])
    plain = generate(model, words(), prompts, config)
    for _ in range(2):
        found = generate(model, words(), prompts, config, prompt_cache=cache)
        same(found.sequences, plain.sequences)
    assert found.num_reused_positions > 0


@pytest.mark.parametrize("family", ["dream", "sdar", "llada"])
def test_stop_tokens_end_a_response(family):
    model, prompts = network(family), prompts_of([6, 9])
    options = {"max_new_tokens": 12, "suppress_tokens": (0, 2, 3, 4)}
    whole = generate(model, words(), prompts, GenerationConfig(**options))
    stop = whole.sequences[0][6 + 5].item()
    found = generate(model, words(), prompts, GenerationConfig(**options, stop_tokens=(stop,)))
    late = generate(model, words(), prompts, GenerationConfig(**options, stop_tokens=(stop,), eos_early_stop=False))
    for full, mine, other, prompt in zip(whole.sequences, found.sequences, late.sequences, prompts, strict=True):
        is_stop = full[len(prompt) :] == stop
        end = len(prompt) + (int(is_stop.int().argmax()) + 1 if is_stop.any() else 12)
        assert mine.equal(full[:end])
        assert mine.equal(other)
    word = words().convert_ids_to_tokens(stop)
    assert word not in found.texts[0].split()


def test_an_empty_step_is_made_only_where_it_can_change_the_result():
    prompts = prompts_of([5])
    options = {"max_new_tokens": 6, "steps": 40}
    skipped = generate(network("dream"), words(), prompts, GenerationConfig(**options))
    assert skipped.num_forward_passes <= 6
    soft = list(decoder_of("dream", **options, soft_mask=True, eos_early_stop=False).stream(prompts))
    assert len(soft) == 40
    assert sum(bool(step.is_new.any()) for step in soft) <= 6


@pytest.mark.parametrize("family", ["dream", "sdar"])
def test_infilling_commits_each_rows_own_masks(family):
    mask, rows = words().mask_token_id, prompts_of([9, 14, 7])
    for row in rows:
        row[2:5] = mask
    rows[1][8:12] = mask
    together = infill(network(family), words(), rows, GenerationConfig(steps=4))
    assert together.unresolved == 0
    alone = [infill(network(family), words(), [row], GenerationConfig(steps_per_block=4)) for row in rows]
    if family == "dream":
        same(together.sequences, [each.sequences[0] for each in alone])
    for row, done in zip(rows, together.sequences, strict=True):
        assert done[row != mask].equal(row[row != mask])


INFILLED = [
    {"steps": 4, "block_size": 4},
    {"steps": 6, "threshold": 0.9},
    {"steps": 5, "threshold": 0.9, "block_size": 4},
    {"steps": 4, "block_size": 4, "transfer_schedule": "llada"},
    {"steps": 4, "block_size": 4, "transfer_schedule": "dllm", "stochastic_transfer": True},
]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        (family, options)
        for family in ("llada", "lladamoe", "llada2", "dream", "sdar", "a2d_qwen3")
        for options in INFILLED
        # LLaDA2.x commits by confidence alone.
        if family != "llada2" or "transfer_schedule" not in options
    ],
    ids=str,
)
def test_a_short_text_is_infilled_beside_a_long_one_as_alone(family, options):
    mask, rows = words().mask_token_id, prompts_of([8, 32, 13])
    for row in rows:
        row[torch.arange(row.numel()) % 4 != 0] = mask
    config = GenerationConfig(**options)
    draws = [drawing(3)[index] for index in range(3)]
    together = infill(network(family), words(), rows, config, generator=draws)
    alone = [infill(network(family), words(), [row], config, generator=[drawing(3)[i]]) for i, row in enumerate(rows)]
    same(together.sequences, [each.sequences[0] for each in alone])
    assert together.unresolved == 0


@pytest.mark.parametrize("attention", ["full", "block_causal", "bd3lm"])
@pytest.mark.parametrize("family", ["small", "a2d_qwen3"])
def test_padding_is_seen_under_no_attention(family, attention):
    config = GenerationConfig(max_new_tokens=4, block_size=3, attention=attention)
    for seed in range(6):
        prompts = prompts_of([2, 9, 5], seed)
        together = generate(network(family), words(), prompts, config)
        alone = [generate(network(family), words(), [prompt], config) for prompt in prompts]
        same(together.sequences, [each.sequences[0] for each in alone])


def test_the_preset_of_mdlm_draws_from_its_published_sampler():
    """The joint distribution of two tokens after two steps, each of which unmasks a token with probability (t - s) / t.

    The last step of ours unmasks all; the published one leaves a token masked with probability eps / t = 2e-5.
    """
    sizes, mask, rows = tiny("mdlm").config.to_dict(), words().mask_token_id, 12000
    model = build_model(MDLMConfig(**{**sizes, "mask_token_id": mask}), seed=0).double().eval()
    prompt = prompts_of([3])[0]
    config = GenerationConfig.preset("mdlm_ancestral", max_new_tokens=2, steps=2, eos_early_stop=False)
    decoder = Decoder(model, words(), config)
    *_, last = decoder.stream([prompt] * rows, torch.Generator().manual_seed(0))
    found = last.ids[:, -2:] @ torch.tensor([32, 1])

    def after(first, second):
        """Log-probabilities of both tokens, given what is known of them."""
        texts = torch.stack(torch.broadcast_tensors(*prompt, torch.as_tensor(first), torch.as_tensor(second)), -1)
        with torch.no_grad():
            return model(texts.view(-1, 5)).logits.softmax(-1)[:, -2:]

    every, share = torch.arange(32), (1 - 1e-5) / 2
    (both,) = after(mask, mask)
    at_once = both[0, :, None] * both[1]
    left_first = both[0, :, None] * after(every, mask)[:, 1]
    right_first = both[1] * after(mask, every)[:, 0].T
    expected = share * (1 - share) * (left_first + right_first) + (share**2 + (1 - share) ** 2) * at_once
    counts = found.bincount(minlength=32 * 32).view(32, 32)

    def surprise(expected):
        """How many standard deviations chi squared is from its mean, over the cells that are large enough."""
        is_large = expected * rows >= 5
        sizes = torch.cat((expected[is_large], expected[~is_large].sum()[None])) * rows
        seen = torch.cat((counts[is_large], counts[~is_large].sum()[None]))
        degrees = len(sizes) - 1
        return ((seen - sizes).square() / sizes).sum().sub(degrees) / (2 * degrees) ** 0.5

    assert expected.sum() == pytest.approx(1)
    assert surprise(expected).abs() < 2
    assert surprise(at_once) > 5
    assert surprise((left_first + right_first) / 2) > 5
