"""A network that runs one block several times (ALBERT) has fast weights per pass, and is otherwise left as it is."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AlbertConfig, AlbertForMaskedLM, BertConfig, BertForMaskedLM

from memdlm.errors import ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.memory.files.combining import fold
from memdlm.models.blocks.structure import blocks_of
from tiny import MASK, V, random_ids
from tiny_foreign import BERT as FOREIGN_BERT

SIZES = {"vocab_size": V, "hidden_size": 32, "embedding_size": 16, "intermediate_size": 48, "num_attention_heads": 4}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def albert(**more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AlbertConfig(**SIZES, **{"num_hidden_layers": 6, "initializer_range": 0.3, **more})
        return AlbertForMaskedLM(config).double().eval()


def memory_of(model, fraction=0.5):
    config = MemoryConfig(inner_rank=4, inner_alpha=8.0, inner_layer_fraction=fraction, inner_lr=0.5)
    return ParametricMemory(model, config, mask_token_id=MASK)


def test_every_pass_has_a_block_and_fast_weights_of_its_own():
    memory = memory_of(albert())
    assert [site.path for site in memory.fast.sites] == [
        f"albert.encoder.albert_layer_groups.{number}.albert_layers.0.{name}"
        for number in (3, 4, 5)
        for name in ("ffn", "ffn_output")
    ]


@pytest.mark.parametrize("groups", [1, 2])
def test_passes_compute_what_as_many_blocks_with_equal_weights_compute(groups):
    """The same write as on an ALBERT that shares nothing and whose blocks hold the same numbers."""
    shared, apart, ids = albert(num_hidden_groups=groups), albert(num_hidden_groups=6), random_ids(2, 9)
    state = shared.state_dict()
    for number in range(6):
        source = f"albert_layer_groups.{number * groups // 6}."
        for name in [name for name in state if source in name]:
            state[name.replace(source, f"albert_layer_groups.{number}.")] = shared.state_dict()[name]
    apart.load_state_dict(state)
    results = []
    for model in (shared, apart):
        memory = memory_of(model)
        with memory.write(ids) as written, torch.no_grad():
            results.append([written.losses, *memory.fast.tensors(), model(ids).logits])
    assert_close(results[0], results[1], **CLOSE)


def test_the_network_is_the_same_inside_a_block_and_after_it():
    model, ids = albert(), random_ids(2, 9)
    encoder, before = model.albert.encoder, model(ids).logits
    names, config, state = [name for name, _ in model.named_modules()], encoder.config, set(encoder.__dict__)
    with memory_of(model).write(ids):
        assert [name for name, _ in model.named_modules()] == names
        assert set(model.state_dict()) == set(albert().state_dict())
        assert not model(ids).logits.equal(before)
        for copied in (copy.deepcopy(model), copy.copy(model)):
            assert copied(ids).logits.equal(before)
        # A change of mode inside the block reaches the passes.
        model.train()
        assert all(block.training for block in blocks_of(model)) or model(ids) is not None
        model.eval()
    assert encoder.config is config
    assert set(encoder.__dict__) == state
    assert model(ids).logits.equal(before)


def test_what_changes_between_two_blocks_is_seen():
    model, ids = albert(), random_ids(1, 9)
    memory = memory_of(model)
    with memory.write(ids) as written:
        first = written.losses
    with torch.no_grad():
        layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
        layer.ffn.weight = torch.nn.Parameter(layer.ffn.weight * 1.5)
    with memory.write(ids) as written:
        assert not torch.equal(written.losses, first)
    calls = []
    layer.ffn.register_forward_hook(lambda *_: calls.append(1))
    with memory.write(ids), torch.no_grad():
        calls.clear()
        model(ids)
    assert len(calls) == 6


def test_memories_of_one_network_exclude_each_other():
    model, ids = albert(), random_ids(1, 9)
    first, second = memory_of(model), memory_of(model)
    with first.write(ids), pytest.raises(ConfigError, match="open already"), second.write(ids):
        pass


def test_a_memory_of_passes_is_not_folded_into_the_weights_that_they_share():
    model = albert()
    memory = memory_of(model)
    with memory.write(random_ids(1, 9)):
        saved = memory.export()
    with pytest.raises(ConfigError, match="several times"):
        fold(saved, memory.fast)


def test_an_unknown_loop_is_refused():
    model = BertForMaskedLM(BertConfig(**FOREIGN_BERT))
    model.config.num_hidden_layers = 12
    with pytest.raises(ConfigError, match="12 layers but 2 blocks"):
        memory_of(model)
