"""The outer loss and its gradients equal the published trainer's, with and without memory."""

import copy
import dataclasses
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers.core_model_loading import revert_weight_conversion

from goldens import Case, cannot_replay, cases, model, must_know, tensors
from memdlm.diffusion import Corrupted, Linear, masked_loss, normalise, positions_of
from memdlm.memory import Anchor, MemoryConfig, ParametricMemory, run_inner_loop, trajectory
from memdlm.memory.trajectory import Path
from memdlm.models import LLaDAConfig, ModelDenoiser
from memdlm.training.outer import learnable
from memory_replay import join
from tiny import assign

pytestmark = pytest.mark.golden
MASK, PAD = 505, 500


HONOURED = {
    *("loss", "trainer_kwargs", "base_grad_norm", "per_param_grad_norm", "inner_losses", "inner_grad_norms"),
    *("randperm_calls", "mem_inner_target_modules", "published_defect"),
}
MEASURED = {
    # What the outer loss puts on the published inner parameters, which are part of its model; ours are not.
    *("inner_grad_norm", "total_grad_norm_as_clipped_by_Trainer", "inner_param_outer_grad_norm", "note"),
}
OUTER_OPTIONS = ("loss_weight_type", "loss_norm_type", "right_shift_logits")
TENSOR = re.compile(r"grad/.+|inner_step\d+_input_ids|masked_mask")


def recorded(case: Case) -> dict[str, torch.Tensor]:
    """The case's tensors, those of them that were kept."""
    prefix = f"{case.name.split(':')[1]}/"
    data = tensors(case.family, "outer.safetensors")
    found = {name.removeprefix(prefix): value for name, value in data.items() if name.startswith(prefix)}
    must_know(case, found, filter(TENSOR.fullmatch, found), "tensor")
    return found


