"""Block-diffusion training: its loss and gradients are those of one block-causal pass per block."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from block_passes import by_block
from memdlm.diffusion import NORMS, WEIGHTINGS, Linear, weight_of
from memdlm.errors import ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import LoRAOptions, add_outer_lora
from memdlm.models.networks.shifting import shift_of
from memdlm.training import DiffusionConfig, TrainingArguments, memory_of
from memdlm.training.noise import ATTEMPTS, TIMES, UNIFORM, NoiseShape, add_noise, evaluation_noise
from memdlm.training.objective import OuterObjective
from memdlm.training.rows import FIRST_TARGET, SAMPLE, first_target
from run_kinds import MEMORY, RECALL, TRAINED, is_same, losses, new_model, state, trainer_of
from tiny import CONFIGS, MASK, PAD, random_ids, rng, tiny

FAMILIES = [name for name in CONFIGS if tiny(name).model.is_cacheable and not shift_of(tiny(name))]
BLOCK, LENGTH, PROMPT = 4, 11, 5
"""The prompt ends inside the second block, so the first is left out of the noised half; the last block is short."""
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def inputs_of(rows=3):
    ids = random_ids(rows, LENGTH)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    keep = torch.arange(LENGTH) < torch.tensor([LENGTH, 8, 9])[:rows, None]
    labels = labels.where(keep, -100)
    numbers = {SAMPLE: range(rows), FIRST_TARGET: first_target(labels)}
    return {"input_ids": ids, "labels": labels, "attention_mask": keep.long(), **numbers}


def objective_of(**options):
    return OuterObjective(options=DiffusionConfig(block_size=BLOCK, **options), schedule=Linear(), mask_token_id=MASK)


def batch_of(objective):
    inputs = inputs_of()
    add_noise([inputs], seed=0, epoch=0, step=0, stratified=False, shape=objective.options.noise_shape)
    return objective.noised(inputs, inputs[TIMES].double(), inputs[UNIFORM])


def brute_force(model, batch, options):
    """The loss, row by row and block by block, from one block-causal pass for every block."""
    logits = by_block(model, batch.clean, batch.noised.ids, BLOCK, batch.attention_mask)
    nats = F.cross_entropy(logits.transpose(1, 2), batch.clean, reduction="none")
    sums = []
    for row, start in itertools.product(range(len(batch.clean)), range(0, LENGTH, BLOCK)):
        of_blocks = batch.noised.of_blocks
        t = batch.noised.t[row] if of_blocks is None else of_blocks.t[row, start // BLOCK]
        here = slice(start, start + BLOCK)
        is_masked = batch.noised.is_masked[row, here]
        sums.append(weight_of(options.loss_weight_type, Linear(), t) * nats[row, here][is_masked].sum())
    of_rows = torch.stack(sums).view(len(batch.clean), -1).sum(1)
    counts = batch.is_maskable.sum(1)
    return {
        "token": of_rows.sum() / counts.sum(),
        "sequence": (of_rows / counts).mean(),
        "batch": of_rows.mean(),
    }[options.loss_norm_type]


def totals_of(batch):
    return {"total_tokens": batch.is_maskable.sum(), "total_rows": torch.tensor(len(batch.clean))}


def gradients(loss, parameters):
    return torch.autograd.grad(loss, [p for p in parameters if p.requires_grad], allow_unused=True)


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_norm_type": norm} for norm in NORMS),
        *({"loss_weight_type": name, "block_times": "row"} for name in WEIGHTINGS),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_one_pass_per_block(family, options):
    model, objective = tiny(family, torch.float64), objective_of(**options)
    batch = batch_of(objective)
    assert batch.noised.is_masked.any(1).all()
    assert batch.first_target == PROMPT
    found = objective.score(model, batch, totals=totals_of(batch))
    expected = brute_force(model, batch, objective.options)
    assert_close(found.loss, expected, **CLOSE)
    assert_close(gradients(found.loss, model.parameters()), gradients(expected, model.parameters()), **CLOSE)
    assert_close(found.bound, found.parts.bound.sum(1))
    assert found.parts.counts.sum(1).equal(found.counts)
    plain = objective.score(model, batch)
    assert_close(plain.bound, found.bound, **CLOSE)


@pytest.mark.parametrize("memory", ["off", "on", "learned"])
@pytest.mark.parametrize("trained", ["full", "LoRA"])
@pytest.mark.parametrize(
    "family", ["llada2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sdar", "a2d_qwen3", "lladamoe", "mdlm"))]
)
def test_with_memory_every_block_reads_it_and_the_gradient_is_exact(family, trained, memory):
    model, objective = tiny(family, torch.float64), objective_of()
    if trained == "LoRA":
        model = add_outer_lora(model, LoRAOptions(r=4, lora_dropout=0.0), seed=0)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data = torch.randn(value.shape, generator=rng(1), dtype=value.dtype) / 4
    batch = batch_of(objective)
    if memory == "off":
        one, other = (
            objective.score(model, batch, totals=totals_of(batch)).loss,
            brute_force(model, batch, objective.options),
        )
        assert_close(gradients(one, model.parameters()), gradients(other, model.parameters()), **CLOSE)
        return
    config = dataclasses.replace(
        RECALL if memory == "learned" else MemoryConfig(inner_layer_fraction=0.5, inner_rank=4, per_sample=True),
        inner_lr=0.5,
    )
    keeper = ParametricMemory(model, config, mask_token_id=MASK)
    own = [] if keeper.learned is None else list(keeper.learned.parameters())
    found = []
    for is_joined in (True, False):
        rows = [rng(row) for row in range(len(batch.clean))]
        with memory_of(keeper, batch, pad_token_id=PAD, randomness=rows, is_read_at_anchor=False):
            if is_joined:
                loss = objective.score(model, batch, keeper.lower_layers, totals=totals_of(batch)).loss
            else:
                loss = brute_force(model, batch, objective.options)
            found.append([loss.detach(), *gradients(loss, [*model.parameters(), *own])])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, **CLOSE)
    assert len(own) == 0 or all(gradient.abs().max() > 0 for gradient in found[0][-len(own) :])
    bare = brute_force(model, batch, objective.options)
    assert (found[0][0] - bare).abs() > 1e-3, "the memory was read"


FAST = {("full", "off"), ("LoRA", "on"), ("QLoRA", "learned")}
RUNS = [
    pytest.param(*kind, marks=() if kind in FAST else pytest.mark.slow) for kind in itertools.product(TRAINED, MEMORY)
]


@pytest.mark.parametrize(("trained", "memory"), RUNS)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(trained, memory, tmp_path):
    if trained == "QLoRA":
        pytest.importorskip("bitsandbytes")
    options = {"block_size": BLOCK, "eval_strategy": "steps", "eval_steps": 3}
    whole = trainer_of(new_model(tmp_path, "llada2", trained), tmp_path / "whole", memory, **options)
    whole.train()
    # Also run to three steps, so that the schedule of the learning rate is the same.
    again = trainer_of(new_model(tmp_path, "llada2", trained, seed=7), tmp_path / "again", memory, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert is_same(state(again), state(whole))
    assert losses(again)[-1] == losses(whole)[-1]
    evaluated = [entry for entry in whole.state.log_history if "eval_nll" in entry][-1]
    assert ("eval_nll_memory" in evaluated) == (memory != "off")
    assert again.evaluate()["eval_nll"] == evaluated["eval_nll"], "the same noise at every evaluation"


def test_evaluation_scores_what_training_does(tmp_path):
    trainer = trainer_of(tiny("llada2"), tmp_path, block_size=BLOCK, per_device_eval_batch_size=4)
    evaluated = trainer.evaluate()
    batch = trainer.data_collator([(number, trainer.eval_dataset[number]) for number in range(4)])
    batch = trainer.objective.evaluated(batch, trainer.args.seed, range(4))
    with torch.no_grad():
        expected = brute_force(trainer.model, batch, trainer.args.diffusion)
    assert_close(evaluated["eval_loss"], expected.item(), rtol=1e-5, atol=1e-6)
    assert_close(evaluated["eval_nll"], expected.item(), rtol=1e-5, atol=1e-6)
    times = batch.noised.of_blocks.t
    assert times.shape == (4, 3)
    assert times.unique().numel() == 12
    shown = {name for name in evaluated if name.startswith("eval_nll_t")}
    assert len(shown) >= 4, "the bound by time counts blocks by their own times"


def drawn(samples, width, **shape):
    batch = {"input_ids": torch.zeros(len(samples), width, dtype=torch.int64), SAMPLE: samples}
    stratified = shape.pop("stratified", False)
    add_noise([batch], seed=3, epoch=1, step=0, stratified=stratified, shape=NoiseShape(**shape))
    return batch[TIMES], batch[UNIFORM]


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_row_s_noise_does_not_depend_on_the_width_of_its_batch(attempts):
    times, uniform = drawn([5, 8], 17, block=BLOCK, attempts=attempts)
    alone, own = drawn([8], 9, block=BLOCK, attempts=attempts)
    assert times.shape[-1] == 5
    assert alone.shape[-1] == 3
    assert times[1, ..., :3].equal(alone[0])
    assert uniform[1, ..., :9].equal(own[0])
    # Without block diffusion the draws are those of the first attempt, as ever.
    of_rows, plain = drawn([8], 9)
    assert own[0].view(-1, 9)[0].equal(plain[0])
    assert of_rows.shape == (1,)


def test_times_of_blocks_are_uniform_and_stratified_ones_are_even():
    for stratified in (False, True):
        times, _ = drawn(range(256), 64, block=8, stratified=stratified)
        assert times.shape == (256, 8)
        assert ((times >= 0) & (times < 1)).all()
        for number in range(8):
            expected = torch.full((8,), 32.0)
            counts = torch.histc(times[:, number], 8, 0, 1)
            assert (counts - expected).abs().max() <= (2 if stratified else 24)
        largest_gap = times.sort(1).values.diff(dim=1).amax(1)
        assert (largest_gap < 0.3).all() == stratified
    times, _ = evaluation_noise(0, range(4), (4, 9), BLOCK)
    assert times.shape == (4, 3)
    assert times[2].equal(evaluation_noise(0, [2], (1, 9), BLOCK)[0][0])


def test_each_block_is_masked_by_its_own_time():
    objective = objective_of()
    inputs = {
        "input_ids": random_ids(200, 8),
        "labels": random_ids(200, 8),
        "attention_mask": torch.ones(200, 8, dtype=torch.int64),
    }
    times = torch.tensor([0.1, 0.9]).expand(200, 2)
    batch = objective.noised(inputs, times, torch.rand(200, 8, generator=rng()))
    shares = batch.noised.is_masked.view(200, 2, 4).float().mean((0, 2))
    assert_close(shares, torch.tensor([0.1, 0.9]), rtol=0, atol=0.05)
    assert_close(batch.noised.t, torch.full((200,), 0.5), rtol=0.01, atol=0)


def test_noise_is_drawn_again_until_a_token_is_masked():
    inputs = inputs_of()
    objective = objective_of(block_times="row", redraw_empty=True)
    assert objective.options.noise_shape.attempts == ATTEMPTS
    uniform = torch.full((3, ATTEMPTS, LENGTH), 0.99)
    uniform[0, 4, 7] = 0.01
    uniform[1, 0, 6] = 0.01
    uniform[2, :, PROMPT - 1] = 0.01
    times = torch.linspace(0.1, 0.5, ATTEMPTS).expand(3, -1)
    noised = objective.noised(inputs, times, uniform).noised
    assert noised.is_masked.nonzero().tolist() == [[0, 7], [1, 6]], "a prompt token does not count"
    assert_close(noised.t, 1e-3 + (1 - 1e-3) * times[0, [4, 0, ATTEMPTS - 1]])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_times": "row"}, "block_times='row' has no effect without block_size"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 4, "block_times": "token"}, "block_times"),
        ({"block_size": 4, "planner_weight": 1.0}, "planner_weight=1.0 is not defined for block diffusion"),
        ({"block_size": 4, "soft_mask_prob": 0.5}, "soft_mask_prob=0.5 is not defined for block diffusion"),
        ({"redraw_empty": True, "stratified_times": True}, "redraw_empty=True and stratified_times=True"),
        (
            {
                **{"block_size": 4, "mem_enabled": True, "mem_write_source": "prompt"},
                **{"mem_batch_mix": "1,1,1", "mem_batch_reach": 2},
            },
            "mem_batch_mix='1,1,1' and block_size=4",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_combined_is_refused(options, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **options)


def test_a_network_that_cannot_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="token mixing or a sliding window"):
        trainer_of(tiny("small"), tmp_path, block_size=BLOCK)
