"""examples/memory_from_scratch.py is numerically the library."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.modeling_outputs import MaskedLMOutput

from memdlm.diffusion import (
    Corrupted,
    Linear,
    TokenSampler,
    corrupt,
    denoise_canvas,
    masked_loss,
    normalise,
)
from memdlm.memory import Anchor, MemoryConfig, ParametricMemory, run_inner_loop, trajectory
from memdlm.models import ModelDenoiser

PATH = Path(__file__).parents[1] / "examples" / "memory_from_scratch.py"
M, V, L, B = 15, 16, 12, 3


def load():
    spec = importlib.util.spec_from_file_location("memory_from_scratch", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load()


class Wrapped(nn.Module):
    """The example's network, called the way the library calls models."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, input_ids, attention_mask=None, positions=None):
        logits = self.network(input_ids)
        return MaskedLMOutput(logits=logits if positions is None else logits.flatten(0, 1)[positions])


@pytest.fixture
def setting():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = example.Denoiser(V).double()
    g = torch.Generator().manual_seed(7)
    clean = torch.randint(0, M, (B, L), generator=g)
    is_maskable = torch.rand(B, L, generator=g) < 0.8
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    u = torch.rand(B, L, generator=g)
    noised, is_anchor = example.corrupt(clean, is_maskable, t, u, M)
    return network, clean, is_maskable, t, u, noised, is_anchor


def test_the_file_is_short_and_stands_alone():
    text = PATH.read_text()
    assert len(text.splitlines()) < 200
    assert "import memdlm" not in text
    assert "from memdlm" not in text


def test_corruption_is_the_library_s(setting):
    _, clean, is_maskable, t, u, noised, is_anchor = setting
    ours = corrupt(clean, is_maskable, t, u, schedule=Linear(), mask_token_id=M)
    assert ours.ids.equal(noised)
    assert ours.is_masked.equal(is_anchor)


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_trajectory_write_and_outer_loss_are_the_library_s(setting, steps):
    network, clean, is_maskable, t, _, noised, is_anchor = setting
    u = torch.rand(B, L, generator=torch.Generator().manual_seed(9))
    states = example.trajectory(is_anchor, is_maskable, u, steps=steps)

    model = Wrapped(network)
    config = MemoryConfig(
        num_inner_steps=steps,
        inner_rank=4,
        inner_alpha=8.0,
        inner_layer_fraction=0.5,
        inner_target_modules="down",
        per_sample=False,
    )
    memory = ParametricMemory(model, config, mask_token_id=M)
    anchor = Anchor(clean=clean, is_maskable=is_maskable, is_masked=is_anchor, t=t)
    path = trajectory(config.strategy().path(anchor, lambda: u), anchor, mask_token_id=M, scored="student_masked")
    assert [step.is_masked.tolist() for step in path] == [state.tolist() for state in states]

    memory.fast.reset(1, torch.Generator().manual_seed(0))
    a = memory.fast.named()["network.blocks.1.down.lora_A"][0].detach()
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        try:
            fast, losses = example.write(network, clean, states, a, M)
        finally:
            torch.set_default_dtype(torch.float32)
    with memory.fast.attached():
        written = run_inner_loop(
            path, fast=memory.fast, loss=memory.loss, update=memory.update, denoise=ModelDenoiser(model)
        )
        assert_close(written.losses[:, 0].tolist(), losses)
        assert_close([value[0].detach() for value in memory.fast.tensors()], list(fast))
        lost = masked_loss(ModelDenoiser(model), clean, Corrupted(noised, is_anchor, t), is_maskable, schedule=Linear())
        ours = normalise(lost.sums, lost.counts, "token").squeeze()
    assert_close(ours, example.outer_loss(network(noised, fast), clean, is_anchor, is_maskable, t))


def test_decoding_is_the_library_s(setting):
    network, clean, *_ = setting
    prompt = clean[0, :5]
    theirs = example.generate(network, prompt, 6, M)
    ids = torch.cat((prompt, torch.full((6,), M)))[None]
    is_open = ids == M
    for step in denoise_canvas(
        ModelDenoiser(Wrapped(network)),
        ids,
        is_open,
        [is_open],
        steps_per_block=6,
        sampler=TokenSampler(mask_token_id=M),
    ):
        final = step.ids
    assert final[0].equal(theirs)


def test_it_runs_and_learns():
    out = subprocess.run([sys.executable, str(PATH)], capture_output=True, text=True, check=True).stdout
    first, last = (float(word) for word in out.splitlines()[0].split(":")[1].split(" nats")[0].split("->"))
    assert last < 0.5 * first
