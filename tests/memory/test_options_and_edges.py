"""Every option takes effect or is refused; odd inputs are defined; what training wraps around changes nothing."""

import dataclasses
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from memdlm.diffusion import Linear, normalise, positions_of
from memdlm.diffusion.losses import WEIGHTINGS
from memdlm.errors import ConfigError
from memdlm.memory import (
    OBJECTIVES,
    Anchor,
    FastWeightsConfig,
    MemoryConfig,
    OuterConfig,
    ParametricMemory,
    WriteConfig,
    trajectory,
)
from memdlm.models import ModelDenoiser
from memdlm.options import names_of
from memdlm.randomness import derive
from memdlm.training import Batch, score
from rank_worker import batch_of
from tiny import CONFIGS, MASK, PAD, assign, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))

USERS_KNOW = {
    "num_inner_steps": 2,
    "num_inner_epochs": 1,
    "masking_strategy": "pmc",
    "prompt_mask_ratio": 0.2,
    "progressive_consistent_start_scale": 1.5,
    "inner_lr": 0.1,
    "inner_grad_clip": 1.0,
    "inner_rank": 32,
    "inner_alpha": 64.0,
    "inner_dropout": 0.0,
    "inner_layer_fraction": 0.1,
    "inner_target_modules": "gate_proj,up_proj,down_proj",
    "inner_adapter_type": "lora",
    "inner_loss_type": "ce",
    "distill_temperature": 1.0,
    "distill_hidden_type": "mse",
    "inner_loss_mask_mode": "student_masked",
    "pad_unmask_mode": "none",
    "inner_gradient_checkpointing": True,
    # Unset: what training and evaluation each take.
    "sync_inner": None,
    "loss_weight_type": None,
    "loss_norm_type": None,
}


def memory_of(model, **options):
    options = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 1.0, **options}
    return ParametricMemory(model, MemoryConfig(**options), mask_token_id=MASK)


def test_the_options_keep_the_names_and_defaults_that_users_know():
    fields = {field.name: field.default for field in dataclasses.fields(MemoryConfig)}
    assert USERS_KNOW.items() <= fields.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_dropout": 1.0}, "mem_inner_dropout must be less than 1, got 1.0"),
        ({"inner_dropout": -0.1}, "mem_inner_dropout must be at least 0"),
        ({"inner_dropout": 0.1, "inner_adapter_type": "full"}, "mem_inner_dropout=0.1 has no effect.*'full'"),
        ({"inner_clip_scope": "global", "inner_grad_clip": 0.0}, "mem_inner_clip_scope='global' has no effect"),
        ({"inner_alpha": 8.0, "inner_adapter_type": "full"}, "mem_inner_alpha=8.0 has no effect"),
        ({"distill_hidden_type": "cosine"}, "mem_distill_hidden_type='cosine' has no effect.*read by distill_hidden"),
        (
            {"distill_temperature": 2.0, "inner_loss_type": "distill_hidden"},
            "mem_distill_temperature=2.0 has no effect",
        ),
        ({"progressive_consistent_start_scale": 2.0, "masking_strategy": "no_progressive"}, "has no effect"),
        ({"inner_gradient_checkpointing": 1}, "mem_inner_gradient_checkpointing must be bool, got 1"),
        ({"sync_inner": True, "per_sample": True}, "mem_sync_inner=True has no effect with mem_per_sample=True"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_take_effect_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MemoryConfig(**options)


def test_every_option_belongs_to_one_part_that_stands_alone():
    parts = (FastWeightsConfig, WriteConfig, OuterConfig)
    assert [name for part in parts for name in names_of(part)] == names_of(MemoryConfig)
    assert all(isinstance(MemoryConfig(), part) and part() for part in parts)
    with pytest.raises(ConfigError, match=r"mem_inner_alpha=8\.0 has no effect"):
        FastWeightsConfig(inner_alpha=8.0, inner_adapter_type="full")
    with pytest.raises(ConfigError, match="mem_inner_clip_scope='global' has no effect"):
        WriteConfig(inner_clip_scope="global", inner_grad_clip=0.0)
    with pytest.raises(ConfigError, match="got '1,1'"):
        OuterConfig(batch_mix="1,1", batch_reach=4)


def written(model, ids, memory, *, mask=None, generator=None, **arguments):
    with memory.write(ids, attention_mask=mask, generator=generator or rng(), **arguments) as record:
        return [record.losses, record.grad_norms, *(value.clone() for value in memory.fast.tensors())]


@every_family
def test_recomputing_the_adapted_blocks_changes_nothing_and_no_mode(family):
    model, ids = tiny(family, torch.float64), random_ids(2, 9)
    model.model.layers[0].train()  # an unusual mixture of modes must survive too
    modes = [module.training for module in model.modules()]
    values = [
        written(model, ids, memory_of(model, inner_gradient_checkpointing=on, inner_dropout=0.3))
        for on in (True, False)
    ]
    assert_close(values[0], values[1], rtol=1e-12, atol=1e-14)
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["lladamoe", "llada2", "small"])
@pytest.mark.parametrize(
    "options",
    [
        {"inner_loss_type": "ce"},
        {"inner_loss_type": "distill"},
        {"masking_strategy": "strided", "strides": 4, "num_inner_steps": 1},
        {"masking_strategy": "strided", "strides": 3, "num_inner_steps": 2},
    ],
    ids=["ce", "distill", "four views", "views by step"],
)
def test_dropout_drops_while_writing_only_and_each_row_for_itself(family, options):
    model = tiny(family, torch.float64)
    memory = memory_of(model, inner_dropout=0.5, per_sample=True, **options)
    lengths, width = [9, 5, 12], 12
    keep = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = random_ids(3, width).masked_fill(~keep, PAD)
    together = written(model, ids, memory, mask=keep, generator=[derive("row", row) for row in range(3)])
    for row, length in enumerate(lengths):
        alone = written(model, ids[row : row + 1, :length], memory, generator=[derive("row", row)])
        assert_close(together[0][:, row], alone[0][:, 0], rtol=0, atol=1e-9)
        for several, one in zip(together[2:], alone[2:], strict=True):
            assert_close(several.select(-3, row), one.select(-3, 0), rtol=0, atol=1e-9)
    undropped = written(
        model,
        ids,
        memory_of(model, per_sample=True, **options),
        mask=keep,
        generator=[derive("row", row) for row in range(3)],
    )
    assert not together[3].equal(undropped[3])
    with memory.write(ids, attention_mask=keep, generator=rng()), torch.no_grad():
        assert model(ids, keep).logits.equal(model(ids, keep).logits), "reading drops nothing"


