"""Without a GPU, what would go wrong on one: mixed devices, and waits for the device on hot paths.

Everything runs on the device double of `double.py`, beside the same on the CPU: results must agree, and the waits must
be those of the tables here, no more.
"""

import concurrent.futures

import pytest
import torch
from torch.testing import assert_close

import memdlm
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.diffusion import Linear
from memdlm.inference import Decoder, GenerationConfig, generate
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.memory.inner_loop import LocalSGD
from memdlm.randomness import derive
from memdlm.serving import Engine, GenerationRequest, WriteRequest
from memdlm.training.finite import FiniteWatch
from memdlm.training.outer import memory_of, noise_batch, score
from memdlm.training.rows import PROMPT_WIDTH, prompt_width
from memdlm.training.tracking import Means
from rehearsal.double import DEVICE, OnDevice, counting, to_device
from tiny import CONFIGS, MASK, V, families, random_ids, tiny

BLOCK_CAUSAL = ("llada2", "sdar")
every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
IDS = random_ids(2, 16)
LEARNED = {"inner_target_modules": "up_proj,down_proj", "strides": 3}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


def config_of(preset=MemoryConfig, **options):
    return preset(**{"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 1.0, **options})


def both(family, dtype, run):
    """Return what `run(model, put)` gives on the CPU and on the double, and the double's waits."""
    host = run(tiny(family, dtype), lambda tensor: tensor.clone())
    with counting() as waits:
        found = run(to_device(tiny(family, dtype)), lambda tensor: OnDevice(tensor.clone()))
        found = [each.inner if isinstance(each, OnDevice) else each for each in found]
    return host, found, dict(waits)


def agree(host, found):
    assert len(host) == len(found) > 0
    for ours, theirs in zip(found, host, strict=True):
        # The two devices' attention differs in its last bits: errors count by the largest number, not by each.
        assert_close(ours, theirs, rtol=0, atol=2e-4 * max(1e-6, theirs.abs().max().item()))


# Waits ------------------------------------------------------------------------------------------------------------

WRITE = {("copy to host", "memory/trajectory.py:with_sizes"): 1}
"""Of a whole write: how many positions its states score."""
WRITTEN = {**WRITE, ("copy to host", "memory/files/exporting.py:check_written"): 1}
"""Of a write that is read outside training: also whether the memory is made of numbers, at its end."""
SCORE = {("nonzero", "diffusion/masking.py:positions_of"): 1}
"""Of an outer loss: which positions it scores."""
LEARN = ("copy to host", "diffusion/sampling.py:known")
"""Of decoding: which positions are open, once for a block and once for a step."""
TEXTS = {("copy to host", "inference/decoder.py:result"): 1}
"""Of a whole generation: the result."""
SOUND = ("item", "diffusion/sampling.py:check")
"""Of decoding: whether all logits were numbers, once for a block and once at the end."""
BLOCKS = 3
"""Of a row of at most 4 + 8 tokens in blocks of 4."""


@every_family
def test_a_forward_pass(family, dtype):
    def run(model, put):
        mask = torch.ones_like(IDS)
        mask[1, 12:] = 0
        with torch.no_grad():
            return [model(put(IDS)).logits, model(put(IDS), attention_mask=put(mask)).logits]

    host, found, waits = both(family, dtype, run)
    if dtype == torch.float32:  # in bfloat16 the two devices' attention rounds differently
        agree(host, found)
    assert waits == {}


@families("sdar", "mdlm", "small", "small_windowed", "llada_switches")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_sample": False},
        {"inner_loss_type": "distill"},
        {"masking_strategy": "strided"},
        {"masking_strategy": "progressive_memory"},
        {"inner_clip_scope": "global"},
        {"inner_adapter_type": "full", "inner_rank": 32, "inner_alpha": 64.0},
        {"inner_gradient_checkpointing": False},
    ],
    ids=str,
)
def test_a_write(family, options):
    def run(model, put):
        memory = ParametricMemory(model, config_of(**options), mask_token_id=MASK)
        with memory.write(put(IDS), generator=[derive("row", row) for row in range(2)] if not options else None) as w:
            with torch.no_grad():
                logits = model(put(IDS)).logits
            return [w.losses, w.grad_norms, logits]

    host, found, waits = both(family, torch.float32, run)
    agree(host, found)
    assert waits == WRITTEN


DECODED = {
    "plain": {},
    "all known": {"eos_early_stop": False},
    "sampled": {"temperature": 1.0},
    "top_p": {"temperature": 1.0, "top_p": 0.5},
    "threshold": {"threshold": 0.2},
    "random order": {"remasking": "random"},
    "guidance": {"cfg_scale": 1.0},
    "no cache": {"cache": "none"},
    "approximate": {"cache": "approximate"},
    "soft": {"soft_mask": True},
    "editing": {"steps": None, "threshold": 0.2, "editing_threshold": 0.1, "max_post_steps": 2},
}


