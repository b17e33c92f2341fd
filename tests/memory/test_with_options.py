"""A memory with other options has the same learned start; what the start was learned with cannot be changed."""

import pytest
import torch
from torch.testing import assert_close

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.memory.learned import saved_config
from memdlm.models.blocks.masks import SlidingWindow
from memdlm.randomness import derive
from tiny import CONFIGS, MASK, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
SHAPE = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 0.7, "strides": 3}
CHUNKS = {"chunk_length": 8, "chunk_overlap": 4}
TEXT, QUESTION = random_ids(2, 20), random_ids(2, 8, seed=1)


def learned(model, **arguments):
    """A memory whose start, rates and gate are not those that it began with."""
    memory = ParametricMemory(model, MemoryConfig.recall(**SHAPE), mask_token_id=MASK, **arguments)
    with torch.no_grad():
        for index, parameter in enumerate(memory.learned.parameters()):
            drawn = torch.randn(parameter.shape, generator=derive("with options", index), dtype=torch.float64)
            parameter.add_((drawn * 0.2).to(parameter))
    return memory


def answers(memory):
    with torch.no_grad(), memory.write(TEXT, generator=rng(3)):
        return memory.model(QUESTION).logits


@every_family
def test_other_options_keep_what_was_learned(family, tmp_path):
    memory = learned(tiny(family))
    whole = answers(memory)
    chunked = answers(memory.with_options(**CHUNKS))
    assert not torch.equal(chunked, whole), "the option takes effect"
    assert torch.equal(answers(memory), whole), "the first memory is as it was"

    memory.learned.save(tmp_path)
    read = ParametricMemory(memory.model, MemoryConfig.recall(**SHAPE, **CHUNKS), mask_token_id=MASK)
    assert not torch.equal(answers(read), chunked), "a start of its own writes something else"
    read.learned.load(tmp_path)
    assert_close(answers(read), chunked, rtol=0, atol=0)


def test_it_reads_as_the_first_one_does():
    tokenizer = build_word_tokenizer(["one", "two"])
    memory = learned(tiny("llada"), attention_pattern=SlidingWindow(2), right_shift_logits=True, tokenizer=tokenizer)
    assert torch.equal(answers(memory.with_options()), answers(memory))
    other = memory.with_options(**CHUNKS)
    assert other.attention_pattern == SlidingWindow(2)
    assert other.right_shift_logits
    with memory.write(TEXT[:1]), pytest.raises(ConfigError, match="open"), other.write(TEXT[:1]):
        pass
    with memory.write(TEXT[:1]):
        kept = memory.export()
    assert kept.fingerprint.tokenizer is not None
    other.check_fits(kept)


def test_what_trains_one_trains_the_other_and_each_saves_its_own_options(tmp_path):
    memory = learned(tiny("llada"))
    other = memory.with_options(**CHUNKS, learned_start_lr=0.5)
    with torch.no_grad():
        other.learned.starts[0].add_(1.0)
    assert torch.equal(memory.learned.starts[0], other.learned.starts[0])
    assert next(group["lr"] for group in other.learned.groups()) == 0.5
    assert next(group["lr"] for group in memory.learned.groups()) == 3e-3
    other.learned.save(tmp_path)
    assert saved_config(tmp_path) == other.config


def test_it_needs_no_folder_of_the_model(tmp_path):
    memory = learned(tiny("llada"))
    memory.model.memory_folder = str(tmp_path / "gone")
    assert torch.equal(answers(memory.with_options()), answers(memory))


def test_what_another_model_learned_is_refused():
    memory = learned(tiny("llada"))
    for wrong, message in ((memory, "learned"), (memory.learned, "learned belongs to another model: it has")):
        with pytest.raises(ConfigError, match=message):
            ParametricMemory(tiny("lladamoe"), memory.config, mask_token_id=MASK, learned=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_rank": 8}, "mem_inner_rank=8, but the start and rates of this memory were learned with 4"),
        ({"inner_lr": 1.0}, "mem_inner_lr=1.0, but"),
        ({"learn_start": False}, "mem_learn_start=False, but"),
        ({"chunk_lenght": 8}, "chunk_length"),
        ({"chunk_overlap": 4}, "without mem_chunk_length"),
    ],
)
def test_what_cannot_be_changed_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        learned(tiny("llada")).with_options(**options)


def test_without_a_learned_start_anything_can_be_changed():
    memory = ParametricMemory(tiny("llada"), MemoryConfig.paper(), mask_token_id=MASK)
    assert memory.with_options(inner_rank=2).config.inner_rank == 2
    plain = learned(tiny("llada")).with_options(
        learn_start=False, learn_lr=False, write_gate="none", inner_rank=2, learned_rates_lr=0.03
    )
    assert plain.learned is None
