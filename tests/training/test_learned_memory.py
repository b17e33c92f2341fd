"""A memory that learns to be written: trained beside the model, saved beside it, used wherever the model is loaded."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from memdlm.data import Collator
from memdlm.diffusion import Linear
from memdlm.errors import CheckpointError, ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import load_model
from memdlm.training import MemDLMTrainer, TrainingArguments
from memdlm.training.outer import noise_batch, prompt_only, visible_only
from tiny import MASK, PAD, random_ids, rng, tiny

CONFIG = MemoryConfig.recall(inner_layer_fraction=0.5, inner_rank=4, inner_alpha=8.0, strides=2)


def rows_of(count, length=14, prompt=8):
    ids = random_ids(count, length).tolist()
    return [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids]


def trainer_of(folder, model, config=CONFIG, **options):
    memory = {f"mem_{field.name}": getattr(config, field.name) for field in dataclasses.fields(config)}
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        mem_enabled=True,
        **{**settings, **memory, **options},
    )
    return MemDLMTrainer(
        model,
        arguments,
        mask_token_id=MASK,
        train_dataset=rows_of(16),
        eval_dataset=rows_of(4),
        data_collator=Collator(PAD),
    )


def test_the_start_and_the_rates_are_trained_with_rates_of_their_own(tmp_path):
    trainer = trainer_of(tmp_path, tiny("small"))
    learned = trainer.memory.learned
    before = [p.detach().clone() for p in learned.parameters()]
    names = set(trainer.model.state_dict())
    trainer.train()
    assert all(not p.equal(old) for p, old in zip(learned.starts, before, strict=False))
    assert set(trainer.model.state_dict()) == names
    base = trainer.optimizer.param_groups[0]["initial_lr"]
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [base, base, 3e-3, 0.3, 0.1]
    assert all(group["weight_decay"] == 0 for group in trainer.optimizer.param_groups[2:])
    assert all(p.grad is None for p in learned.parameters()), "no gradient waits for the next step"


def test_what_was_learned_is_used_wherever_the_model_is_loaded(tmp_path):
    trainer = trainer_of(tmp_path, tiny("small"))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = load_model(tmp_path / "saved")
    ids = random_ids(2, 9)
    expected = trainer.memory.learned.tensors()
    for config in (None, CONFIG):
        memory = ParametricMemory(model, config, mask_token_id=MASK)
        assert_close(memory.learned.tensors(), expected, rtol=0, atol=0)
        with torch.no_grad(), memory.write(ids, generator=rng()):
            read = model(ids).logits
        trainer.model.eval()
        with torch.no_grad(), trainer.memory.write(ids, generator=rng()):
            assert_close(read, trainer.model(ids).logits)
    assert ParametricMemory(model, MemoryConfig(), mask_token_id=MASK).learned is None, "the paper's has none"
    with pytest.raises(ConfigError, match=r"mem_strides=3, but the start and rates in .* were learned with 2"):
        ParametricMemory(model, dataclasses.replace(CONFIG, strides=3), mask_token_id=MASK)


def test_a_damaged_or_foreign_start_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, tiny("small"))
    trainer.save_model(str(tmp_path / "saved"))
    path = tmp_path / "saved" / "memory_init.safetensors"
    tensors = load_file(path)
    model = load_model(tmp_path / "saved")
    name = next(key for key in tensors if key.endswith("lora_A"))
    save_file({**tensors, name: tensors[name][..., :-1].contiguous()}, path)
    with pytest.raises(CheckpointError, match=r"learned for another model: .*lora_A"):
        ParametricMemory(model, mask_token_id=MASK)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="could not be read"):
        ParametricMemory(model, mask_token_id=MASK)


SOME_IN_CHUNKS = dataclasses.replace(CONFIG, chunk_length=4, chunk_share=0.5)


@pytest.mark.parametrize(("config", "at"), [(CONFIG, 2), (SOME_IN_CHUNKS, 1)], ids=["whole", "some in chunks"])
def test_a_run_goes_on_with_what_it_had_learned(config, at, tmp_path):
    def trainer(folder, steps, **options):
        return trainer_of(
            tmp_path / folder, tiny("small"), config, lr_scheduler_type="constant", max_steps=steps, **options
        )

    whole, first, second = trainer("a", 4), trainer("b", at, save_strategy="steps", save_steps=at), trainer("b", 4)
    whole.train()
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{at}"))
    for one, other in zip(whole.memory.learned.parameters(), second.memory.learned.parameters(), strict=True):
        assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("source", ["prompt", "both"])
def test_nothing_that_is_scored_can_be_written(source):
    rows = rows_of(3)
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    noise = [torch.rand(size, generator=rng(index)) for index, size in enumerate([(3,), (3, 14)])]

    def written(clean):
        batch = noise_batch(
            {"input_ids": clean, "labels": labels.where(labels == -100, clean)},
            *noise,
            schedule=Linear(),
            epsilon=1e-3,
            mask_token_id=MASK,
            spare_padding=False,
        )
        return batch, (prompt_only(batch, PAD) if source == "prompt" else visible_only(batch))

    batch, first = written(ids)
    scored = batch.noised.is_masked
    assert scored.any()
    _, second = written(ids.masked_fill(scored, 7))
    for one, other in zip(first, second, strict=True):
        assert (one is None and other is None) or one.equal(other), "other answers, the same write"
    assert (first[1] != -100).any()
    assert first[0].shape[1] == (8 if source == "prompt" else 14)


@pytest.mark.parametrize("config", [CONFIG, MemoryConfig(inner_rank=4, inner_alpha=8.0)], ids=["recall", "paper"])
def test_a_mixed_outer_loss_has_the_mixed_gradient(config, tmp_path):
    gradients = []
    for mix in (0.0, 0.25, 1.0):
        trainer = trainer_of(tmp_path, tiny("small", torch.float64), dataclasses.replace(config, outer_mix=mix))
        trainer.create_optimizer()
        batches = iter(trainer.get_train_dataloader())
        (batch,), _ = trainer.get_batch_samples(batches, 1, torch.device("cpu"))
        trainer.training_step(trainer.model, batch)
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    for with_memory, mixed, without in zip(*gradients, strict=True):
        assert_close(mixed, 0.75 * with_memory + 0.25 * without)
