"""NaN is an error: no token, score, loss or memory comes out of a network or a memory that holds it."""

import dataclasses
import math

import pytest
import torch

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.diffusion.sampling import TokenSampler, denoise_canvas
from memdlm.errors import ConfigError, MemoryFileError, NotFiniteError
from memdlm.evaluation.exposure_bias import exposure_bias
from memdlm.evaluation.masked_loss import masked_loss, masked_text
from memdlm.evaluation.prompts import PaddedBatch
from memdlm.inference import GenerationConfig, generate, infill, score, stream
from memdlm.memory import MemoryConfig, ParametricMemory, concatenate
from memdlm.models import LoRAOptions
from memdlm.training import DiffusionConfig
from memdlm.types import Denoise
from memdlm.workflows.sessions.decoding import DecodingOptions
from tiny import V, random_ids, rng, tiny

WORDS = build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])
MASK = WORDS.mask_token_id
SHORT = GenerationConfig(max_new_tokens=3)
every_value = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


def poisoned(family, value=math.nan):
    """A network with one weight that is no number, which every answer depends on."""
    model = tiny(family)
    with torch.no_grad():
        model.model.norm.weight[3] = value
    return model


def memory_of(model, **options):
    options = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, **options}
    return ParametricMemory(model, MemoryConfig(**options), mask_token_id=MASK)


@every_value
@pytest.mark.parametrize("family", ["llada", "lladamoe", "llada2", "small"])
def test_nothing_comes_out_of_weights_that_are_no_numbers(family, value):
    model, ids = poisoned(family, value), random_ids(1, 8)[0]
    is_causal = family == "llada2"  # which draws no order
    text = masked_text(ids, ratio=0.5, views=1, generator=rng())
    prompt_of_two = PaddedBatch(
        ids=ids[None], attention_mask=torch.ones(1, 8, dtype=torch.bool), is_target=torch.arange(8)[None] > 3
    )
    for call in (
        lambda: generate(model, WORDS, ["w01 w02"], SHORT),
        lambda: generate(
            model, WORDS, ["w01 w02"], SHORT if is_causal else dataclasses.replace(SHORT, remasking="random")
        ),
        lambda: generate(model, WORDS, ["w01 w02"], dataclasses.replace(SHORT, cfg_scale=1.0)),
        lambda: next(stream(model, WORDS, ["w01 w02"], SHORT)),
        lambda: infill(model, WORDS, [[3, MASK, 4]], SHORT),
        lambda: score(model, ids[:4], ids[4:], 4, mask_token_id=MASK),
        lambda: masked_loss(model, text, mask_token_id=MASK),
        lambda: exposure_bias(model, [prompt_of_two], mask_token_id=MASK, steps=2, seed=0),
        lambda: memory_of(model, prompt_mask_ratio=1.0).write(ids[None]).__enter__(),
    ):
        with pytest.raises(NotFiniteError, match=r"model's weights hold NaN or infinity, first in model.norm.weight"):
            call()


def test_of_ours_minus_infinity_is_no_error():
    """Suppressed tokens, top-k and top-p leave -inf in the logits; those are not the network's."""
    options = GenerationConfig(max_new_tokens=4, suppress_tokens=(3, 4), top_k=2, top_p=0.5, temperature=0.7)
    assert generate(tiny("llada"), WORDS, ["w01 w02"], options, generator=rng()).unresolved == 0


class Fading(Denoise):
    """Sound logits, until the pass with the given number."""

    def __init__(self, bad):
        self.bad, self.passes = bad, 0

    def logits(self, ids, positions):
        self.passes += 1
        logits = torch.randn(len(positions), V, generator=rng(self.passes))
        return logits * math.nan if self.passes == self.bad else logits

    def hidden(self, ids, positions):
        raise NotImplementedError


@pytest.mark.parametrize("bad", [1, 3, 4])
@pytest.mark.parametrize("is_free", [True, False])
def test_a_step_that_fails_late_is_noticed_in_whatever_step(bad, is_free, monkeypatch):
    """Where reading a flag would be a wait, the next wait finds it: the network is not asked again."""
    ids = torch.full((1, 4), MASK)
    is_open = torch.ones_like(ids, dtype=torch.bool)
    blocks = [torch.arange(4)[None] < 2, torch.arange(4)[None] >= 2]
    if not is_free:
        monkeypatch.setattr(
            "memdlm.diffusion.sampling._Logits.see",
            lambda self, logits: setattr(self, "are_finite", self.are_finite & logits.isfinite().all()),
        )
    denoise, seen = Fading(bad), []
    with pytest.raises(NotFiniteError):
        seen.extend(
            denoise_canvas(denoise, ids, is_open, blocks, sampler=TokenSampler(mask_token_id=MASK), steps_per_block=2)
        )
    assert denoise.passes == bad


