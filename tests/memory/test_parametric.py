"""A memory leaves no trace; a memory per row is the row's alone; bad options say why."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from memdlm.errors import ConfigError, DataError
from memdlm.memory import ADAPTERS, OBJECTIVES, STRATEGIES, MemoryConfig, ParametricMemory
from memdlm.memory.sites import first_adapted_layer
from memdlm.randomness import derive
from tiny import CONFIGS, MASK, PAD, assign, families, inner_loss, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))


def memory_of(model, **options):
    options = {"inner_layer_fraction": 0.5, "prompt_mask_ratio": 0.5, "inner_lr": 1.0, **options}
    if options.get("inner_adapter_type", "lora") == "lora":
        options = {"inner_rank": 4, "inner_alpha": 8.0, **options}
    return ParametricMemory(model, MemoryConfig(**options), mask_token_id=MASK)


@every_family
@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
@torch.no_grad()
def test_leaving_the_block_restores_every_bit_also_after_an_exception(family, adapter):
    model, ids = tiny(family), random_ids(2, 9)
    before, names = model(ids).logits, list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    memory = memory_of(model, inner_adapter_type=adapter)
    with memory.write(ids, generator=rng()):
        assert not torch.allclose(model(ids).logits, before), "inside, the memory is read"
        assert list(model.state_dict()) == names
        assert [id(p) for p in model.parameters()] == parameters
    assert model(ids).logits.equal(before)
    with pytest.raises(RuntimeError, match="on purpose"), memory.write(ids, generator=rng()):
        raise RuntimeError("on purpose")
    assert model(ids).logits.equal(before)
    assert not any(module._forward_hooks for module in model.modules())


@every_family
def test_the_base_gets_no_gradient_and_keeps_its_mode(family):
    model = tiny(family)
    with memory_of(model).write(random_ids(2, 9), generator=rng()):
        assert not model.training
    assert all(p.grad is None for p in model.parameters())


@every_family
def test_the_same_generator_writes_the_same_memory(family):
    model, ids = tiny(family), random_ids(2, 9)
    logits = []
    for seed in (1, 1, 2):
        with memory_of(model).write(ids, generator=rng(seed)), torch.no_grad():
            logits.append(model(ids).logits)
    assert logits[0].equal(logits[1])
    assert not logits[0].equal(logits[2])


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("adapter", sorted(ADAPTERS))
@families("dream", "sdar", "mdlm", "small_windowed", "llada_switches")
def test_a_ragged_batch_is_written_as_one_by_one(family, strategy, objective, adapter):
    """Each row has its own memory: batch equals loop, in values, losses and what is read."""
    model = tiny(family, torch.float64)
    memory = memory_of(
        model, masking_strategy=strategy, inner_loss_type=objective, inner_adapter_type=adapter, per_sample=True
    )
    lengths, width = [9, 5, 12], 12
    ids = random_ids(3, width)
    keep = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = ids.masked_fill(~keep, PAD)
    generators = [derive("row", row) for row in range(3)]
    with memory.write(ids, attention_mask=keep, generator=generators) as written, torch.no_grad():
        together = memory.fast.named()
        logits = model(ids, keep).logits
    assert written.losses.shape[1] == 3
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, :length]
        with memory.write(alone, generator=[derive("row", row)]) as single, torch.no_grad():
            for name, value in memory.fast.named().items():
                assert_close(together[name].select(-3, row), value.select(-3, 0), rtol=0, atol=1e-8)
            assert_close(logits[row, :length], model(alone).logits[0], rtol=0, atol=1e-7)
        assert_close(written.losses[:, row], single.losses[:, 0], rtol=0, atol=1e-8)


@every_family
def test_several_rows_may_read_one_sample(family):
    model, ids = tiny(family, torch.float64), random_ids(2, 8)
    memory = memory_of(model)
    with memory.write(ids, generator=rng()), torch.no_grad():
        logits = model(ids).logits
        doubled = model(ids.repeat_interleave(3, 0)).logits
        assert_close(doubled[[1, 4]], logits)
        with pytest.raises(ConfigError, match="holds 2 samples, but the model was called with 3 rows"):
            model(random_ids(3, 8))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_the_first_step_lowers_the_loss_it_follows(seed):
    model, ids = tiny("small", torch.float64), random_ids(1, 16, seed)
    memory = memory_of(model, inner_lr=1e-3, num_inner_epochs=2, masking_strategy="no_progressive")
    with memory.write(ids, generator=rng(seed)) as written:
        assert written.losses[1, 0] <= written.losses[0, 0]


def test_inner_gradients_are_finite_differences():
    model, ids = tiny("lladamoe", torch.float64), random_ids(2, 8)
    for objective in sorted(OBJECTIVES):
        memory = memory_of(model, inner_loss_type=objective, num_inner_epochs=2, inner_grad_clip=0.0)
        with memory.write(ids, generator=rng()):
            start = {name: value.clone() for name, value in memory.fast.named().items()}
            steps = _steps(memory, ids)
            name = next(n for n in start if n.endswith("lora_B"))

            def loss(values, steps=steps, memory=memory, ids=ids):
                assign(memory.fast, values)
                out = inner_loss(memory, _denoiser(memory), steps[0])
                return out.sum()

            teacher_free = objective == "ce"
            total = loss(start)
            (gradient,) = torch.autograd.grad(total, [memory.fast.named()[name]])
            if not teacher_free:
                # Teachers read the same fast weights but count as constants: differences would move them too.
                assert gradient.isfinite().all()
                continue
            direction = torch.randn(gradient.shape, generator=rng(1), dtype=torch.float64)
            h = 1e-5
            with torch.no_grad():
                up, down = (loss({**start, name: start[name] + s * h * direction}) for s in (1, -1))
            assert_close((up - down) / (2 * h), (gradient * direction).sum(), rtol=1e-6, atol=1e-8)


def _denoiser(memory):
    from memdlm.models import ModelDenoiser

    return ModelDenoiser(memory.model)


def _steps(memory, ids):
    from memdlm.memory import Anchor, trajectory

    g = rng(3)
    anchor = Anchor(
        clean=ids,
        is_maskable=torch.ones_like(ids, dtype=torch.bool),
        is_masked=torch.rand(ids.shape, generator=g) < 0.5,
        t=torch.full((len(ids),), 0.5),
    )
    return trajectory(
        memory.strategy.path(anchor, lambda: torch.rand(ids.shape, generator=g)),
        anchor,
        mask_token_id=MASK,
        scored="student_masked",
    )


def test_a_non_finite_loss_is_skipped_and_counted_and_the_path_goes_on():
    model, ids = tiny("small"), random_ids(2, 10)
    memory = memory_of(model, num_inner_steps=3)
    calls = []

    def poison(module, inputs, out):
        calls.append(1)
        if len(calls) == 2:
            out = out.clone()
            out[0] = float("nan")
        return out

    handle = model.lm_head.register_forward_hook(poison)
    with memory.write(ids, generator=rng()) as written:
        values = memory.fast.tensors()
        assert all(value.isfinite().all() for value in values)
    handle.remove()
    assert len(calls) == 3
    assert written.num_skipped.tolist() == [1, 0]
    assert written.losses[:, 0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("length", [1, 2])
def test_nothing_to_learn_leaves_the_model_as_it_is(length):
    model, ids = tiny("lladamoe"), random_ids(2, length)
    before = model(ids).logits
    with memory_of(model).write(ids, labels=torch.full_like(ids, -100), generator=rng()) as written:
        assert written.num_tokens == 0
        assert written.losses.eq(0).all()
        assert_close(model(ids).logits, before)


def test_writing_works_where_gradients_are_off():
    model, ids = tiny("small"), random_ids(2, 9)
    with torch.no_grad(), memory_of(model).write(ids, generator=rng()) as written:
        assert not torch.is_grad_enabled()
        assert (written.grad_norms > 0).all()


def test_fast_weights_of_a_bf16_model_are_float32():
    model = tiny("lladamoe", torch.bfloat16)
    memory = memory_of(model)
    with memory.write(random_ids(2, 9), generator=rng()):
        assert {value.dtype for value in memory.fast.tensors()} == {torch.float32}
        assert model(random_ids(2, 9)).logits.dtype == torch.bfloat16


def test_a_model_in_train_mode_with_checkpointing_writes_the_same():
    ids = random_ids(2, 9)
    values = []
    for checkpointing in (False, True):
        model = tiny("lladamoe", torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        memory = memory_of(model)
        with memory.write(ids, generator=rng()):
            values.append([value.clone() for value in memory.fast.tensors()])
    assert_close(values[0], values[1])


def test_an_outer_lora_keeps_its_dropout_off_and_the_memory_sits_inside_it():
    from peft import LoraConfig, get_peft_model

    base = tiny("small", torch.float64)
    ids = random_ids(2, 9)
    with memory_of(copy.deepcopy(base)).write(ids, generator=rng()) as plain:
        pass
    model = get_peft_model(base, LoraConfig(target_modules=["down_proj", "q_proj"], lora_dropout=0.5, r=2)).eval()
    memory = memory_of(model)
    assert all("lora" not in site.path and "base_layer" not in site.path for site in memory.fast.sites)
    with memory.write(ids, generator=rng()) as wrapped:
        assert not any(module.training for module in model.modules())
    assert_close(wrapped.losses, plain.losses)


def test_two_blocks_of_one_memory_cannot_be_open():
    memory, ids = memory_of(tiny("small")), random_ids(1, 5)
    with memory.write(ids, generator=rng()):
        with pytest.raises(ConfigError, match="open already"), memory.write(ids, generator=rng()):
            pass
    with memory.write(ids, generator=rng()):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masking_strategy": "pcm"}, r"mem_masking_strategy: 'pcm' is not known.*Did you mean 'pmc'"),
        ({"inner_loss_type": "kl"}, "mem_inner_loss_type: 'kl' is not known. Possible: ce, distill"),
        ({"inner_rank": 0}, "mem_inner_rank must be at least 1, got 0"),
        ({"inner_rank": 2.5}, "mem_inner_rank must be int, got 2.5"),
        ({"inner_lr": "fast"}, "mem_inner_lr must be float, got 'fast'"),
        ({"inner_layer_fraction": 1.5}, "mem_inner_layer_fraction must be at most 1, got 1.5"),
        ({"prompt_mask_ratio": 0.0}, "mem_prompt_mask_ratio must be greater than 0"),
        ({"inner_target_modules": " , "}, "mem_inner_target_modules is empty"),
        ({"distill_temperature": 2.0}, r"mem_distill_temperature=2.0 has no effect with mem_inner_loss_type='ce'"),
        ({"inner_adapter_type": "full", "inner_rank": 8}, "mem_inner_rank=8 has no effect"),
        (
            {"masking_strategy": "no_progressive", "num_inner_steps": 3},
            "mem_num_inner_steps=3 has no effect with mem_masking_strategy='no_progressive'",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_option_says_what_is_wrong_and_what_is_possible(options, message):
    with pytest.raises(ConfigError, match=message):
        MemoryConfig(**options)


@every_family
def test_an_unknown_target_lists_the_projections_there_are(family):
    with pytest.raises(ConfigError, match=r"'up_porj'.*They have: .*up_proj.*Did you mean 'up_proj'"):
        memory_of(tiny(family), inner_target_modules="up_porj")


@pytest.mark.no_shape_checks
def test_malformed_ids_are_refused():
    memory = memory_of(tiny("small"))
    for ids, message in (
        (torch.zeros(3, dtype=torch.int64), r"shape \[B, L\]"),
        (torch.zeros(1, 3), "int64"),
        (torch.zeros(1, 0, dtype=torch.int64), "nothing to write"),
    ):
        with pytest.raises(DataError, match=message), memory.write(ids):
            pass
    with pytest.raises(DataError, match="labels have shape"), memory.write(random_ids(1, 4), random_ids(1, 5)):
        pass
    with pytest.raises(ConfigError, match="2 generators for 3 rows"):
        with memory.write(random_ids(3, 4), generator=[rng(), rng()]):
            pass


@pytest.mark.parametrize(
    ("layers", "fraction", "start"),
    [(16, 0.1, 14), (20, 0.1, 18), (10, 0.1, 9), (10, 0.8, 2), (20, 0.9, 2), (10, 1.0, 0), (3, 0.05, 2)],
)
def test_the_first_adapted_layer_is_exact(layers, fraction, start):
    assert first_adapted_layer(layers, fraction) == start


def test_moe_sites_are_the_experts_and_the_shared_one():
    paths = [site.path for site in memory_of(tiny("lladamoe"), inner_layer_fraction=0.3).fast.sites]
    assert paths == [
        *(f"model.layers.2.mlp.experts.{p}" for p in ("gate_proj", "up_proj", "down_proj")),
        *(f"model.layers.2.shared_expert.{p}" for p in ("gate_proj", "up_proj", "down_proj")),
    ]
