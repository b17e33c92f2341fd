"""A write that is done gradient by gradient writes what a write in one go does, and leaves the model free meanwhile."""

import pytest
import torch

from memdlm.errors import ConfigError, NotFiniteError
from memdlm.memory import STRATEGIES, MemoryConfig, ParametricMemory
from tiny import MASK, random_ids, rng, tiny

ALL = {"inner_layer_fraction": 0.5, "inner_rank": 3, "inner_lr": 1.0}
CASES = {
    "chunks": {"chunk_length": 8, "chunk_overlap": 2},
    "accumulated chunks": {"chunk_length": 8, "chunk_update": "accumulated", "num_inner_epochs": 2},
    "learned": {"learn_start": True, "learn_lr": True, "chunk_length": 8, "chunk_update": "accumulated"},
    "gate": {"learn_start": True, "write_gate": "learned", "outer_gradient": "exact"},
    "one memory": {"per_sample": False},
    "sampled": {"inner_score_fraction": 0.5, "num_inner_epochs": 2},
    "dropout": {"inner_dropout": 0.2},
    "full": {"inner_adapter_type": "full", "inner_rank": 32},
}
CASES |= {f"strategy {name}": {"masking_strategy": name} for name in STRATEGIES}


def memory_of(model, **options):
    return ParametricMemory(model, MemoryConfig(**(ALL | options)), mask_token_id=MASK)


def generators(rows):
    return [rng(index) for index in range(rows)]


@pytest.mark.parametrize(("case", "family"), [*((case, "llada2") for case in CASES), ("chunks", "llada")])
def test_the_same_is_written(case, family):
    model, ids = tiny(family), random_ids(2, 20)
    memory = memory_of(model, **CASES[case])
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    with memory.write(ids, None, mask, generators(2)):
        expected = [tensor.detach().clone() for tensor in memory.fast.tensors()]
    assert not memory.fast.num_samples
    plain = model(input_ids=ids).logits
    other = memory_of(model, inner_layer_fraction=0.9)
    writing, taken = memory.writing(ids, None, mask, generators(2)), 0
    while not writing.step():
        taken += 1
        assert writing.done == taken
        assert model(input_ids=ids).logits.equal(plain), "between two gradients the model is bare"
        with other.write(ids[:1, :6]):  # and free
            assert not model(input_ids=ids).logits.equal(plain)
    assert taken + 1 == writing.total == writing.done
    assert all(a.equal(b) for a, b in zip(memory.fast.tensors(), expected, strict=True))
    found = writing.export(0)
    writing.close()
    with memory.write(ids, None, mask, generators(2)):
        saved = memory.export(0)
    assert found.provenance == saved.provenance
    assert all(pair[side].equal(saved.pairs[name][side]) for name, pair in found.pairs.items() for side in ("A", "B"))
    assert not any(module._forward_hooks for module in model.modules())


def test_one_memory_does_one_write_at_a_time():
    memory, ids = memory_of(tiny("llada")), random_ids(1, 9)
    writing = memory.writing(ids)
    with pytest.raises(ConfigError, match="being written"):
        memory.writing(ids)
    with pytest.raises(ConfigError, match="not done"):
        writing.export()
    writing.close()
    memory.writing(ids).close()
    with memory.write(ids), pytest.raises(ConfigError, match="being written"):
        memory.writing(ids)


def test_a_write_that_is_not_finite_is_refused_at_its_end():
    memory = memory_of(tiny("llada"), inner_lr=1e6, inner_alpha=1e6, inner_grad_clip=0.0)
    writing = memory.writing(random_ids(1, 24))
    assert not writing.step()
    with pytest.raises(NotFiniteError):
        writing.step()
    with pytest.raises(ConfigError, match="not done"):
        writing.export()
    writing.close()
