"""Options of the published samplers: every name is taken with its meaning, or its refusal names what there is."""

import dataclasses

import pytest
from test_exactness import network, prompts_of, words

from memdlm.cli.decoding import decoding_parser, parse
from memdlm.cli.main import main
from memdlm.diffusion import Above
from memdlm.errors import ConfigError
from memdlm.evaluation.harness_options import option_names, parse_arguments, parse_request
from memdlm.inference import Decoder, GenerationConfig, generate
from memdlm.inference.canvas import reveal_for

MDLM = (
    *("max_new_tokens", "max_length", "block_size", "steps", "temperature", "remasking", "stochastic_transfer"),
    *("cfg_scale", "cfg_keep_tokens", "suppress_tokens", "begin_suppress_tokens", "right_shift_logits"),
)
LLADA2 = (
    *("max_new_tokens", "block_size", "steps_per_block", "temperature", "top_p", "top_k", "threshold"),
    *("minimal_topk", "eos_early_stop"),
)
LLADA21 = ("editing_threshold", "max_post_steps", "num_to_transfer")
ALL = sorted({*MDLM, *LLADA2, *LLADA21})


@pytest.mark.parametrize("name", ALL)
def test_every_published_option_is_one_of_ours(name):
    assert name in {field.name for field in dataclasses.fields(GenerationConfig)}
    assert name in option_names()
    flags = {flag for action in decoding_parser("generate", "")._actions for flag in action.option_strings}
    assert f"--{name}" in flags


@pytest.mark.parametrize("name", ["return_dict", "gen_length"])
def test_others_are_refused_with_what_there_is(name, capsys):
    with pytest.raises(ConfigError, match=rf"'{name}' is not known. Possible: .*max_new_tokens"):
        parse_arguments({"pretrained": "x", name: "1"})
    assert main(["generate", "--model", "x", f"--{name}", "1", "text"]) == 2
    assert f"option '--{name}' is not known" in capsys.readouterr().err


def steps_of(new, **options):
    decoder = Decoder(network("llada2"), words(), GenerationConfig(max_new_tokens=new, **options))
    reveal = reveal_for(decoder.prepare(prompts_of([3])).canvas, decoder.options)
    assert isinstance(reveal, Above)
    return reveal.steps


@pytest.mark.parametrize(
    ("new", "options", "steps"),
    [
        (16, {"steps_per_block": 8}, 8),
        (16, {"steps_per_block": 8, "minimal_topk": 1}, 8),
        (16, {"steps_per_block": 8, "minimal_topk": 3}, 5),
        (16, {"steps_per_block": 4, "minimal_topk": 3}, 4),
        (7, {"steps_per_block": 32, "minimal_topk": 2}, 3),
        (7, {"steps_per_block": 32, "minimal_topk": 7}, 1),
        (7, {"steps_per_block": 32, "minimal_topk": None}, 7),
    ],
    ids=str,
)
def test_minimal_topk_is_the_published_bound_on_the_steps_of_a_block(new, options, steps):
    """min(steps_per_block, max_new_tokens // minimal_topk)."""
    assert steps_of(new, block_size=8, threshold=0.95, **options) == steps


def test_minimal_topk_commits_more_at_a_time():
    options = {"max_new_tokens": 16, "block_size": 8, "threshold": 1.0, "suppress_tokens": (0,)}
    passes = [
        generate(network("llada2"), words(), prompts_of([8]), GenerationConfig(**options, minimal_topk=fewest))
        for fewest in (1, 2, 4)
    ]
    # Two blocks of 8 in at most 16, 8 and 4 steps each; a block takes no more than it has tokens.
    assert [each.num_forward_passes for each in passes] == [16, 16, 8]
    assert all(each.unresolved == 0 for each in passes)


def test_minimal_topk_is_taken_from_flags_and_evaluation_arguments():
    argv = ["--model", "x", "--threshold", "0.9", "--minimal_topk", "3", "text"]
    parser = decoding_parser("generate", "")
    parser.add_argument("prompt", nargs="*")
    _, config, *_ = parse(parser, argv)
    assert config.minimal_topk == 3
    settings = parse_arguments({"pretrained": "x", "threshold": "0.9", "minimal_topk": "3"})
    assert settings.generation["minimal_topk"] == 3
    request, _ = parse_request({"minimal_topk": 2}, settings)
    assert request.config.minimal_topk == 2


@pytest.mark.parametrize("beside", [{"num_to_transfer": 2}, {"editing_threshold": 0.5}, {"factor": 1.0}], ids=str)
def test_minimal_topk_is_refused_where_nothing_bounds_the_steps(beside):
    with pytest.raises(ConfigError, match=r"minimal_topk has no effect with .*leave it out"):
        GenerationConfig(minimal_topk=2, **({"threshold": 0.9} if "factor" not in beside else {}), **beside)


def test_minimal_topk_is_refused_where_it_cannot_take_effect():
    with pytest.raises(ConfigError, match="minimal_topk=2 has no effect on this model without a threshold"):
        generate(network("llada"), words(), prompts_of([3]), GenerationConfig(max_new_tokens=4, minimal_topk=2))
    with pytest.raises(ConfigError, match="minimal_topk=5 is more than the 4 tokens asked for"):
        generate(network("llada2"), words(), prompts_of([3]), GenerationConfig(max_new_tokens=4, minimal_topk=5))
    with pytest.raises(ConfigError, match="minimal_topk must be at least 1, got 0"):
        GenerationConfig(threshold=0.5, minimal_topk=0)
