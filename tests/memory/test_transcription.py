"""The plain transcription that benchmarks compare with is the method: same losses, from its own full passes."""

import importlib.util
from pathlib import Path

import torch
from torch.testing import assert_close

from memdlm.memory import Anchor, MemoryConfig, ParametricMemory, run_inner_loop, trajectory
from memdlm.models import LLaDAMoEConfig, ModelDenoiser, build_model
from tiny import MASK, V, inner_loss, random_ids, rng

PATH = Path(__file__).parents[2] / "benchmarks" / "plain.py"


def load():
    spec = importlib.util.spec_from_file_location("plain", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def moe():
    config = LLaDAMoEConfig(
        vocab_size=V,
        hidden_size=32,
        expert_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_experts=6,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return build_model(config, seed=0).eval()


def test_the_plain_write_follows_the_same_losses():
    plain, model, looped, ids = load(), moe(), moe(), random_ids(1, 24)
    # alpha / rank = 2, which the transcription has as a number.
    config = MemoryConfig(num_inner_steps=4, inner_lr=2.0, inner_rank=4, inner_alpha=8.0)
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    g = rng(1)
    anchor = Anchor(
        clean=ids,
        is_maskable=torch.ones_like(ids, dtype=torch.bool),
        is_masked=torch.rand(ids.shape, generator=g) < 0.3,
        t=torch.full((1,), 0.3),
    )
    path = memory.strategy.path(anchor, lambda: torch.rand(ids.shape, generator=g))
    steps = trajectory(path, anchor, mask_token_id=MASK, scored="student_masked")
    memory.fast.reset(1, rng(2))
    start = {
        name.split(".")[-2]: value[:, 0].detach() for name, value in memory.fast.named().items() if "lora_A" in name
    }
    theirs = plain.write(
        looped, plain.loop_experts(looped), ids, [step.is_masked for step in steps], start, MASK, lr=2.0
    )
    with memory.fast.attached():
        ours = run_inner_loop(
            steps, fast=memory.fast, loss=memory.loss, update=memory.update, denoise=ModelDenoiser(model)
        )
    assert_close(ours.losses[:, 0].tolist(), theirs, rtol=1e-5, atol=0)
    memory.fast.reset(1, rng(2))
    unwritten = [float(inner_loss(memory, ModelDenoiser(model), step)) for step in steps]
    assert abs(unwritten[-1] - theirs[-1]) > 0.05 * theirs[-1], "the memory must matter for this to compare anything"