@pytest.mark.parametrize("options", [{"num_inner_steps": 2}, {"num_inner_steps": 4, "num_inner_epochs": 2}], ids=str)
def test_a_write_that_blows_up_is_refused_and_leaves_nothing(options, tmp_path):
    model, ids = tiny("llada"), random_ids(1, 24)
    before = [parameter.clone() for parameter in model.parameters()]
    memory = memory_of(model, inner_lr=1e6, inner_alpha=1e6, inner_grad_clip=0.0, **options)
    with pytest.raises(NotFiniteError, match="weights are finite, so the memory"), memory.write(ids):
        memory.save(tmp_path / "doc.mem")
    assert not (tmp_path / "doc.mem").exists()
    assert not any(module._forward_hooks for module in model.modules())
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))


def test_in_training_mode_nothing_is_read_but_nothing_is_kept_either(tmp_path):
    model = tiny("small").train()
    memory = memory_of(model)
    with memory.write(random_ids(2, 9), generator=rng()):
        values = memory.fast.tensors()
        memory.fast.replace([value.detach().index_fill(-3, torch.tensor([1]), math.nan) for value in values])
        memory.save(tmp_path / "row0.mem", row=0)
        with pytest.raises(NotFiniteError):
            memory.save(tmp_path / "row1.mem", row=1)
    assert [path.name for path in tmp_path.iterdir()] == ["row0.mem"]


def test_an_exported_memory_that_became_nan_is_not_recalled():
    model = tiny("small")
    memory = memory_of(model)
    with memory.write(random_ids(1, 9), generator=rng()):
        kept = memory.export()
    for weight in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="weights"):
            concatenate([kept, kept], [weight, 1.0])
    next(iter(kept.pairs.values()))["A"][0, 0] = math.inf
    with pytest.raises(MemoryFileError, match="NaN or infinity"), memory.recall(kept):
        pass
    assert not any(module._forward_hooks for module in model.modules())


# Options ------------------------------------------------------------------------------------------------------------


def floats():
    for kind in (GenerationConfig, MemoryConfig, DiffusionConfig, LoRAOptions):
        for field in dataclasses.fields(kind):
            if "float" in str(field.type):
                yield kind, field.name


@every_value
@pytest.mark.parametrize(("kind", "name"), floats(), ids=str)
def test_no_option_takes_nan_or_infinity(kind, name, value):
    with pytest.raises(ConfigError, match=name):
        kind(**{name: value})


def whole_numbers():
    for kind in (GenerationConfig, MemoryConfig, DiffusionConfig, LoRAOptions):
        for field in dataclasses.fields(kind):
            if "int" in str(field.type) and "tuple" not in str(field.type) and field.name != "chunk_length":
                yield kind, field.name


@pytest.mark.parametrize(("kind", "name"), whole_numbers(), ids=str)
@pytest.mark.parametrize("value", [10**9, 10**30, 10**5000, -1], ids=["1e9", "1e30", "1e5000", "-1"])
def test_no_option_takes_a_number_that_cannot_be_meant(kind, name, value):
    if name == "top_k" and value == 10**9:
        return  # all tokens: nothing is filtered
    with pytest.raises(ConfigError) as refused:
        kind(**{name: value})
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": (1.5,)},
        {"suppress_tokens": 5},
        {"suppress_tokens": "12"},
        {"begin_suppress_tokens": [True]},
        {"cfg_keep_tokens": (10**30,)},
        {"temperature": 1e-300},
    ],
    ids=str,
)
def test_lists_and_temperatures_are_checked_too(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        GenerationConfig(**options)


@pytest.mark.parametrize(
    "mix", ["nan,1,1", "inf,1,1", "1,1", "1,1,1,1,1", "1e400,1,1", "1e308,1e308,1", "a,b,c", "0,0,0"]
)
def test_shares_are_numbers(mix):
    with pytest.raises(ConfigError, match="mem_batch_mix"):
        MemoryConfig(batch_mix=mix, batch_reach=4, write_source="prompt")


def test_other_options_are_validated_too():
    with pytest.raises(ConfigError, match="seed"):
        DecodingOptions(model="m", seed=10**30)
