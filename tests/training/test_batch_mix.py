"""Steps that train with memory, text or both, and write in chunks or whole; writes under the mask of decoding."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from memdlm.data import Collator
from memdlm.errors import ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.memory.batch_mix import writes_chunks
from memdlm.models.blocks.masks import BlockCausal, Full, SlidingWindow
from memdlm.randomness import derive
from memdlm.training import MemDLMTrainer, TrainingArguments
from memdlm.training.noise import TIMES, UNIFORM, WRITE
from memdlm.training.trainer import BARE_EVERY
from tiny import CONFIGS, MASK, PAD, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))

CONFIG = MemoryConfig.recall(inner_layer_fraction=0.5, inner_rank=4, inner_alpha=8.0, strides=2)
MIXED = dataclasses.replace(CONFIG, batch_mix="1,1,1,1", batch_reach=2)


def trainer_of(folder, config, **options):
    ids = random_ids(8, 14).tolist()
    rows = [{"input_ids": row, "labels": [-100] * 8 + row[8:]} for row in ids]
    memory = {f"mem_{field.name}": getattr(config, field.name) for field in dataclasses.fields(config)}
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        mem_enabled=True,
        **{"per_device_train_batch_size": 4, "max_steps": 9, **memory, **options},
    )
    model = tiny("small", torch.float64)
    return MemDLMTrainer(
        model, arguments, mask_token_id=MASK, train_dataset=rows, eval_dataset=rows[:2], data_collator=Collator(PAD)
    )


def gradients(folder, config, step=0):
    trainer = trainer_of(folder, config)
    trainer.create_optimizer()
    (batch,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.state.global_step = step
    trainer.training_step(trainer.model, batch)
    return [p.grad for p in trainer.model.parameters()], [p.grad for p in trainer.memory.learned.parameters()]


def test_shares_choose_what_a_step_trains_with(tmp_path):
    both = gradients(tmp_path, dataclasses.replace(MIXED, batch_mix="0,0,1"))
    always = gradients(tmp_path, CONFIG)
    for one, other in zip(both[0] + both[1], [*always[0], *always[1]], strict=True):
        assert_close(one, other, rtol=0, atol=0)
    text = gradients(tmp_path, dataclasses.replace(MIXED, batch_mix="0,2,0,0"))
    without = gradients(tmp_path, dataclasses.replace(CONFIG, outer_mix=1.0))
    assert_close(text[0], without[0], rtol=0, atol=0)
    assert all(gradient is None for gradient in text[1]), "nothing is written"
    alone = gradients(tmp_path, dataclasses.replace(MIXED, batch_mix="1,0,0"))
    assert any(not torch.allclose(one, other) for one, other in zip(alone[0], both[0], strict=True))
    assert all(gradient.any() for gradient in alone[1][:2])


def test_the_memory_of_the_next_row_is_read(tmp_path):
    """The loss with it is that of a batch whose prompts are written, and then read, one row further on."""
    trainer = trainer_of(tmp_path, dataclasses.replace(MIXED, batch_mix="0,0,0,1"))
    (inputs,), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    batch = trainer.objective.noised(inputs, inputs[TIMES], inputs[UNIFORM])
    keys = [derive(key) for key in inputs[WRITE]]

    def bound(ids):
        with trainer.memory.write(ids, generator=list(map(torch.Generator.clone_state, keys))):
            return trainer.objective.score(trainer.model, batch).bound

    prompts = batch.clean[:, :8]
    own, other = (bound(prompts.roll(shift, 0)) for shift in (0, -1))
    assert not torch.allclose(own, other)
    found = []
    for is_of_next_row in (False, True):
        rows = list(map(torch.Generator.clone_state, keys))
        with trainer._written(batch, rows, is_of_next_row=is_of_next_row):
            found.append(trainer.objective.score(trainer.model, batch).bound)
    assert_close(found[0], own, rtol=1e-12, atol=0)
    assert_close(found[1], other, rtol=1e-12, atol=0)


def test_a_reach_hides_what_lies_further():
    """Two layers and three mixings of reach 1: with reach 2 the last five columns see at most eleven back."""
    model, ids = tiny("small", torch.float64), random_ids(1, 30)
    other = ids.clone()
    other[:, :10] = (other[:, :10] + 1) % PAD
    with torch.no_grad():
        seen = [model(each, attention_pattern=SlidingWindow(2)).logits[:, -5:] for each in (ids, other)]
        full = [model(each).logits[:, -5:] for each in (ids, other)]
    assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert not torch.allclose(full[0], full[1])


def test_a_mixed_run_shows_its_losses_apart_and_draws_the_same_modes_again(tmp_path):
    histories = []
    for _ in range(2):
        trainer = trainer_of(tmp_path, MIXED, logging_steps=1)
        modes = []
        for step in range(100):
            trainer.state.global_step = step
            modes.append(trainer._mode()[0])
        assert {modes.count(mode) > 10 for mode in set(modes)} == {True}
        assert len(set(modes)) == 4
        trainer.state.global_step = 0
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        names = {"nll_memory": "both", "nll_memory_alone": "memory alone", "nll_memory_other": "another row's memory"}
        for name, mode in names.items():
            assert [name in entry for entry in history] == [each == mode for each in modes[:9]]
        assert set(modes[:9]) == {*names.values(), "text alone"}
        assert ["nll" in entry for entry in history] == [
            mode == "text alone" or step % BARE_EVERY == 0 for step, mode in enumerate(modes[:9])
        ]
        histories.append([entry["loss"] for entry in history])
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_mix": "1,1,1"}, "mem_batch_mix='1,1,1' and mem_batch_reach=None belong together"),
        ({"batch_reach": 4}, "mem_batch_mix=None and mem_batch_reach=4 belong together"),
        ({"batch_mix": "1,1", "batch_reach": 4}, r"three shares \(memory alone, text alone, both\).*got '1,1'"),
        ({"batch_mix": "1,1,1,1,1", "batch_reach": 4}, "got '1,1,1,1,1'"),
        ({"batch_mix": "1,1,1,1", "batch_reach": 4, "per_sample": False}, "no effect with mem_per_sample=False"),
        ({"batch_mix": "0,0,0", "batch_reach": 4}, "got '0,0,0'"),
        ({"batch_mix": "1,x,0", "batch_reach": 4}, "got '1,x,0'"),
        ({"batch_mix": "1,-1,2", "batch_reach": 4}, "got '1,-1,2'"),
        ({"batch_mix": "1,1,1", "batch_reach": 4, "outer_mix": 0.5}, "not combined with mem_outer_mix=0.5"),
        ({"batch_mix": "1,1,1", "batch_reach": 4, "write_source": "response"}, "holds labels, not the text"),
    ],
)
def test_a_mix_that_means_nothing_is_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        MemoryConfig.recall(**options)


def test_one_row_has_no_other(tmp_path):
    with pytest.raises(ConfigError, match="mem_batch_mix='1,1,1,1' and per_device_train_batch_size=1"):
        trainer_of(tmp_path, MIXED, per_device_train_batch_size=1)


CHUNKED = dataclasses.replace(CONFIG, chunk_length=4, chunk_overlap=1)


def test_a_share_of_the_steps_writes_in_chunks(tmp_path):
    half = dataclasses.replace(CHUNKED, chunk_share=0.5)
    chunked, whole = gradients(tmp_path, CHUNKED), gradients(tmp_path, CONFIG)
    assert not torch.equal(chunked[1][0], whole[1][0])
    for step, expected in ((0, whole), (1, chunked), (2, whole), (3, chunked)):
        found = gradients(tmp_path, half, step)
        for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            assert_close(one, other, rtol=0, atol=0)


def test_an_evaluation_writes_in_chunks_whatever_the_step(tmp_path):
    trainer, found = trainer_of(tmp_path, dataclasses.replace(CHUNKED, chunk_share=0.5)), []
    for step in (0, 1):
        trainer.state.global_step = step
        found.append(trainer.evaluate()["eval_nll_memory"])
    assert found[0] == found[1]
    assert found[0] == trainer_of(tmp_path, CHUNKED).evaluate()["eval_nll_memory"]
    assert found[0] != trainer_of(tmp_path, CONFIG).evaluate()["eval_nll_memory"]


@given(share=st.floats(0, 1, exclude_min=True), start=st.integers(0, 10**6), count=st.integers(1, 200))
def test_any_run_of_steps_has_the_share_to_within_one_step(share, start, count):
    chosen = sum(writes_chunks(share, step) for step in range(start, start + count))
    assert abs(chosen - share * count) <= 1
    assert share < 1 or chosen == count


@every_family
def test_a_whole_write_is_that_of_a_memory_without_chunks(family):
    memory = ParametricMemory(tiny(family), dataclasses.replace(CHUNKED, chunk_overlap=0), mask_token_id=MASK)
    ids = random_ids(2, 12)

    def written(memory, **options):
        with memory.write(ids, generator=rng(2), **options) as result:
            return [*memory.fast.tensors(), result.losses]

    bare = memory.with_options(chunk_length=None)
    whole, other, chunked = written(memory, is_whole=True), written(bare), written(memory)
    for one, same in zip(whole, other, strict=True):
        assert torch.equal(one, same)
    assert any(one.shape != cut.shape or not torch.equal(one, cut) for one, cut in zip(whole, chunked, strict=True))


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"mem_chunk_share=0\.5 has no effect without mem_chunk_length"):
        MemoryConfig.recall(chunk_share=0.5)
    with pytest.raises(ConfigError, match="chunk_share"):
        MemoryConfig.recall(chunk_length=4, chunk_share=0.0)


def test_a_write_under_the_mask_of_decoding_is_block_causal():
    model, ids = tiny("llada2", torch.float64), random_ids(1, 40)
    options = {"inner_layer_fraction": 0.5, "inner_target_modules": "down_proj"}

    def written(config, pattern=None):
        memory = ParametricMemory(model, config, mask_token_id=MASK, attention_pattern=pattern)
        with memory.write(ids, generator=rng(1)):
            return [tensor.detach() for tensor in memory.fast.tensors()]

    decode = written(MemoryConfig(attention="decode", **options))
    for one, other in zip(decode, written(MemoryConfig(**options), BlockCausal(32)), strict=True):
        assert_close(one, other, rtol=0, atol=0)
    full = written(MemoryConfig(**options))
    assert any(not torch.allclose(one, other) for one, other in zip(decode, full, strict=True))


def test_a_mask_of_decoding_that_changes_nothing_or_fits_nothing_is_refused():
    config = MemoryConfig(attention="decode", inner_target_modules="down_proj")
    with pytest.raises(ConfigError, match="mem_attention='decode' has no effect: this model decodes under full"):
        ParametricMemory(tiny("llada"), config, mask_token_id=MASK)
    with pytest.raises(ConfigError, match=r"writes under BlockCausal\(block=32\), not Full\(\)"):
        ParametricMemory(tiny("llada2"), config, mask_token_id=MASK, attention_pattern=Full())
    with pytest.raises(ConfigError, match="mem_chunk_length=40 cuts through the blocks of 32"):
        ParametricMemory(tiny("llada2"), dataclasses.replace(config, chunk_length=40), mask_token_id=MASK)