@families("dream", "sdar", "mdlm", "llada_switches", "small", "small_windowed")
@pytest.mark.parametrize("name", DECODED)
@pytest.mark.parametrize("has_memory", [pytest.param(False, marks=pytest.mark.slow), True], ids=["bare", "memory"])
def test_decoding(family, name, has_memory):
    if name == "approximate" and family not in ("llada", "llada_switches", "lladamoe"):
        pytest.skip("kept states of a whole row are for these families alone")
    if name == "random order" and family in BLOCK_CAUSAL:
        pytest.skip("a block-causal family always commits what is surest")
    tokenizer = build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])

    def run(model, put):
        memory = ParametricMemory(model, config_of(), mask_token_id=tokenizer.mask_token_id) if has_memory else None
        config = GenerationConfig(**{"max_new_tokens": 8, "steps": 4, "block_size": 4, **DECODED[name]})
        done = generate(model, tokenizer, [[5, 6, 7], [8, 9, 10, 11]], config, memory=memory)
        steps.append(done.num_forward_passes // (2 if name == "guidance" else 1))
        return [row.cpu() for row in done.sequences]

    steps: list[int] = []
    host, found, waits = both(family, torch.float32, run)
    for ours, theirs in zip(found, host, strict=True):
        assert ours.equal(theirs)
    assert steps[0] == steps[1] > 0
    # Where a block's steps are known when it begins, there is nothing to wait for in it. LLaDA2.x looks at confidences.
    is_known = name == "all known" and family not in BLOCK_CAUSAL
    assert waits.pop(LEARN) <= BLOCKS + (0 if is_known else steps[1])
    assert not is_known or steps[1] > BLOCKS
    assert waits.pop(SOUND) <= BLOCKS + 1
    assert waits == {**TEXTS, **(WRITTEN if has_memory else {})}


class AtOnce(concurrent.futures.Executor):
    """The double's checks are those of one thread."""

    def __init__(self, *_, **__):
        super().__init__()

    def submit(self, function, /, *arguments):
        done = concurrent.futures.Future()
        done.set_result(function(*arguments))
        return done


SERVED = {
    ("copy to host", "serving/pool.py:_on_the_host"),  # what a step predicted: the only wait of every step
    ("copy to host", "inference/prompt_cache.py:restore"),  # of a response that joins: its prompt
    ("copy to host", "inference/prompt_cache.py:keep"),
    ("item", "memory/files/fingerprint.py:_weighed"),  # of a memory that is read or kept: what it was written for
    ("copy to host", "memory/files/packing.py:pack"),
    ("copy to host", "memory/files/packing.py:<listcomp>"),
    ("copy to host", "memory/files/exporting.py:provenance"),
    ("index by booleans", "memory/files/exporting.py:provenance"),
    ("copy to host", "memory/files/exporting.py:exported"),
    ("copy to host", "memory/files/exporting.py:check_written"),
    *WRITTEN,
}


@pytest.mark.parametrize("family", ["llada", "lladamoe", "llada2"])
def test_serving(family, monkeypatch):
    monkeypatch.setattr("memdlm.serving.memories.ThreadPoolExecutor", AtOnce)
    tokenizer = build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])
    asked = [{}, {"temperature": 1.0}, {"cfg_scale": 1.0}, {"threshold": 0.2, "editing_threshold": 0.1}]

    def run(model, put):
        engine = Engine(Decoder(model, tokenizer), slots=3)
        engine.write(WriteRequest(ids=IDS[0].tolist(), memory="text", config=config_of()))
        tickets = []
        for index, options in enumerate(asked):
            config = GenerationConfig(**{"max_new_tokens": 6, "block_size": 4, **options})
            memory = "text" if index % 2 else None
            tickets.append(engine.submit(GenerationRequest(prompt=[5, 6, 7, 8, 9], config=config, memory=memory)))
        while engine.step():
            pass
        figures.append(engine.figures())
        return [torch.tensor(ticket.result(0).ids) for ticket in tickets]

    figures = []
    host, found, waits = both(family, torch.float32, run)
    for ours, theirs in zip(found, host, strict=True):
        assert ours.equal(theirs)
    assert set(waits) <= SERVED
    # Three small copies for every pass and every sampler in it; the first of them waits.
    assert waits["copy to host", "serving/pool.py:_on_the_host"] <= 3 * len(asked) * figures[1].steps


