"""The write gate: how much of each token is written, learned through the exact outer gradient."""

import pytest
import torch
from torch.testing import assert_close

from memdlm.errors import CheckpointError, ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.memory.write_gate import WriteGate
from memdlm.randomness import derive
from tiny import CONFIGS, MASK, random_ids, rng, tiny
from tiny_foreign import FOREIGN

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
SHAPE = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 0.7, "strides": 3}
TEXT, QUESTION = random_ids(2, 9), random_ids(2, 7, seed=1)


def memory_of(model, **options):
    return ParametricMemory(model, MemoryConfig.recall(**SHAPE, **options), mask_token_id=MASK)


def opened(memory, seed=0, scale=0.2):
    """Give the gate weights: some tokens are written more than others."""
    with torch.no_grad():
        for index, parameter in enumerate(memory.learned.gate.parameters()):
            draw = torch.randn(parameter.shape, generator=derive("gate", seed, index), dtype=torch.float64)
            parameter.add_((draw * scale).to(parameter))
    return memory


def written(memory, text=TEXT, mask=None, generator=None):
    """Logits of another text under what the write left, and the write's losses."""
    with memory.write(text, attention_mask=mask, generator=generator or rng(3)) as result:
        return memory.model(QUESTION).logits, result.losses


def test_a_gate_is_one_at_first_and_between_nothing_and_double():
    gate = WriteGate(6)
    states = torch.randn(50, 6, generator=rng())
    assert torch.equal(gate(states), torch.ones(50))
    with torch.no_grad():
        gate.weight.copy_(torch.randn(6, generator=rng(1)) * 3)
    found = gate(states)
    assert found.min() == 0, "it can be shut"
    assert found.max() == 2
    assert ((found > 0) & (found < 2)).any()
    assert_close(gate(states * 7), found, msg="only the direction of a state counts")


def test_a_step_of_its_optimizer_reaches_as_far_at_any_width():
    """Adam moves every weight by its learning rate, so w . h would grow with the width."""
    reach = []
    for width in (48, 768, 4096):
        gate, state = WriteGate(width), torch.randn(1, width, generator=rng())
        optimizer = torch.optim.Adam(gate.parameters(), lr=0.01)
        (-gate(state)).sum().backward()
        optimizer.step()
        reach.append(float(gate(state) - 1))
    assert min(reach) > 0.1
    assert max(reach) < 1.5 * min(reach)


@every_family
def test_a_new_gate_changes_no_bit_of_a_write(family):
    model = tiny(family)
    with torch.no_grad():
        plain = written(memory_of(model, write_gate="none"))
        gated = written(memory_of(model))
        moved = written(opened(memory_of(model)))
    assert torch.equal(plain[0], gated[0])
    assert torch.equal(plain[1], gated[1])
    assert not torch.allclose(plain[0], moved[0])


@every_family
@pytest.mark.parametrize("order", ["exact", "exact_top"])
@pytest.mark.parametrize("steps", [1, 3])
def test_its_gradient_is_the_derivative_of_the_outer_loss(family, order, steps):
    """By central differences in float64: through one inner step, and through several that share a state's gate."""
    memory = opened(memory_of(tiny(family, torch.float64), outer_gradient=order, num_inner_steps=steps))
    with torch.no_grad():
        for index, start in enumerate(memory.learned.starts):
            start.add_(torch.randn(start.shape, generator=derive("start", index), dtype=torch.float64) * 0.2)

    def loss():
        return written(memory)[0].log_softmax(-1)[..., 5].mean()

    loss().backward()
    for index, parameter in enumerate(memory.learned.gate.parameters()):
        direction = torch.randn(parameter.shape, generator=derive("d", index), dtype=torch.float64)
        found = []
        with torch.no_grad():
            for move in (1e-6, -2e-6, 1e-6):
                parameter.add_(move * direction)
                found.append(loss())
        assert_close((parameter.grad * direction).sum(), (found[0] - found[1]) / 2e-6, rtol=1e-5, atol=1e-9)
        assert parameter.grad.abs().sum() > 0


