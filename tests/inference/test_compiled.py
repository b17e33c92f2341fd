"""Compiled steps give the tokens of plain ones, with a memory and after it."""

from functools import partial

import pytest
import torch
from test_exactness import as_sure

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError
from memdlm.inference import GenerationConfig, compiled, generate, stream
from memdlm.inference.config import COMPILE_MODES
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import BlockCausal
from tiny import V, rng, tiny

WORDS = build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])
PROMPTS = [torch.randint(5, V, (n,), generator=rng(n)) for n in (19, 8)]


def memory_of(model, fraction=0.5):
    config = MemoryConfig(inner_layer_fraction=fraction, inner_rank=4, inner_alpha=16.0, inner_lr=1.0)
    return ParametricMemory(model, config, mask_token_id=WORDS.mask_token_id)


def compare(model, options, backend, pattern=None):
    options = {"max_new_tokens": 10, "block_size": 4, "eos_early_stop": False} | options
    plain, fast = GenerationConfig(**options), GenerationConfig(**options, compile="default")
    memory, seen = memory_of(model), []
    # Without, with and again without: what was compiled for one must not answer for the other.
    for open_memory in (None, memory, None, memory):
        expected, found = (
            list(stream(model, WORDS, PROMPTS, config, memory=open_memory, attention_pattern=pattern))
            for config in (plain, fast)
        )
        as_sure(found, expected)
        seen.append(expected[-1].ids.tolist())
    assert seen[0] != seen[1], "the memory changes nothing, so this would not notice a stale graph"
    assert backend.compiled


class Counting:
    """torch.compile, counting what it compiled, and the inputs whose address is said to stay."""

    def __init__(self, inner):
        self.inner, self.compiled, self.modes, self.static = inner, 0, [], []

    def __call__(self, graph, inputs, **_):
        self.compiled += 1
        given = [node for node in graph.graph.nodes if node.op == "placeholder" and "cache_layers" in node.name]
        kinds = [node.meta["tensor_dict"].get("_dynamo_static_input_type") for node in given]
        self.static.append(kinds.count("unguarded") if kinds.count(None) == 0 else None)
        return graph.forward if self.inner is None else torch._inductor.compile(graph, inputs)


@pytest.fixture
def backend(monkeypatch, request):
    torch._dynamo.reset()
    counting = Counting(getattr(request, "param", None))
    compile_ = torch.compile

    def watched(f, mode):
        # A backend of one's own takes no mode, so what was asked for is noted instead.
        counting.modes.append(mode)
        return compile_(f, backend=counting)

    monkeypatch.setattr(compiled.torch, "compile", watched)
    yield counting
    torch._dynamo.reset()


def test_tokens_are_the_same(backend):
    compare(tiny("llada", torch.float64), {}, backend)


def test_a_step_is_compiled_once_for_all_blocks(backend):
    model, options = tiny("llada", torch.float64), {"max_new_tokens": 24, "block_size": 4, "eos_early_stop": False}
    found = [
        generate(model, WORDS, PROMPTS[:1], GenerationConfig(**options, compile=mode), attention_pattern=BlockCausal(4))
        for mode in (None, "default", "default")
    ]
    assert found[0].sequences[0].equal(found[1].sequences[0])
    assert found[0].sequences[0].equal(found[2].sequences[0])
    # One for the steps inside a block, one for those that take the finished block before along.
    assert backend.compiled == 2
    # Keys and values of each layer: a CUDA graph that fills them needs to know that they stay where they are.
    assert backend.static == [2 * len(model.model.layers)] * 2


def test_torch_is_told_the_mode_and_keeps_what_it_compiled_in_another(backend):
    model, options = tiny("llada", torch.float64), {"max_new_tokens": 8, "block_size": 4, "eos_early_stop": False}
    for mode in (*COMPILE_MODES, *COMPILE_MODES):
        generate(model, WORDS, PROMPTS[:1], GenerationConfig(**options, compile=mode), attention_pattern=BlockCausal(4))
    assert backend.modes == list(COMPILE_MODES)


def compare_in_float32(family):
    options = {"max_new_tokens": 24, "block_size": 8, "eos_early_stop": False}
    plain, fast = (
        generate(tiny(family), WORDS, PROMPTS[:1], GenerationConfig(**options, compile=mode))
        for mode in (None, "default")
    )
    assert plain.sequences[0].equal(fast.sequences[0])


@pytest.mark.parametrize(("family", "graphs"), [("lladamoe", 1), ("llada2", 2)])
def test_grouped_products_do_not_break_the_graph(family, graphs, backend):
    """As many graphs as a dense network has; in float64, where a loop stands in for them, there are more."""
    compare_in_float32(family)
    assert backend.compiled == graphs


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor"], indirect=True)
def test_grouped_products_go_through_inductor(backend):
    compare_in_float32("lladamoe")
    assert backend.compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llada2", {"threshold": 0.3}),
        ("llada2", {"threshold": 0.3, "editing_threshold": 0.2}),
        ("llada2", {"cache": "none"}),
        ("lladamoe", {"cfg_scale": 0.5}),
        ("llada", {"cache": "approximate", "cache_refresh": 3}),
    ],
    ids=str,
)
def test_tokens_are_the_same_in_every_family(family, options, backend):
    compare(tiny(family, torch.float64), options, backend)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [BlockCausal(4), None], ids=str)
@pytest.mark.parametrize("backend", ["inductor"], indirect=True)
def test_tokens_are_the_same_through_inductor(pattern, backend):
    compare(tiny("llada", torch.float64), {}, backend, pattern)


def test_what_cannot_be_compiled_is_refused():
    model = tiny("llada2", torch.float64)
    run = partial(generate, model, WORDS, PROMPTS)
    with pytest.raises(ConfigError, match="every block has fast weights"):
        run(GenerationConfig(max_new_tokens=4, compile="default"), memory=memory_of(model, 1.0))
    with pytest.raises(ConfigError, match="right_shift_logits"):
        run(GenerationConfig(max_new_tokens=4, compile="default", right_shift_logits=True))
    with pytest.raises(ConfigError, match="compile"):
        GenerationConfig(compile="fast")
