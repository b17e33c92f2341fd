"""More (expert, sample) groups than one grouped product takes: rows of memories go in static chunks."""

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.inference import GenerationConfig, generate
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import LLaDA2MoeConfig, LLaDAMoEConfig
from memdlm.models.blocks import experts
from memdlm.models.blocks.experts import MAX_GROUPS, grouped_linear, looped_linear, sample_chunks
from memdlm.randomness import derive
from tiny import MASK, V, random_ids, tiny

mixtures = pytest.mark.parametrize("family", ["lladamoe", "llada2"])


def memory_of(model, preset=MemoryConfig, **options):
    options = {"inner_rank": 4, "inner_alpha": 8.0, "inner_layer_fraction": 0.5, "inner_lr": 0.7, **options}
    return ParametricMemory(model, preset(**options), mask_token_id=MASK)


def generators(rows):
    return [derive("row", row) for row in range(rows)]


@given(num_experts=st.integers(1, 1500), samples=st.integers(1, 3000))
def test_chunks_cover_the_samples_and_stay_below_the_limit(num_experts, samples):
    chunks = sample_chunks(num_experts, samples)
    assert [start for start, _ in chunks] == [0, *torch.tensor([n for _, n in chunks]).cumsum(0).tolist()[:-1]]
    assert sum(count for _, count in chunks) == samples
    assert all(count == 1 or count * num_experts <= MAX_GROUPS for _, count in chunks)
    counts = [count for _, count in chunks]
    assert max(counts) - min(counts) <= 1


def test_fifteen_hundred_groups_equal_the_loop():
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 3, (1500,), generator=g)
    x, weight = torch.randn(int(sizes.sum()), 8, generator=g), torch.randn(1500, 4, 8, generator=g)
    ends = sizes.cumsum(0).to(torch.int32)
    assert_close(grouped_linear(x, weight, ends), looped_linear(x, weight, ends))


def shipped():
    """(recipe, experts of its network, rows of a batch) of all recipes for mixtures of experts."""
    published = {"llada21": LLaDA2MoeConfig().num_experts, "llada_moe": LLaDAMoEConfig().num_experts}
    for path in sorted((Path(__file__).parents[2] / "src" / "memdlm" / "recipes").glob("*.yaml")):
        for family, num_experts in published.items():
            if path.name.startswith(family):
                options = yaml.safe_load(path.read_text())
                for kind in ("train", "eval"):
                    yield pytest.param(num_experts, options[f"per_device_{kind}_batch_size"], id=f"{path.stem}-{kind}")


@pytest.mark.parametrize(("num_experts", "rows"), shipped())
def test_a_shipped_recipe_asks_for_no_more_groups_than_a_gpu_takes(num_experts, rows):
    """With a memory for each row, the most that a recipe's options can ask for."""
    assert num_experts in (64, 256)
    assert max(count * num_experts for _, count in sample_chunks(num_experts, rows)) <= MAX_GROUPS


@mixtures
@torch.no_grad()
def test_many_memories_in_one_call_are_each_read_as_alone(family, monkeypatch):
    model = tiny(family, torch.float64)
    rows = 1500 // model.config.num_experts
    seen = []
    route = experts.route
    monkeypatch.setattr(experts, "route", lambda *each: seen.append(each[1] * each[2]) or route(*each))
    memory, ids, asked = memory_of(model), random_ids(rows, 6), random_ids(rows, 5, seed=1)
    with memory.write(ids, generator=generators(rows)) as written:
        together = model(asked).logits
    assert max(seen) <= MAX_GROUPS
    assert sum(seen[-2:]) >= 1490, "the last layer's two chunks hold all groups"
    for row in (0, 1, rows // 2, rows - 1):
        with memory.write(ids[row : row + 1], generator=[generators(rows)[row]]) as alone:
            assert_close(model(asked[row : row + 1]).logits, together[row : row + 1])
        assert_close(written.losses[:, row], alone.losses[:, 0])


@mixtures
@pytest.mark.parametrize("options", [{}, {"inner_dropout": 0.5}, {"inner_adapter_type": "full"}], ids=str)
def test_chunks_change_nothing_in_writing_reading_and_training(family, options, monkeypatch):
    if "inner_adapter_type" in options:
        options = {**options, "inner_rank": 32, "inner_alpha": 64.0}
    found = []
    for limit in (MAX_GROUPS, 20):
        monkeypatch.setattr(experts, "MAX_GROUPS", limit)
        model, ids = tiny(family, torch.float64), random_ids(5, 9)
        with memory_of(model, **options).write(ids, generator=generators(5)) as written:
            loss = model(random_ids(10, 7, seed=1)).logits.log_softmax(-1)[..., 5].mean()
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([written.losses, written.grad_norms, loss.detach(), *gradients])
    for whole, chunked in zip(*found, strict=True):
        assert_close(chunked, whole)


@mixtures
def test_chunks_change_nothing_in_the_exact_gradient(family, monkeypatch):
    found = []
    for limit in (MAX_GROUPS, 20):
        monkeypatch.setattr(experts, "MAX_GROUPS", limit)
        model = tiny(family, torch.float64)
        memory = memory_of(model, MemoryConfig.recall, inner_target_modules="up_proj,down_proj")
        with memory.write(random_ids(4, 9), generator=generators(4)):
            model(random_ids(4, 7, seed=1)).logits.log_softmax(-1)[..., 5].mean().backward()
        found.append([p.grad for p in [*model.parameters(), *memory.learned.parameters()] if p.grad is not None])
    assert len(found[0]) > 10
    for whole, chunked in zip(*found, strict=True):
        assert_close(chunked, whole)


@mixtures
def test_chunks_change_nothing_in_decoding(family, monkeypatch):
    tokenizer = build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])
    sequences = []
    for limit in (MAX_GROUPS, 20):
        monkeypatch.setattr(experts, "MAX_GROUPS", limit)
        model = tiny(family, torch.float64)
        done = generate(
            model,
            tokenizer,
            [row.tolist() for row in random_ids(5, 6)],
            GenerationConfig(max_new_tokens=8, steps=4, block_size=8),
            memory=ParametricMemory(
                model,
                MemoryConfig(inner_layer_fraction=0.5, inner_rank=4, inner_alpha=16.0, inner_lr=1.0),
                mask_token_id=tokenizer.mask_token_id,
            ),
            generator=generators(5),
        )
        sequences.append([row.tolist() for row in done.sequences])
    assert sequences[0] == sequences[1]
