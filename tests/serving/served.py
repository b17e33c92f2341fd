"""What the tests of serving share: tiny models with memories of every kind, and a request's answer when it is alone."""

from functools import cache, lru_cache

import torch

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.inference import Decoder, GenerationConfig, generate
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.randomness import derive
from memdlm.serving import Engine, GenerationRequest, MemoriesInProcess
from tiny import V, rng, tiny

FIRST_WORD = 5
COMMON = {"inner_alpha": 16.0, "inner_lr": 1.0}
CONFIGS = {
    "low": MemoryConfig(inner_layer_fraction=0.3, inner_rank=2, inner_target_modules="down_proj", **COMMON),
    "high": MemoryConfig(inner_layer_fraction=0.6, inner_rank=5, inner_target_modules="up_proj,o_proj", **COMMON),
    "full": MemoryConfig(inner_layer_fraction=0.4, inner_adapter_type="full", inner_lr=1.0),
    "again": MemoryConfig(inner_layer_fraction=0.3, inner_rank=2, inner_target_modules="down_proj", **COMMON),
}
"""Memories that differ in rank, in targets and in kind; two have the same options."""


@lru_cache
def words(end=None):
    tokenizer = build_word_tokenizer([f"w{index:02}" for index in range(V - FIRST_WORD)])
    if end is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


@lru_cache
def network(family):
    return tiny(family, torch.float64)


def text_ids(seed, length):
    return torch.randint(FIRST_WORD, V, (length,), generator=rng(seed))


def memory_of(family, config):
    return ParametricMemory(network(family), config, mask_token_id=words().mask_token_id, tokenizer=words())


@lru_cache
def saved(family, name):
    """A memory, written from a text of its own."""
    memory = memory_of(family, CONFIGS[name])
    with memory.write(text_ids(sorted(CONFIGS).index(name), 40)[None]):
        return memory.export()


def store(family):
    kept = MemoriesInProcess()
    for name in CONFIGS:
        kept.keep(name, saved(family, name))
    return kept


def engine(family, *, end=None, **options):
    options = {"slots": 3, "store": store(family)} | options
    return Engine(Decoder(network(family), words(end)), **options)


def request(seed=0, length=6, memory=None, stop=(), **config):
    config = GenerationConfig(**{"max_new_tokens": 6} | config)
    return GenerationRequest(prompt=text_ids(seed, length).tolist(), config=config, memory=memory, seed=seed, stop=stop)


def _decoded(family, prompt, config, memory, seed, end):
    draws = [derive("memdlm.generate", seed)]
    arguments = (network(family), words(end), [torch.tensor(prompt)], config)
    if memory is None:
        return generate(*arguments, generator=draws)
    kept = saved(family, memory) if isinstance(memory, str) else memory
    with ParametricMemory(
        network(family), kept.reading_config, mask_token_id=words().mask_token_id, tokenizer=words()
    ).recall(kept):
        return generate(*arguments, generator=draws)


_known = cache(_decoded)


def alone(family, asked, end=None):
    """What `generate` gives for a request by itself, with a memory of the store, or one that is given."""
    decoded = _known if asked.memory is None or isinstance(asked.memory, str) else _decoded
    return decoded(family, tuple(asked.prompt), asked.config, asked.memory, asked.seed, end)


def run(engine, most=2000):
    """Do all steps; returns how many."""
    for count in range(1, most):
        if not engine.step():
            return count
    raise AssertionError("the engine does not come to an end")


def check(family, asked, ticket, end=None):
    """The ticket's answer is that of the request alone; what was settled on the way is a beginning of it."""
    found, expected = ticket.result(0), alone(family, asked, end)
    assert found.generation.sequences[0].tolist() == expected.sequences[0].tolist()
    assert found.text == expected.texts[0]
    assert list(found.ids) == expected.sequences[0].tolist()[len(asked.prompt) :]
    assert found.generation.num_forward_passes == expected.num_forward_passes
    assert found.generation.unresolved == 0
    settled = [token for event in ticket.events(0) for token in getattr(event, "ids", ())]
    assert settled == list(found.ids)
