"""The outer loss and its gradients equal the published trainer's, with and without memory."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close
from transformers.core_model_loading import revert_weight_conversion

from goldens import Case, cases, model, tensors
from memdlm.diffusion import Corrupted, Linear, masked_loss, normalise, positions_of
from memdlm.memory import Anchor, MemoryConfig, ParametricMemory, TrajectoryStep, run_inner_loop
from memdlm.models import LLaDAConfig, ModelDenoiser
from memdlm.training.outer import learnable
from memory_replay import join

pytestmark = pytest.mark.golden
MASK, PAD = 505, 500


def maskable_of(case: Case, inputs) -> torch.Tensor:
    is_maskable = inputs["labels"] != -100
    if "padunmask" in case.name:
        # The published rule, which takes every pad id for padding (the recorded defect).
        is_maskable &= inputs["input_ids"] != PAD
    return is_maskable


def recorded_states(case: Case, inputs, anchor: Anchor) -> list[torch.Tensor]:
    """Ids of the inner states: recorded, or rebuilt from the recorded random permutations."""
    data, name = tensors(case.family, "outer.safetensors"), case.name.split(":")[1]
    if f"{name}/inner_step0_input_ids" in data:
        return [data[f"{name}/inner_step{k}_input_ids"] for k in range(2)]
    first, rows = anchor.is_masked.clone(), anchor.clean.shape[0]
    for row, order in enumerate(case.record["randperm_calls"][:rows]):
        free = (anchor.is_maskable[row] & ~anchor.is_masked[row]).nonzero().squeeze(1)
        total, k = int(anchor.is_maskable[row].sum()), int(anchor.is_masked[row].sum())
        count = min(total, max(k, int(1.5 * k))) - k
        first[row, free[torch.tensor(order)[:count]]] = True
    return [anchor.clean.masked_fill(each, MASK) for each in (first, anchor.is_masked)]


def written(case: Case, network, inputs, anchor: Anchor):
    """A context in which the recorded memory is open, or none."""
    options = {k.removeprefix("mem_"): v for k, v in case.record["trainer_kwargs"].items() if k.startswith("mem_")}
    if not options.pop("enabled"):
        return None
    if isinstance(network.config, LLaDAConfig):
        # The published code finds only this one of its default names in the dense family.
        options.setdefault("inner_target_modules", "up_proj")
    config = MemoryConfig(
        **options,
        loss_weight_type=case.record["trainer_kwargs"].get("loss_weight_type", "scheduler"),
        loss_norm_type=case.record["trainer_kwargs"].get("loss_norm_type", "token"),
        per_sample=False,
    )
    memory = ParametricMemory(network, config, mask_token_id=MASK)
    memory.fast.reset(1, torch.Generator())
    memory.fast.assign(join(tensors(case.family, "inner_A0.safetensors"), memory.fast.named(), case.family))
    steps = []
    for ids in recorded_states(case, inputs, anchor):
        is_masked = (ids == MASK) & anchor.is_maskable
        t = is_masked.sum(-1) / anchor.is_maskable.sum(-1)
        steps.append(
            TrajectoryStep(
                clean=anchor.clean,
                ids=ids,
                is_masked=is_masked,
                is_scored=is_masked,
                next_ids=anchor.clean,
                t=t,
            )
        )
    return memory, steps


@pytest.mark.parametrize("case", [c for c in cases("outer") if "loss" in c.record], ids=str)
def test_outer_loss_and_gradients(case: Case):
    record, inputs = case.record, tensors(case.family, "inputs.safetensors")
    options = record["trainer_kwargs"]
    network = copy.deepcopy(model(case.family)).train()
    is_maskable = maskable_of(case, inputs)
    is_masked = inputs["mem_masked_mask"] & is_maskable
    anchor = Anchor(clean=inputs["input_ids"], is_maskable=is_maskable, is_masked=is_masked, t=inputs["mem_t"])
    memory = written(case, network, inputs, anchor)
    with memory[0].fast.attached() if memory else nullcontext():
        denoise = ModelDenoiser(network)
        if memory:
            inner = run_inner_loop(
                memory[1], fast=memory[0].fast, loss=memory[0].loss, update=memory[0].update, denoise=denoise
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
    name = case.name.split(":")[1]
    for key, value in tensors(case.family, "outer.safetensors").items():
        if key.startswith(f"{name}/grad/"):
            assert_close(published[key.removeprefix(f"{name}/grad/")], value, rtol=1e-4, atol=1e-5)


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
