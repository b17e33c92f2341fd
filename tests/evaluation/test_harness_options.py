"""Arguments of an evaluation: every option of every config is accepted in the forms lm-eval hands over, or refused."""

import dataclasses

import pytest

from memdlm.errors import ConfigError
from memdlm.evaluation.harness_options import (
    DEFAULT_NEW_TOKENS,
    HarnessOptions,
    cut,
    generation_fields,
    option_names,
    parse_arguments,
    parse_request,
    typed,
)
from memdlm.inference import GenerationConfig
from memdlm.memory import MemoryConfig

IDLE = {"per_sample", "sync_inner"}


@pytest.mark.parametrize("field", dataclasses.fields(MemoryConfig), ids=lambda field: field.name)
def test_every_memory_option_is_an_argument(field):
    value = None if field.name in IDLE else field.default
    settings = parse_arguments({"pretrained": "x", "mem_enabled": "True", f"mem_{field.name}": str(value)})
    assert getattr(settings.memory, field.name) == field.default
    with pytest.raises(ConfigError, match=f"mem_{field.name}=.* has no effect without memory"):
        parse_arguments({"pretrained": "x", f"mem_{field.name}": value})


@pytest.mark.parametrize("name", generation_fields())
def test_every_decoding_option_is_an_argument(name):
    default = next(field.default for field in dataclasses.fields(GenerationConfig) if field.name == name)
    texts = {default, str(default)} if default != () else {"[]", ()}
    for value in texts:
        assert parse_arguments({"pretrained": "x", name: value}).generation == {name: default}


@pytest.mark.parametrize("field", dataclasses.fields(HarnessOptions), ids=lambda field: field.name)
def test_every_option_of_the_harness_is_an_argument(field):
    assert field.name in option_names()
    if field.name != "pretrained":
        parsed = parse_arguments({"pretrained": "x", field.name: str(field.default)}).options
        assert getattr(parsed, field.name) == field.default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pretrained is missing"),
        ({"pretrained": "x", "mem_inner_rnk": 4}, "'mem_inner_rnk' is not known.*Did you mean 'mem_inner_rank'"),
        ({"pretrained": "x", "stpes": 4}, "'stpes' is not known.*Did you mean 'steps'"),
        ({"pretrained": "x", "steps": "many"}, "steps='many' is not valid: it must be int or None"),
        ({"pretrained": "x", "steps": 0}, "steps must be at least 1"),
        ({"pretrained": "x", "mem_enabled": "maybe"}, "mem_enabled='maybe' is not valid: it must be bool"),
        ({"pretrained": "x", "mem_enabled": True, "mem_per_sample": False}, "depend on its batch"),
        ({"pretrained": "x", "mem_enabled": True, "mem_sync_inner": True}, "depend on its batch"),
        ({"pretrained": "x", "mc_num": 40}, "mc_num 40 must be a multiple of mc_batch_size 32"),
        ({"pretrained": "x", "suppress_tokens": "[a]"}, "is no list of token ids"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse_arguments(arguments)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("2e-1", float, 0.2),
        (2, float | None, 2),
        ("None", float | None, None),
        ("false", bool, False),
        (2024, str, "2024"),
        ("[up_proj;down_proj]", str, "up_proj,down_proj"),
        ("[1;2]", tuple[int, ...], (1, 2)),
        ([1, 2], tuple[int, ...] | None, (1, 2)),
        (7, tuple[int, ...], (7,)),
    ],
)
def test_values_arrive_in_their_types(value, hint, expected):
    assert typed(value, hint, "name") == expected


def request(gen_kwargs, **arguments):
    return parse_request(gen_kwargs, parse_arguments({"pretrained": "x", **arguments}))


def test_a_task_decides_over_the_arguments():
    given, ignored = request(
        {"until": "\n", "max_gen_toks": 8, "do_sample": False, "num_beams": 2}, steps=4, temperature=0.7
    )
    assert (given.stops, given.new_tokens, ignored) == (("\n",), 8, ("num_beams",))
    assert (given.config.steps, given.config.temperature, given.config.max_new_tokens) == (4, 0.0, 8)
    assert request({"steps": 2}, steps=4)[0].config.steps == 2


def test_without_a_length_there_is_a_default():
    assert request({})[0].new_tokens == DEFAULT_NEW_TOKENS
    assert request({}, max_new_tokens=5)[0].new_tokens == 5
    assert request({"until": ["a", ""]})[0].stops == ("a",)


def test_a_misspelt_generation_argument_is_refused():
    with pytest.raises(ConfigError, match=r"'temprature' is not known.*Did you mean 'temperature'"):
        request({"temprature": 1.0})


def test_the_first_stop_text_cuts():
    assert cut("one. two\nthree", ("\n", ".")) == "one"
    assert cut("one", ("x",)) == "one"
