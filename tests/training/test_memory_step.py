"""The trainer's bi-level step: what is shared, what evaluation leaves alone."""

import pytest
import torch
from torch.utils.data import Dataset

from memdlm.training import MemDLMTrainer, TrainingArguments
from tiny import MASK, random_ids, tiny


class Rows(Dataset):
    def __init__(self, count: int) -> None:
        self.ids = random_ids(count, 10)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(tmp_path, family, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        mem_enabled=True,
        mem_inner_layer_fraction=0.5,
        mem_inner_rank=4,
        mem_inner_alpha=8.0,
        **options,
    )
    return MemDLMTrainer(tiny(family), arguments, mask_token_id=MASK, train_dataset=Rows(8), eval_dataset=Rows(4))


@pytest.mark.parametrize("family", ["small", "lladamoe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_passes_the_frozen_blocks_once_per_state(family, checkpointing, tmp_path):
    run = trainer(tmp_path, family, gradient_checkpointing=checkpointing)
    calls = []
    run.model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    run.train()
    # Two steps, each the pre-anchor without a graph and the anchor with one, which the outer loss goes on from.
    assert calls == [False, True] * 2
    assert run.memory is not None
    assert run.memory.lower_layers is None, "nothing stays open"


def test_training_synchronises_one_memory_per_batch_and_says_when_it_cannot(tmp_path):
    assert trainer(tmp_path, "small").args.memory.sync_inner is True
    assert trainer(tmp_path, "small", mem_per_sample=True).args.memory.sync_inner is False
    with pytest.raises(ValueError, match="mem_sync_inner=True has no effect with mem_per_sample=True"):
        trainer(tmp_path, "small", mem_per_sample=True, mem_sync_inner=True)


def test_evaluation_shares_the_anchor_too(tmp_path):
    run = trainer(tmp_path, "small", per_device_eval_batch_size=4)
    calls = []
    run.model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    metrics = run.evaluate()
    assert calls == [False] * 3, "without memory, the pre-anchor, and the anchor, once"
    assert metrics["eval_nll_memory"] > 0