@every_family
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS))
def test_a_view_that_hides_nothing_of_a_text_costs_nothing(family, per_sample, weighting):
    """Texts shorter than the stride: their share of masks in a view is 0, and so is what it adds to the loss."""
    model, ids = tiny(family, torch.float64), random_ids(2, 9)
    keep = torch.arange(9) < torch.tensor([9, 2])[:, None]
    strided = {"masking_strategy": "strided", "strides": 4, "num_inner_steps": 4, "per_sample": per_sample}
    memory = memory_of(model, **strided, loss_weight_type=weighting, loss_norm_type="batch")
    generator = [derive("row", row) for row in range(2)]
    losses, *_ = together = written(model, ids.masked_fill(~keep, PAD), memory, mask=keep, generator=generator)
    assert all(value.isfinite().all() for value in together)
    if per_sample:
        assert ((losses[:, 1] == 0).sum(), (losses[:, 0] == 0).sum()) == (2, 0)


def test_dropout_keeps_the_share_it_should():
    from memdlm.memory.dropout import InputDropout

    factors = InputDropout(0.25, torch.tensor([1, 2])).factors("site", 500, torch.zeros(1, 40), rows=2)
    assert factors.shape == (2, 500, 40)
    assert_close(factors.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs(factors.eq(0).double().mean() - 0.25) < 0.01
    parts = [factors[0, :250], factors[0, 250:], factors[1, :250], factors[1, 250:]]
    assert not any(one.equal(other) for one, other in itertools.combinations(parts, 2))


@every_family
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_inner_gradients_are_finite_differences_of_the_objective_with_its_target_held(family, objective, adapter):
    """Teachers read the same fast weights but are constants: the differences hold them where they were."""
    model, ids = tiny(family, torch.float64), random_ids(2, 8)
    options = {"inner_rank": 4, "inner_alpha": 8.0} if adapter == "lora" else {}
    config = MemoryConfig(
        inner_loss_type=objective, inner_adapter_type=adapter, inner_layer_fraction=0.5, inner_lr=0.3, **options
    )
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    with memory.write(ids, generator=rng()):
        start = {name: value.clone() for name, value in memory.fast.named().items()}
        step = state_of(memory, ids)
        positions, denoise = positions_of(step.is_scored), ModelDenoiser(memory.model)
        target = memory.loss.objective.target(denoise, step, positions).detach()

        def loss(values):
            assign(memory.fast, values)
            found = memory.loss.objective.values(denoise, step, positions, target)
            return memory.loss.reduce(found, positions, step, memory.fast.num_samples).sum()

        total = loss(start)
        gradients = dict(zip(start, torch.autograd.grad(total, memory.fast.tensors()), strict=True))
        directions = {
            name: torch.randn(value.shape, generator=derive(name), dtype=value.dtype) for name, value in start.items()
        }
        h = 1e-5
        with torch.no_grad():
            up, down = (
                loss({name: value + sign * h * directions[name] for name, value in start.items()}) for sign in (1, -1)
            )
        expected = sum((gradients[name] * directions[name]).sum() for name in start)
        assert expected.abs() > 1e-4
        # A router's choice may flip between the two sides; a seed where none does is part of the test's set-up.
        assert_close((up - down) / (2 * h), expected, rtol=1e-6, atol=1e-8)


def state_of(memory, ids):
    g = rng(3)
    anchor = Anchor(
        clean=ids,
        is_maskable=torch.ones_like(ids, dtype=torch.bool),
        is_masked=torch.rand(ids.shape, generator=g) < 0.5,
        t=torch.full((len(ids),), 0.5),
    )
    path = memory.strategy.path(anchor, lambda: torch.rand(ids.shape, generator=g))
    return trajectory(path, anchor, mask_token_id=MASK, scored="student_masked")[0]


def outer_gradients(model, memory, batch: Batch, generators, *, share=True):
    model.zero_grad()
    with memory.write(batch.clean, batch.labels, batch.attention_mask, generators, anchor=batch.noised):
        lower_layers = memory.lower_layers if share else None
        lost = score(model, batch, schedule=Linear(), weighting="scheduler", lower_layers=lower_layers)
        lost.sums.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_family
@pytest.mark.parametrize("objective", ["ce", "distill"])
def test_outer_gradients_of_a_ragged_batch_are_the_sum_of_the_rows_own(family, objective):
    model = tiny(family, torch.float64)
    memory = memory_of(model, per_sample=True, inner_loss_type=objective)
    together = outer_gradients(model, memory, batch_of(slice(None)), [derive("row", row) for row in range(4)])
    total = {name: torch.zeros_like(value) for name, value in together.items()}
    for row in range(4):
        for name, value in outer_gradients(model, memory, batch_of(slice(row, row + 1)), [derive("row", row)]).items():
            total[name] += value
    for name, value in together.items():
        assert_close(value, total[name], rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("cached", [True, False])
@every_family
def test_under_autocast_the_shared_prefix_loses_no_gradient(family, cached):
    """Weights cast while gradients were off must not be taken for those that need one."""
    results = []
    for share in (False, True):
        model = tiny(family).train()
        memory = memory_of(model, per_sample=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
            results.append(outer_gradients(model, memory, batch_of(slice(None)), rng(), share=share))
    assert set(results[1]) == set(results[0]) == {name for name, _ in model.named_parameters()}
    for name, value in results[0].items():
        scale = value.norm().clamp_min(1e-3)
        assert (results[1][name] - value).norm() / scale < 0.1, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_outer_lora_trains_with_the_shared_prefix(checkpointing):
    results = []
    for share in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = get_peft_model(
                tiny("lladamoe", torch.float64),
                LoraConfig(target_modules=["q_proj", "down_proj", "gate_proj"], r=2, init_lora_weights=False),
            ).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        gradients = outer_gradients(
            model, memory_of(model, per_sample=False), batch_of(slice(None)), rng(), share=share
        )
        results.append(gradients)
    assert results[0]
    assert all("lora_" in name for name in results[0])
    assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_bf16_base_with_checkpointing_and_outer_loss_stays_bf16_and_finite():
    model = tiny("lladamoe", torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    gradients = outer_gradients(model, memory_of(model, per_sample=False), batch_of(slice(None)), rng())
    assert {value.dtype for value in gradients.values()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in gradients.values())


def test_writing_works_in_inference_mode_from_tensors_made_there():
    model, outside = tiny("lladamoe"), random_ids(2, 9)
    keep = torch.ones_like(outside)
    keep[1, 6:] = 0
    expected = written(model, outside, memory_of(model), mask=keep)
    with torch.inference_mode():
        found = written(model, outside.clone(), memory_of(model), mask=keep.clone())
    assert_close(found, expected, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@every_family
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_everything_masked_and_a_single_token_are_ordinary(family, objective):
    model = tiny(family, torch.float64)
    memory = memory_of(model, prompt_mask_ratio=1.0, inner_loss_type=objective)
    for ids in (random_ids(2, 7), random_ids(1, 1)):
        with memory.write(ids, generator=rng()) as record:
            assert record.num_tokens == 2 * ids.numel(), "both states mask everything"
            assert record.losses.isfinite().all()
            assert record.num_skipped.eq(0).all()


def test_a_text_longer_than_the_model_s_positions_is_written_with_a_warning():
    model = tiny("small")
    model.config.max_position_embeddings = 8
    with pytest.warns(UserWarning, match=r"has 9 tokens.*trained on 8 positions.*in pieces"):
        with memory_of(model).write(random_ids(1, 9), generator=rng()) as record:
            assert record.losses.isfinite().all()


@pytest.mark.parametrize("per_sample", [True, False])
def test_a_non_finite_gradient_skips_the_update_of_its_memory_alone(per_sample):
    model, ids = tiny("small"), random_ids(2, 10)
    memory = memory_of(model, per_sample=per_sample, num_inner_steps=3, prompt_mask_ratio=0.5)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            gradient[0] = float("inf")
            return gradient

    calls = []

    def poison(module, inputs, out):
        calls.append(out.shape)
        return Poison.apply(out) if len(calls) == 2 else out

    handle = model.model.norm.register_forward_hook(poison)
    with memory.write(ids, generator=rng()) as record:
        values = [value.clone() for value in memory.fast.tensors()]
    handle.remove()
    assert len(calls) == 3, "the path goes on"
    assert all(value.isfinite().all() for value in values)
    assert record.losses.isfinite().all()
    assert record.num_skipped.tolist() == ([1, 0] if per_sample else 1)


def test_a_batch_of_rows_with_nothing_maskable_beside_others_is_that_row_s_alone():
    model, ids = tiny("lladamoe", torch.float64), random_ids(2, 9)
    labels = ids.clone()
    labels[1] = -100
    memory = memory_of(model, per_sample=True, prompt_mask_ratio=0.5)
    generators = [derive("row", row) for row in range(2)]
    with memory.write(ids, labels, generator=generators) as record, torch.no_grad():
        logits = model(ids).logits
    assert record.losses[:, 1].eq(0).all()
    assert record.grad_norms[:, 1].eq(0).all()
    with torch.no_grad():
        assert_close(logits[1:], model(ids[1:]).logits)
        assert not torch.allclose(logits[:1], model(ids[:1]).logits)


@every_family
def test_a_global_clip_scales_a_whole_memory_by_one_factor(family):
    """Each sample by its own: the step is as long as the norm allows, and points where the unclipped one does."""
    model, ids = tiny(family, torch.float64), random_ids(2, 9)
    moved = {}
    for scope, clip in (("free", 0.0), ("tensor", 0.01), ("global", 0.01)):
        options = {} if scope == "free" else {"inner_clip_scope": scope}
        memory = memory_of(model, inner_lr=1.0, inner_grad_clip=clip, masking_strategy="no_progressive", **options)
        with memory.write(ids, generator=[rng(0), rng(3)]) as record:
            # These start at 0, so that they are the step; the others' first gradient is 0.
            moved[scope] = [value for name, value in memory.fast.named().items() if name.endswith("lora_B")]
        assert (record.grad_norms > clip).all()
    for sample in range(2):
        of = {scope: torch.cat([value.select(-3, sample).flatten() for value in each]) for scope, each in moved.items()}
        assert_close(of["global"].norm(), torch.tensor(0.01, dtype=torch.float64))
        assert_close(of["global"] / of["global"].norm(), of["free"] / of["free"].norm())
        assert of["tensor"].norm() > 0.0101


def test_a_memory_of_the_joined_batch_follows_the_token_mean():
    """One memory per batch: the gradient is that of the sum over all counted tokens, over their number."""
    model = tiny("lladamoe", torch.float64)
    batch = batch_of(slice(None))
    memory = memory_of(model, per_sample=False, inner_grad_clip=0.0, masking_strategy="no_progressive")
    rows = [derive("row", row) for row in range(4)]
    with memory.write(batch.clean, batch.labels, batch.attention_mask, rows, anchor=batch.noised) as joined:
        pass
    single = memory_of(model, per_sample=True, inner_grad_clip=0.0, masking_strategy="no_progressive")
    with single.write(batch.clean, batch.labels, batch.attention_mask, rows, anchor=batch.noised) as each:
        counts = batch.noised.is_masked.sum(-1).double()
    assert_close(joined.losses[0], (each.losses[0] * counts).sum() / counts.sum())
    assert_close(normalise(each.losses[0] * counts, counts, "token"), joined.losses)
