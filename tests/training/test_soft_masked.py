"""Soft-masking in the Trainer: a share of the rows sees a first pass's predictions; evaluation sees none."""

import pytest
import torch
from test_trainer import rows_of, trained, trainer_of
from torch.testing import assert_close

from memdlm.diffusion import Linear
from memdlm.diffusion.soft_masking import SoftMask
from memdlm.errors import ConfigError
from memdlm.training import TrainingArguments, noise_batch, score
from tiny import MASK, tiny

SOFT = SoftMask(mask_token_id=MASK, top_k=3, scale=0.9, steepness=1.0, centre=-2.0)


def batch_of(rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    uniform = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "labels": labels}
    times = torch.linspace(0.3, 0.9, len(rows))
    return noise_batch(inputs, times, uniform, schedule=Linear(), epsilon=1e-3, mask_token_id=MASK, spare_padding=False)


def test_only_the_chosen_rows_are_softened_and_gradients_reach_the_table():
    model, batch = tiny("lladamoe", torch.float64).train(), batch_of(rows_of(3))
    lose = lambda is_soft: score(
        model, batch, schedule=Linear(), weighting="scheduler", soft=SOFT, is_soft=torch.tensor(is_soft)
    )
    plain = score(model, batch, schedule=Linear(), weighting="scheduler")
    some, every = lose([False, True, False]), lose([True] * 3)
    assert_close(some.sums[[0, 2]], plain.sums[[0, 2]])
    assert_close(some.sums[1], every.sums[1])
    assert ((every.sums - plain.sums).abs() > 1e-3).all()
    assert_close(lose([False] * 3).sums, plain.sums)
    table = model.get_input_embeddings().weight
    (bare,) = torch.autograd.grad(plain.sums.sum(), table)
    (gradient,) = torch.autograd.grad(every.sums.sum(), table)
    # Tokens that occur in no row get a gradient only as a part of the feedback.
    absent = sorted(set(range(30)) - set(batch.clean.flatten().tolist()))
    assert bare[absent].abs().sum() == 0
    assert gradient[absent].abs().sum() > 0


@pytest.mark.parametrize("pieces", [1, 4])
def test_the_trainer_softens_rows_whatever_the_cut(pieces, tmp_path):
    model, rows = tiny("small", torch.float64), rows_of(8)
    options = {"max_steps": 2, "soft_mask_prob": 0.5, "soft_mask_scale": 0.9}
    whole = trained(tmp_path, model, rows, per_device_train_batch_size=4, **options)
    cut = trained(
        tmp_path,
        model,
        rows,
        per_device_train_batch_size=4 // pieces,
        gradient_accumulation_steps=pieces,
        **options,
    )
    plain = trained(tmp_path, model, rows, per_device_train_batch_size=4, max_steps=2)
    for name, value in whole.model.state_dict().items():
        assert_close(cut.model.state_dict()[name], value, rtol=1e-6, atol=1e-8)
    assert whole.state.log_history[0]["loss"] != plain.state.log_history[0]["loss"]
    assert "nll_soft" in whole.state.log_history[0]
    assert "nll" not in whole.state.log_history[0]


def test_evaluation_sees_plain_masks(tmp_path):
    model, rows = tiny("small"), rows_of(8)
    figures = [
        trainer_of(tmp_path, model, rows, rows, **options).evaluate()["eval_nll"]
        for options in ({}, {"soft_mask_prob": 1.0, "soft_mask_scale": 1.0})
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft_mask_top_k": 2}, "no effect without soft_mask_prob"),
        ({"soft_mask_prob": 0.5, "mem_enabled": True}, "a baseline without memory"),
        ({"soft_mask_prob": 1.5}, "soft_mask_prob must be at most 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