def options_of(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The outer options, and those of the memory."""
    must_know(case, case.record, HONOURED | MEASURED)
    given = case.record["trainer_kwargs"]
    memory = {name.removeprefix("mem_"): value for name, value in given.items() if name.startswith("mem_")}
    outer = {name: value for name, value in given.items() if not name.startswith("mem_")}
    must_know(case, outer, OUTER_OPTIONS, "option")
    must_know(case, memory, ["enabled", *(each.name for each in dataclasses.fields(MemoryConfig))], "memory option")
    return outer, memory


def maskable_of(inputs, is_spared: bool) -> torch.Tensor:
    is_maskable = inputs["labels"] != -100
    if is_spared:
        # The published rule, which takes every pad id for padding (the recorded defect).
        is_maskable &= inputs["input_ids"] != PAD
    return is_maskable


def recorded_states(case: Case, config: MemoryConfig, anchor: Anchor) -> list[torch.Tensor]:
    """Ids of the inner states: recorded, or rebuilt from the recorded random permutations."""
    data = recorded(case)
    count = sum(name.startswith("inner_step") for name in data)
    if count:
        return [data[f"inner_step{k}_input_ids"] for k in range(count)]
    if (config.masking_strategy, config.num_inner_steps, config.num_inner_epochs) != ("pmc", 2, 1):
        cannot_replay(case, "its states were not recorded, and only two of pmc follow from the permutations alone")
    first, rows = anchor.is_masked.clone(), anchor.clean.shape[0]
    for row, order in enumerate(case.record["randperm_calls"][:rows]):
        free = (anchor.is_maskable[row] & ~anchor.is_masked[row]).nonzero().squeeze(1)
        total, k = int(anchor.is_maskable[row].sum()), int(anchor.is_masked[row].sum())
        count = min(total, max(k, int(config.progressive_consistent_start_scale * k))) - k
        first[row, free[torch.tensor(order)[:count]]] = True
    return [anchor.clean.masked_fill(each, MASK) for each in (first, anchor.is_masked)]


def written(case: Case, network, inputs, anchor: Anchor):
    """The recorded memory before its write, the states that it follows and how often; None without memory."""
    outer, options = options_of(case)
    if not options.pop("enabled"):
        return None
    if isinstance(network.config, LLaDAConfig):
        # The published code finds only this one of its default names in the dense family.
        options.setdefault("inner_target_modules", case.record.get("mem_inner_target_modules", "up_proj"))
    if options.get("pad_unmask_mode", "none") != "none":
        is_maskable = maskable_of(inputs, True)
        anchor = dataclasses.replace(anchor, is_maskable=is_maskable, is_masked=anchor.is_masked & is_maskable)
    config = MemoryConfig(
        **options,
        loss_weight_type=outer.get("loss_weight_type", "scheduler"),
        loss_norm_type=outer.get("loss_norm_type", "token"),
        per_sample=False,
    )
    shift = outer.get("right_shift_logits", False)
    memory = ParametricMemory(network, config, mask_token_id=MASK, right_shift_logits=shift)
    memory.fast.reset(1, torch.Generator())
    assign(memory.fast, join(tensors(case.family, "inner_A0.safetensors"), memory.fast.named(), case.family))
    # Teachers and nominal times are the strategy's, the states the recorded ones.
    own = config.strategy().path(anchor, lambda: torch.rand(anchor.clean.shape))
    states = [(ids == MASK) & anchor.is_maskable for ids in recorded_states(case, config, anchor)]
    epochs, rest = divmod(len(states), len(own.masked))
    if rest or epochs not in (1, config.num_inner_epochs):
        cannot_replay(case, f"{len(states)} states of {config.num_inner_epochs} epochs do not fit")
    steps = []
    for epoch in range(epochs):
        masked = states[epoch * len(own.masked) :][: len(own.masked)]
        teacher = [*masked[1:], None] if len(masked) > 1 else own.teacher
        times = own.t
        if config.masking_strategy in ("pmc", "pre_only"):
            times = [each.sum(-1) / anchor.is_maskable.sum(-1) for each in masked]
        path = Path(masked, teacher, times)
        steps += trajectory(path, anchor, mask_token_id=MASK, scored=config.inner_loss_mask_mode)
    return memory, steps, config.num_inner_epochs // epochs


@pytest.mark.parametrize("case", [c for c in cases("outer") if "loss" in c.record], ids=str)
def test_outer_loss_and_gradients(case: Case):
    record, inputs = case.record, tensors(case.family, "inputs.safetensors")
    options, memory_options = options_of(case)
    network = copy.deepcopy(model(case.family)).train()
    is_maskable = maskable_of(inputs, memory_options.get("pad_unmask_mode") == "both")
    is_masked = recorded(case).get("masked_mask", inputs["mem_masked_mask"]) & is_maskable
    shift = options.get("right_shift_logits", False)
    anchor = Anchor(clean=inputs["input_ids"], is_maskable=is_maskable, is_masked=is_masked, t=inputs["mem_t"])
    memory = written(case, network, inputs, anchor)
    with memory[0].fast.attached() if memory else nullcontext():
        denoise = ModelDenoiser(network, right_shift_logits=shift)
        if memory:
            inner = run_inner_loop(
                memory[1],
                fast=memory[0].fast,
                loss=memory[0].loss,
                update=memory[0].update,
                denoise=denoise,
                epochs=memory[2],
            )
            assert_close(inner.losses[:, 0].tolist(), record["inner_losses"], rtol=2e-6, atol=0)
            assert_close(inner.grad_norms[:, 0].tolist(), record["inner_grad_norms"], rtol=2e-5, atol=0)
            memory[0].fast.replace([value.detach() for value in memory[0].fast.tensors()])
        noised = Corrupted(anchor.clean.masked_fill(is_masked, MASK), is_masked, anchor.t)
        lost = masked_loss(
            denoise,
            anchor.clean,
            noised,
            is_maskable,
            schedule=Linear(),
            weighting=options.get("loss_weight_type", "scheduler"),
        )
        loss = normalise(lost.sums, lost.counts, options.get("loss_norm_type", "token")).squeeze()
        loss.backward()
    assert_close(loss.item(), record["loss"], rtol=2e-6, atol=0)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    total = torch.stack([g.double().norm() for g in gradients.values()]).norm().item()
    assert_close(total, record["base_grad_norm"], rtol=1e-5, atol=0)
    published = revert_weight_conversion(network, gradients)
    for name, norm in (record.get("per_param_grad_norm") or {}).items():
        assert_close(published[name].norm().item() if name in published else 0.0, norm, rtol=1e-4, atol=1e-5)
    for key, value in recorded(case).items():
        if key.startswith("grad/"):
            assert_close(published[key.removeprefix("grad/")], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in cases("outer") if "published_defect" in c.record], ids=str)
def test_sparing_padding_keeps_a_genuine_eos(case: Case):
    inputs = tensors(case.family, "inputs.safetensors")
    ids, labels, is_padding = (
        inputs["input_ids"].clone(),
        inputs["labels"].clone(),
        inputs["attention_mask_2d"] == 0,
    )
    ids[0, -1] = labels[0, -1] = PAD
    ours = learnable(labels, None, is_padding, spare_padding=True)
    assert ours[0, -1]
    assert not ours[is_padding].any()
    assert positions_of(ours & (ids == PAD)).numel() == 1
