"""A write, a decoding step and a training step wait for the device where the rehearsal says, and nowhere else.

In bfloat16, where experts are one grouped product: in other types torch itself loops over them, and waits. On cards
before Hopper it does so in bfloat16 too, so there the mixtures are left out.
"""

import pytest
import torch

from gpu.waiting import waits_of
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.diffusion import Linear
from memdlm.inference import GenerationConfig, generate
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.randomness import derive
from memdlm.training.outer import memory_of, noise_batch, score
from memdlm.training.rows import PROMPT_WIDTH, prompt_width
from rehearsal.test_rehearsal import (
    BLOCKS,
    DECODED,
    IDS,
    LEARN,
    LEARNED,
    SCORE,
    SOUND,
    TEXTS,
    WRITE,
    WRITTEN,
    config_of,
)
from tiny import CONFIGS, MASK, V, tiny

MIXTURES = ("llada2", "lladamoe")
every_family = pytest.mark.parametrize("family", sorted(CONFIGS))


@pytest.fixture(autouse=True)
def _one_grouped_product(request, device):
    family = request.node.callspec.params.get("family")
    if device.type == "cuda" and family in MIXTURES and torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("torch's grouped product is a loop that waits before Hopper")


def allowed(*tables):
    """Return the tables of the rehearsal without the kinds of wait, which the device does not tell."""
    return {place: count for table in tables for (_, place), count in table.items()}


def expect(waits, device, *tables):
    assert dict(waits) == (allowed(*tables) if device.type == "cuda" else {})


def test_a_wait_is_told(device):
    x = torch.ones(3, device=device)
    with waits_of(device) as waits:
        x.sum().item()
        x.nonzero()
        x.cpu()
        x + 1
    expect(waits, device, {("", "elsewhere"): 3})


def warmed(run):
    """Return what a second call gives: the first loads kernels and allocates."""
    run()
    return run()


@every_family
@pytest.mark.parametrize("options", [{}, {"per_sample": False}, {"inner_loss_type": "distill"}], ids=str)
def test_a_write(family, options, device):
    memory = ParametricMemory(tiny(family, torch.bfloat16).to(device), config_of(**options), mask_token_id=MASK)
    ids = IDS.to(device)

    def run():
        with waits_of(device) as waits:
            with memory.write(ids, generator=[derive("row", row) for row in range(2)]):
                pass
        return waits

    expect(warmed(run), device, WRITTEN)


@every_family
@pytest.mark.parametrize("name", [name for name in DECODED if name != "approximate"])
def test_decoding(family, name, device):
    if name == "random order" and family == "llada2":
        pytest.skip("LLaDA2.x always looks at confidences")
    tokenizer = build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])
    model = tiny(family, torch.bfloat16).to(device)
    config = GenerationConfig(**{"max_new_tokens": 8, "steps": 4, "block_size": 4, **DECODED[name]})

    def run():
        with waits_of(device) as waits:
            done = generate(model, tokenizer, [[5, 6, 7], [8, 9, 10, 11]], config)
        return waits, done.num_forward_passes // (2 if name == "guidance" else 1)

    waits, steps = warmed(run)
    assert waits.pop(LEARN[1], 0) <= steps + BLOCKS
    assert waits.pop(SOUND[1], 0) <= BLOCKS + 1
    expect(waits, device, TEXTS)


@every_family
@pytest.mark.parametrize("preset", ["first order", "exact"])
def test_a_training_step(family, preset, device):
    model = tiny(family, torch.bfloat16).to(device).train()
    config = config_of(MemoryConfig.recall, **LEARNED) if preset == "exact" else config_of(write_source="prompt")
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    parameters = [*model.parameters(), *([] if memory.learned is None else memory.learned.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    labels = IDS.masked_fill(torch.arange(16) < 6, -100)
    width = prompt_width(labels, None, None)
    inputs = {"input_ids": IDS.to(device), "labels": labels.to(device), PROMPT_WIDTH: width}
    t, draws = torch.tensor([0.4, 0.8]).to(device), torch.rand(IDS.shape, generator=derive("noise")).to(device)

    def run():
        with waits_of(device) as waits:
            batch = noise_batch(
                inputs, t, draws, schedule=Linear(), epsilon=1e-3, mask_token_id=MASK, spare_padding=False
            )
            with memory_of(memory, batch, pad_token_id=0, randomness=[derive("row", row) for row in range(2)]):
                lost = score(model, batch, schedule=Linear(), weighting="scheduler", lower_layers=memory.lower_layers)
                lost.sums.sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return waits

    expect(warmed(run), device, WRITE, SCORE)