def test_the_blocks_below_learn_through_the_gate_too():
    """With a gate, the exact gradient of what lies below is another than with the same gates as constants."""
    memory = opened(memory_of(tiny("llada", torch.float64)))
    gate, gradients = memory.learned.gate, []
    for is_constant in (False, True):
        if is_constant:
            memory.learned.gate = None
            memory.learned.gated = lambda below, is_tracked: lambda ids, places: gate(below(ids, places)).detach()
        memory.model.zero_grad()
        written(memory)[0].log_softmax(-1)[..., 5].mean().backward()
        gradients.append(memory.model.model.embed_tokens.weight.grad.clone())
    assert not torch.allclose(*gradients)


@every_family
def test_a_write_without_gradient_is_the_tracked_one(family):
    memory = opened(memory_of(tiny(family)))
    tracked = written(memory)
    with torch.no_grad():
        plain = written(memory)
    assert_close(tracked[0], plain[0], rtol=0, atol=0)
    assert_close(tracked[1], plain[1], rtol=0, atol=0)


@every_family
def test_padding_and_chunks_meet_the_same_gates(family):
    memory = opened(memory_of(tiny(family)))
    padded = torch.cat((TEXT, random_ids(2, 4, seed=8)), dim=1)
    mask = torch.arange(13)[None].expand(2, -1) < 9
    generators = [[derive("row", row) for row in range(2)] for _ in range(2)]
    with torch.no_grad():
        whole = written(memory, generator=generators[0])
        assert_close(written(memory, padded, mask, generators[1])[0], whole[0], rtol=1e-4, atol=1e-5)
        chunked = memory.with_options(chunk_length=4, chunk_update="sequential")
        # Chunk by chunk by hand: each chunk's gate sees that chunk alone.
        losses = written(chunked)[1]
        with memory.write(TEXT[:, :4], generator=rng(3)) as first:
            assert_close(losses[0], first.losses[0])
        assert losses.shape[0] == 3


def test_a_shut_gate_writes_nothing():
    memory = memory_of(tiny("llada"))
    bare = memory.model(QUESTION).logits
    with torch.no_grad():
        memory.learned.gate.bias.fill_(-20)
        logits, losses = written(memory)
    assert_close(logits, bare, msg="a start of B = 0 that nothing moves adds nothing")
    assert torch.equal(losses, torch.zeros_like(losses))


def test_a_gate_is_saved_beside_the_start_and_read_by_the_next_process(tmp_path):
    model = tiny("llada")
    memory = opened(memory_of(model))
    memory.learned.save(tmp_path)
    model.save_pretrained(tmp_path)
    other = memory_of(model)
    other.learned.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(written(other)[0], written(memory)[0])
    with pytest.raises(ConfigError, match="mem_write_gate='none'"):
        memory_of(model, write_gate="none").learned.load(tmp_path)


def test_a_folder_without_a_gate_is_not_taken_for_one_with(tmp_path):
    memory_of(tiny("llada"), write_gate="none").learned.save(tmp_path)
    with pytest.raises(ConfigError, match="mem_write_gate='learned'"):
        memory_of(tiny("llada")).learned.load(tmp_path)
    memory = memory_of(tiny("llada"))
    memory.learned.save(tmp_path)
    memory.learned.gate = WriteGate(5)
    with pytest.raises(CheckpointError, match=r"write_gate\.weight"):
        memory.learned.load(tmp_path)


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="no gradient would reach"):
        MemoryConfig(write_gate="learned")
    with pytest.raises(ConfigError, match="mem_write_gate_lr"):
        MemoryConfig(write_gate_lr=0.2)
    with pytest.raises(ConfigError, match="first block of this model is adapted"):
        ParametricMemory(tiny("llada"), MemoryConfig.recall(inner_layer_fraction=1.0), mask_token_id=MASK)
    assert MemoryConfig.recall(outer_gradient="first_order").write_gate == "none"


def test_a_foreign_network_has_gates_too():
    model = FOREIGN["bert"]().eval()
    with torch.no_grad():
        plain = written_foreign(memory_foreign(model))
        moved = written_foreign(opened(memory_foreign(model), scale=1.0))
    assert not torch.allclose(plain, moved)


def memory_foreign(model):
    options = {**SHAPE, "inner_target_modules": "dense"}
    return ParametricMemory(model, MemoryConfig.recall(**options), mask_token_id=MASK)


def written_foreign(memory):
    with memory.write(TEXT, generator=rng(3)):
        return memory.model(QUESTION).logits