@every_family
def test_scoring(family):
    def run(model, put):
        found = memdlm.score(model, put(IDS)[0], put(IDS)[1][:4], num_samples=4, mask_token_id=MASK)
        return [torch.tensor(float(found))]

    host, found, waits = both(family, torch.float32, run)
    agree(host, found)
    assert waits == {**SCORE, ("item", "diffusion/likelihood.py:monte_carlo_nll"): 1}


@families("sdar")
@pytest.mark.parametrize("preset", ["first_order", "exact", "gated", "response"])
def test_a_training_step(family, preset):
    def run(model, put):
        model.train()
        options = {
            "first_order": {"write_source": "prompt"},
            "exact": {"write_gate": "none"},
            "gated": {},
            "response": {"write_source": "response", "per_sample": False},
        }
        is_learned = preset in ("exact", "gated")
        make = MemoryConfig.recall if is_learned else MemoryConfig
        more = LEARNED if is_learned else {}
        memory = ParametricMemory(model, config_of(make, **more, **options[preset]), mask_token_id=MASK)
        if preset == "gated":
            # All gates alike are one gradient, clipped: what arrives at the bias is then rounding and nothing else.
            draw = torch.randn(memory.learned.gate.weight.shape, generator=derive("gate"))
            memory.learned.gate.weight.data.copy_(put(draw * 0.3))
        labels = IDS.masked_fill(torch.arange(16) < 6, -100)
        inputs = {"input_ids": put(IDS), "labels": put(labels), PROMPT_WIDTH: prompt_width(labels, None, None)}
        batch = noise_batch(
            inputs,
            put(torch.tensor([0.4, 0.8])),
            put(torch.rand(IDS.shape, generator=derive("noise"))),
            schedule=Linear(),
            epsilon=1e-3,
            mask_token_id=MASK,
            spare_padding=False,
        )
        with memory_of(memory, batch, pad_token_id=0, randomness=[derive("row", row) for row in range(2)]):
            lost = score(model, batch, schedule=Linear(), weighting="scheduler", lower_layers=memory.lower_layers)
            lost.sums.sum().backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        learned = [] if memory.learned is None else [each.grad for each in memory.learned.parameters()]
        return [lost.sums.detach(), *found, *(each for each in learned if each is not None)]

    host, found, waits = both(family, torch.float32, run)
    agree(host, found)
    assert waits == {**WRITE, **SCORE}


def test_figures_of_a_training_run_are_waited_for_when_they_are_read():
    with counting() as waits:
        means, watch = Means(), FiniteWatch(("loss",), torch.device(DEVICE))
        values, times = (OnDevice(torch.tensor(each)) for each in ([[1.0], [3.0]], [[0.1], [0.7]]))
        for step in range(3):
            means.add("one", values.sum(), 2)
            means.add("counted", values.sum(), OnDevice(torch.tensor(4)))
            means.add_rows("nll", values, OnDevice(torch.tensor([[1], [2]])), times)
            watch.note("loss", values.sum(), step)
            watch.flag()
        assert waits == {}
        found = means.read(lambda sums: sums)
        assert waits == {("copy to host", "training/tracking.py:read"): 1}
    assert found["one"] == 2
    assert found["counted"] == 1
    assert found["nll_t0.8"] == 1.5


def test_a_wait_in_a_hot_path_is_noticed(monkeypatch):
    """What this file is for: somebody puts an `.item()` into the update rule, or makes a tensor on the host."""

    def clip(self, gradients):
        assert all(gradient.norm().item() < 1e9 for gradient in gradients)
        return gradients

    def run(model, put):
        with ParametricMemory(model, config_of(), mask_token_id=MASK).write(put(IDS)) as written:
            return [written.losses]

    monkeypatch.setattr(LocalSGD, "clip", clip)
    _, _, waits = both("llada", torch.float32, run)
    assert waits.pop(("item", "memory/inner_loop.py:step")) > 1
    assert waits == WRITTEN
    monkeypatch.setattr(LocalSGD, "clip", lambda self, gradients: [g * torch.ones(g.shape) for g in gradients])
    with pytest.raises(RuntimeError, match="same device"):
        both("llada", torch.float32, run)


# The double itself ------------------------------------------------------------------------------------------------


def test_two_devices_do_not_mix():
    with counting():
        there = OnDevice(torch.ones(3))
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=there.device, generator=torch.Generator())
        assert (there + torch.tensor(1.0)).inner.tolist() == [2, 2, 2], "a number may come from the host"


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.equal(x),
        lambda x: x.unique(),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: int(x.long().max()),
    ],
)
def test_every_kind_of_wait_is_counted(wait):
    with counting() as waits:
        wait(OnDevice(torch.ones(3)))
        assert sum(waits.values()) == 1
