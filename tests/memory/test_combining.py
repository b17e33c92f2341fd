"""Memories put together and made smaller: the arithmetic is exact, and what cannot be added is refused."""

import pytest
import torch
from torch.testing import assert_close

from memdlm.errors import ConfigError, MemoryFileError
from memdlm.memory import MemoryConfig, ParametricMemory, average, compress, concatenate, read_memory
from tiny import CONFIGS, MASK, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
SHAPE = {
    "inner_rank": 4,
    "inner_alpha": 8.0,
    "inner_layer_fraction": 0.5,
    "inner_lr": 1.0,
    "masking_strategy": "strided",
}
LORA = MemoryConfig(**SHAPE)
FULL = MemoryConfig(inner_adapter_type="full", inner_layer_fraction=0.5, inner_lr=1.0, masking_strategy="strided")
LEARNED = MemoryConfig.recall(**SHAPE, strides=2)


def memory_of(model, config=LORA):
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    if memory.learned is not None:
        for tensor in memory.learned.parameters():
            tensor.data += 0.3 * torch.randn(tensor.shape, generator=rng(5)).to(tensor)
    return memory


def kept(memory, count=3):
    found = []
    for seed in range(count):
        with memory.write(random_ids(1, 3, seed=seed)):
            found.append(memory.export())
    return found


def deltas(saved):
    """What is added to every module, those without a pair included."""
    out = {}
    for layer in saved.layers:
        for module in layer.modules():
            pair = saved.pairs.get(module)
            nothing = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
            out[module] = nothing if pair is None else saved.scale * pair["B"].double() @ pair["A"].double()
    return out


@every_family
@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_a_concatenation_adds_exactly_the_sum_and_an_average_the_mean(family, config, tmp_path):
    memory = memory_of(tiny(family, torch.float64), config)
    parts = kept(memory)
    expected = [deltas(each) for each in parts]
    for weights in ([1.0, 1.0, 1.0], [0.5, -2.0, 1.5]):
        joined = concatenate(parts, weights)
        assert joined.rank == sum(each.rank for each in parts)
        for module, found in deltas(joined).items():
            wanted = sum(w * each[module] for w, each in zip(weights, expected, strict=True))
            assert_close(found, wanted, rtol=0, atol=1e-14)
    mean = average(parts)
    for module, found in deltas(mean).items():
        assert_close(found, sum(each[module] for each in expected) / 3, rtol=0, atol=1e-14)
    mean.save(tmp_path / "mean.mem")
    assert read_memory(tmp_path / "mean.mem").provenance["tokens"] == 9


@every_family
@torch.no_grad()
def test_the_model_reads_a_concatenation_as_the_sum_of_its_parts(family, tmp_path):
    """One adapted layer, so that additions to its output do not act on each other: down_proj of the last block."""
    model, ids = tiny(family, torch.float64), random_ids(2, 9, seed=4)
    config = MemoryConfig(**{**SHAPE, "inner_layer_fraction": 0.3}, inner_target_modules="down_proj")
    memory, seen = memory_of(model, config), []
    model.model.layers[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    parts = kept(memory, 2)
    concatenate(parts).save(tmp_path / "both.mem")
    seen.clear()
    model(ids)
    for each in [*parts, tmp_path / "both.mem"]:
        with memory.recall(each):
            model(ids)
    plain, first, second, both = seen
    assert_close(both - plain, (first - plain) + (second - plain), rtol=0, atol=1e-12)
    assert (both - plain).abs().max() > 1e-3


def test_a_learned_start_is_counted_once():
    memory = memory_of(tiny("small", torch.float64), LEARNED)
    parts, start = kept(memory, 2), memory.unwritten()
    assert start.provenance["tokens"] == 0
    first, second, begun = deltas(parts[0]), deltas(parts[1]), deltas(start)
    assert max(each.abs().max() for each in begun.values()) > 1e-3
    for module, found in deltas(concatenate(parts, start=start)).items():
        assert_close(found, first[module] + second[module] - begun[module], rtol=0, atol=1e-14)
    for module, found in deltas(average(parts)).items():
        assert_close(found, (first[module] + second[module]) / 2, rtol=0, atol=1e-14)
    with pytest.raises(ConfigError, match="begin at a learned start, which their sum would count 2 times"):
        concatenate(parts)
    plain = memory_of(tiny("small", torch.float64))
    with pytest.raises(ConfigError, match="no learned start"):
        plain.unwritten()
    with pytest.raises(MemoryFileError, match="cannot be combined"):
        concatenate(kept(plain, 2), start=start)


@every_family
def test_a_compression_is_the_best_of_its_rank_and_says_its_error(family):
    memory = memory_of(tiny(family, torch.float64))
    whole = concatenate(kept(memory))
    small = compress(whole, 2)
    assert (small.rank, small.targets, small.scale) == (2, whole.targets, whole.scale)
    before, after = deltas(whole), deltas(small)
    lost = total = 0.0
    for module, delta in before.items():
        singular = torch.linalg.svdvals(delta)
        assert_close((delta - after[module]).norm(), singular[2:].norm(), rtol=1e-9, atol=1e-12)
        lost, total = lost + singular[2:].square().sum(), total + singular.square().sum()
    error = small.provenance["compression"]
    assert error["from_rank"] == whole.rank
    assert 0 < error["relative_error"] <= error["worst_module"] <= 1
    assert abs(error["relative_error"] - (lost / total).sqrt()) < 1e-9
    assert compress(whole, whole.rank - 1).num_parameters < whole.num_parameters
    for rank in (0, whole.rank):
        with pytest.raises(ConfigError, match="rank must be from 1 to"):
            compress(whole, rank)


def test_what_belongs_to_different_models_is_not_added():
    one, other = kept(memory_of(tiny("small")), 1), kept(memory_of(tiny("small", seed=1)), 1)
    with pytest.raises(MemoryFileError, match="cannot be combined: of the first, it was written for other base"):
        concatenate([*one, *other])
    narrow = kept(memory_of(tiny("small"), MemoryConfig(**SHAPE, inner_target_modules="down_proj")), 1)
    with pytest.raises(MemoryFileError, match="different projections"):
        concatenate([*one, *narrow])
    with pytest.raises(ConfigError, match="0 memories"):
        average([])
    with pytest.raises(ConfigError, match="1 memories and 2 weights"):
        concatenate(one, [1, 2])
