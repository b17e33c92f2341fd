"""Models and prompts that break decoders: every call ends, with a defined result or one clear error."""

import pytest
import torch
from test_exactness import memory_of, network, prompts_of, words

from memdlm.errors import ConfigError, DataError
from memdlm.inference import PRESETS, GenerationConfig, generate, infill, stream
from memdlm.models import BlockCausal
from tiny import tiny

FAMILIES = ("llada", "lladamoe", "llada2", "small")
OPTIONS = {
    "default": {},
    "threshold": {"threshold": 0.5, "block_size": 4},
    "editing": {"threshold": 0.5, "editing_threshold": 0.0, "block_size": 4},
    "factor": {"factor": 0.9, "block_size": 4},
}


def obsessed(family, token):
    """A model to which nothing but `token` is likely."""
    model = tiny(family)
    favour = torch.zeros(model.lm_head.weight.shape[0]).index_fill(0, torch.tensor([token]), 1e3)
    model.lm_head.register_forward_hook(lambda module, inputs, out: out + favour)
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_wants_the_mask_token_never_gets_it(family, options):
    model = obsessed(family, words().mask_token_id)
    result = generate(model, words(), prompts_of([3, 6]), GenerationConfig(max_new_tokens=7, **options))
    assert result.unresolved == 0
    assert not any((row == words().mask_token_id).any() for row in result.sequences)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_says_nothing_stops_at_once(family, options):
    prompts = prompts_of([3, 6])
    result = generate(obsessed(family, 0), words(), prompts, GenerationConfig(max_new_tokens=40, **options))
    assert [row[len(p) :].tolist() for row, p in zip(result.sequences, prompts, strict=True)] == [[0], [0]]
    assert result.texts == ["", ""]
    assert result.num_tokens == 2
    assert result.unresolved == 0


@pytest.mark.parametrize("remembers", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_mask_tokens_of_a_prompt_stay_and_take_nothing_from_the_response(family, remembers):
    mask = words().mask_token_id
    prompts = [torch.tensor([7, mask, 9, mask]), torch.tensor([mask] * 5)]
    memory = memory_of(family) if remembers else None
    result = generate(
        network(family), words(), prompts, GenerationConfig(max_new_tokens=6, eos_early_stop=False), memory=memory
    )
    for row, prompt in zip(result.sequences, prompts, strict=True):
        assert row[: len(prompt)].equal(prompt)
        assert not (row[len(prompt) :] == mask).any()
    assert result.unresolved == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_prompts_are_refused_by_number(family):
    for prompts, message in (([[5, 6], []], "prompt 1 is empty"), ([], "non-empty list"), ("text", "non-empty list")):
        with pytest.raises(DataError, match=message):
            generate(network(family), words(), prompts)
    with pytest.raises(DataError, match="sequence 0 has no mask token"):
        infill(network(family), words(), [[5, 6]])


def test_a_prompt_beyond_the_positions_is_decoded_with_a_warning():
    model = network("llada2")
    places, model.config.max_position_embeddings = model.config.max_position_embeddings, 20
    try:
        with pytest.warns(UserWarning, match=r"26 tokens.*20 positions.*Shorten the prompt"):
            result = generate(model, words(), prompts_of([22]), GenerationConfig(max_new_tokens=4))
    finally:
        model.config.max_position_embeddings = places
    assert result.unresolved == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 4, "steps_per_block": 2}, "say the same"),
        ({"editing_threshold": 0.5, "steps": 4}, "no effect with editing_threshold"),
        ({"factor": 1.0, "threshold": 0.5}, "factor replaces threshold"),
        ({"threshold": 0.5, "remasking": "random"}, "'random' gives no probabilities"),
        ({"threshold": 0.5, "stochastic_transfer": True}, "no effect where confidences decide"),
        ({"cfg_keep_tokens": [3]}, "set cfg_scale above 0"),
        ({"begin_suppress": "forbid"}, "name some"),
        ({"cache": "fast"}, "Possible: exact, none, approximate"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be greater than 0"),
        ({"max_new_tokens": None}, "set one of them"),
    ],
    ids=str,
)
def test_options_that_cannot_take_effect_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**options)


def test_options_that_the_family_decides_about_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="set threshold"):
        generate(network("llada"), words(), prompts_of([3]), GenerationConfig(editing_threshold=0.5))
    with pytest.raises(ConfigError, match="Leave block_size out"):
        generate(
            network("llada2"),
            words(),
            prompts_of([3]),
            GenerationConfig(block_size=8),
            attention_pattern=BlockCausal(4),
        )
    with pytest.raises(ConfigError, match="leaves no room after a prompt of 9"):
        generate(network("llada"), words(), prompts_of([3, 9]), GenerationConfig(max_new_tokens=None, max_length=9))


def test_none_is_the_default_and_presets_can_be_changed():
    names = ("temperature", "remasking", "cfg_scale", "cache", "suppress_tokens", "max_post_steps", "eos_early_stop")
    assert GenerationConfig(**dict.fromkeys(names)) == GenerationConfig()
    for name in PRESETS:
        assert GenerationConfig.preset(name, max_new_tokens=5).max_new_tokens == 5
    with pytest.raises(ConfigError, match="llada21_speed"):
        GenerationConfig.preset("llada21_sped")


def test_forbidden_first_tokens_never_come_and_postponed_ones_may():
    model, prompts = network("llada"), prompts_of([4])
    said = generate(model, words(), prompts, GenerationConfig(max_new_tokens=8)).sequences[0][4:]
    token = int(said[0])
    for kind, allowed in (("forbid", False), ("postpone", True)):
        config = GenerationConfig(max_new_tokens=8, begin_suppress_tokens=[token], begin_suppress=kind)
        assert bool((generate(model, words(), prompts, config).sequences[0][4:] == token).any()) == allowed


def test_streaming_shows_what_generate_returns():
    model, prompts = network("llada2"), prompts_of([3, 5])
    config = GenerationConfig(max_new_tokens=6, block_size=4, eos_early_stop=False)
    steps = list(stream(model, words(), prompts, config))
    result = generate(model, words(), prompts, config)
    assert len(steps) == result.num_forward_passes
    for row, prompt, final in zip(result.sequences, prompts, steps[-1].ids, strict=True):
        assert final[: len(row)].equal(row)
        assert len(row) <= len(prompt) + 6
    for step in steps:
        assert (step.confidence[step.is_new] > 0).all()
