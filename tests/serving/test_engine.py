"""Every answer of an engine is that of its request alone, whoever joins, leaves, fails or is written meanwhile."""

import itertools
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import CONFIGS, alone, check, engine, memory_of, network, request, run, saved, store, text_ids, words

from memdlm.errors import CancelledError, ConfigError, DataError, EngineFullError, MemoryFileError, NotFiniteError
from memdlm.inference import Decoder, GenerationConfig, PromptCache, generate
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models.lora.adapters import LoRAOptions, add_outer_lora
from memdlm.randomness import derive
from memdlm.serving import (
    Done,
    Engine,
    Failed,
    GenerationRequest,
    MemoryFolder,
    Progress,
    Settled,
    Started,
    WriteRequest,
)
from tiny import V, tiny

FAMILIES = ["llada", "lladamoe", "llada2", "dream", "sdar"]
BLOCK_CAUSAL = ("llada2", "sdar")
DRAWN = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
PLAIN = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 9)},
    optional={
        "block_size": st.sampled_from([2, 4, 8]),
        "temperature": st.sampled_from([0.0, 0.9]),
        "cfg_scale": st.just(0.7),
        "top_k": st.integers(2, 6),
    },
)
SAMPLERS = {
    "fixed": st.fixed_dictionaries({}, optional={"steps": st.integers(1, 6), "remasking": st.just("random")}),
    "stochastic": st.just({"steps": 3, "stochastic_transfer": True}),
    "sure": st.fixed_dictionaries({"threshold": st.sampled_from([0.05, 0.3])}),
    "factor": st.just({"factor": 1.5}),
    "edited": st.fixed_dictionaries({"threshold": st.just(0.2), "editing_threshold": st.sampled_from([0.0, 0.2])}),
    "stable": st.just({"stable_steps": 1}),
    "soft": st.fixed_dictionaries({"soft_mask": st.just(True)}, optional={"soft_mask_top_k": st.integers(1, 4)}),
}
ONLY_FULL = ("remasking", "stochastic_transfer")


@st.composite
def arrivals(draw, family):
    """(when it is submitted, how many steps later it is cancelled or None, the request), by time."""
    found = []
    for seed in range(draw(st.integers(1, 6))):
        sampler = draw(SAMPLERS[draw(st.sampled_from(sorted(SAMPLERS)))])
        options = draw(PLAIN) | sampler
        if family in BLOCK_CAUSAL:
            options = {name: value for name, value in options.items() if name not in ONLY_FULL}
        if "soft_mask" in options:
            options.pop("cfg_scale", None)
        # Where it would have no effect, it is refused.
        if ("remasking" in options or family == "sdar") and not options.get("temperature"):
            options.pop("top_k", None)
        memory = draw(st.sampled_from([None, *CONFIGS]))
        # Few texts, so that prompts begin alike.
        asked = request(draw(st.integers(0, 1)), draw(st.integers(1, 20)), memory, **options)
        when, give_up = draw(st.integers(0, 8)), draw(st.none() | st.integers(0, 5))
        found.append((when, give_up if draw(st.booleans()) else None, replace(asked, seed=seed)))
    return sorted(found, key=lambda each: each[0])


def served(family, jobs, **options):
    """Submit and cancel as `jobs` say, and do all steps."""
    serving, tickets, count = engine(family, **options), {}, 0
    while len(tickets) < len(jobs) or serving.step():
        for index, (when, give_up, asked) in enumerate(jobs):
            if index not in tickets and when <= count:
                tickets[index] = serving.submit(asked)
            if index in tickets and give_up is not None and when + give_up <= count:
                tickets[index].cancel()
        count += 1
    figures = serving.figures()
    serving.stop()
    return [tickets[index] for index in range(len(jobs))], figures


def law(data, family):
    jobs = data.draw(arrivals(family))
    limit = max(sum(t.nbytes for pair in saved(family, n).pairs.values() for t in pair.values()) for n in CONFIGS)
    slots, memory_bytes = data.draw(st.integers(2, 4)), data.draw(st.sampled_from([2 * limit, 2**30]))
    prefix_bytes = data.draw(st.sampled_from([0, 2**14, 2**30]))
    tickets, figures = served(family, jobs, slots=slots, memory_bytes=memory_bytes, prefix_bytes=prefix_bytes)
    for (_, give_up, asked), ticket in zip(jobs, tickets, strict=True):
        if isinstance(ticket.error, CancelledError):
            assert give_up is not None
        else:
            check(family, asked, ticket)
    assert (figures.running, figures.waiting) == (0, 0)
    assert figures.memory_bytes <= memory_bytes
    assert figures.prefix_bytes <= prefix_bytes


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5, **DRAWN)
@given(data=st.data())
def test_every_answer_is_that_of_the_request_alone(family, data):
    law(data, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, "llada_switches", "small_windowed"])
@settings(max_examples=100, **DRAWN)
@given(data=st.data())
def test_every_answer_is_that_of_the_request_alone_in_many_more_cases(family, data):
    law(data, family)


# In SDAR's small blocks, rows that are in different blocks soon differ in width, and passes are split by width.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "sdar"])
def test_memories_of_every_kind_and_none_share_a_pass(family):
    serving = engine(family, slots=len(CONFIGS) + 1)
    asked = [request(index, 8, memory) for index, memory in enumerate([*CONFIGS, None])]
    tickets = [serving.submit(each) for each in asked]
    run(serving)
    for each, ticket in zip(asked, tickets, strict=True):
        check(family, each, ticket)
    figures = serving.figures()
    assert figures.passes == figures.steps
    different = {tuple(alone(family, replace(asked[0], memory=memory)).sequences[0].tolist()) for memory in CONFIGS}
    assert len(different) > 1, "the memories must matter"


def test_soft_masked_rows_join_move_and_grow_with_what_they_have_learned():
    serving = engine("llada", slots=3)
    soft = {"soft_mask": True, "soft_mask_scale": 1.0, "soft_mask_centre": -9.0, "steps": 8, "max_new_tokens": 8}
    asked = [request(0, 5, max_new_tokens=2), *(request(index, 5 + 60 * index, "low", **soft) for index in (1, 2))]
    tickets = [serving.submit(asked[0]), serving.submit(asked[1])]
    for _ in range(4):
        serving.step()
    tickets.append(serving.submit(asked[2]))
    run(serving)
    for each, ticket in zip(asked, tickets, strict=True):
        check("llada", each, ticket)
    hard = replace(
        asked[1], config=replace(asked[1].config, soft_mask=False, soft_mask_scale=0.25, soft_mask_centre=-1.0)
    )
    assert alone("llada", hard).sequences[0].tolist() != alone("llada", asked[1]).sequences[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_with_an_outer_adapter_reads_memories_that_begin_at_a_learned_start(family):
    model = add_outer_lora(tiny(family, torch.float64), LoRAOptions(r=2), seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    config = MemoryConfig(inner_layer_fraction=0.5, inner_rank=3, inner_lr=1.0, learn_start=True)
    memory = ParametricMemory(model, config, mask_token_id=words().mask_token_id)
    with torch.no_grad():
        for start in memory.learned.starts:
            start.normal_(std=0.3, generator=torch.Generator().manual_seed(start.numel()))
    with memory.write(text_ids(4, 40)[None]):
        kept = memory.export()
    serving = Engine(Decoder(model, words()), slots=2)
    serving.store.keep("learned", kept)
    asked = [request(index, 9, name, temperature=0.7) for index, name in enumerate(["learned", None, "learned"])]
    tickets = [serving.submit(each) for each in asked]
    run(serving)
    reader = ParametricMemory(model, kept.reading_config, mask_token_id=words().mask_token_id)
    for each, ticket in zip(asked, tickets, strict=True):
        draws = [derive("memdlm.generate", each.seed)]
        with nullcontext() if each.memory is None else reader.recall(kept):
            expected = generate(model, words(), [torch.tensor(each.prompt)], each.config, generator=draws)
        assert ticket.result(0).generation.sequences[0].equal(expected.sequences[0])


def test_rows_that_read_one_memory_hold_it_once():
    serving = engine("llada", slots=4)
    for index in range(4):
        serving.submit(request(index, 5, "low"))
    serving.step()
    while not serving.figures().running:
        serving.step()
    assert serving.figures().stacked_bytes == 0
    assert serving.figures().live_memories == 1


def test_a_long_prompt_does_not_stretch_the_rows_of_the_others():
    serving = engine("llada", slots=3)
    asked = [request(0, 5), request(1, 6), request(2, 90)]
    tickets = [serving.submit(each) for each in asked]
    run(serving)
    for each, ticket in zip(asked, tickets, strict=True):
        check("llada", each, ticket)
    total = sum(alone("llada", each).num_token_positions for each in asked)
    assert serving.figures().positions <= 1.2 * total


# Memories ------------------------------------------------------------------------------------------------------------


def bytes_of(serving):
    """What the four memories take on the device, by name."""
    sizes = {}
    for name in CONFIGS:
        before = serving.figures().memory_bytes
        serving.submit(request(0, 3, name))
        run(serving)
        sizes[name] = serving.figures().memory_bytes - before
    return sizes


def test_the_memory_that_was_read_longest_ago_makes_room():
    size = bytes_of(engine("llada"))
    assert size["low"] == size["again"]
    serving = engine("llada", memory_bytes=2 * size["low"] + size["high"] - 1)
    for name in ("low", "again", "low", "high"):  # `again` was read longest ago
        serving.submit(request(0, 3, name))
        run(serving)
    figures = serving.figures()
    assert (figures.memory_hits, figures.memory_misses, figures.memory_evictions) == (1, 3, 1)
    assert figures.memory_bytes == size["low"] + size["high"]
    for name, hits in (("low", 2), ("again", 2)):
        serving.submit(request(0, 3, name))
        run(serving)
        assert serving.figures().memory_hits == hits


def test_no_more_bytes_are_on_the_device_than_allowed_and_nobody_starves():
    size = bytes_of(engine("llada"))
    serving = engine("llada", memory_bytes=size["low"])
    asked = [request(index, 4, memory) for index, memory in enumerate(["low", "again", "low", None, "again"])]
    tickets = [serving.submit(each) for each in asked]
    while serving.step():
        figures = serving.figures()
        assert figures.memory_bytes <= size["low"]
        assert figures.live_memories <= 1
    for each, ticket in zip(asked, tickets, strict=True):
        check("llada", each, ticket)
    ticket = serving.submit(request(0, 4, "full"))
    run(serving)
    with pytest.raises(ConfigError, match="memory_bytes"):
        ticket.result(0)


def test_a_response_that_cannot_join_holds_no_memory(monkeypatch):
    size = bytes_of(engine("llada"))
    serving = engine("llada", memory_bytes=size["low"])
    plain = serving._batch.pool._widen

    def widen(length):
        if length > 40:
            raise RuntimeError("out of memory")
        plain(length)

    monkeypatch.setattr(serving._batch.pool, "_widen", widen)
    bad, good = serving.submit(request(0, 60, "low")), serving.submit(request(0, 5, "again"))
    run(serving)
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(0)
    check("llada", request(0, 5, "again"), good)


@pytest.mark.parametrize("family", ["llada2"])
def test_a_memory_in_every_block_ends_the_prefix_cache_and_nothing_else(family):
    serving = engine(family, slots=3)
    memory = memory_of(family, MemoryConfig(inner_layer_fraction=1.0, inner_rank=2, inner_lr=1.0))
    with memory.write(text_ids(9, 40)[None]):
        whole = memory.export()
    serving.store.keep("whole", whole)
    soft = request(0, 30, "low", soft_mask=True, soft_mask_centre=-9.0, max_new_tokens=12)
    asked = [soft, request(0, 30), request(0, 30, "whole")]
    tickets = [serving.submit(each) for each in asked[:2]]
    while not serving.figures().running:
        serving.step()
    tickets.append(serving.submit(asked[2]))
    run(serving)
    for each, ticket in zip(asked[:2], tickets, strict=False):
        check(family, each, ticket)
    check(family, replace(asked[2], memory=whole), tickets[2])
    assert serving.figures().prefix_entries == 0


def test_a_forgotten_memory_is_read_again():
    serving, changed = engine("llada"), saved("llada", "again")
    before = serving.submit(request(0, 4, "low"))
    run(serving)
    check("llada", request(0, 4, "low"), before)
    serving.store.keep("low", changed)
    serving.forget("low")
    after = serving.submit(request(0, 4, "low"))
    run(serving)
    assert after.result(0).ids == tuple(alone("llada", request(0, 4, "again")).sequences[0].tolist()[4:])


def test_a_damaged_memory_file_hurts_nobody_else(tmp_path):
    for name in ("low", "high"):
        saved("llada", name).save(tmp_path / name)
    (tmp_path / "low" / "adapter_model.safetensors").write_bytes(b"no tensors")
    serving = engine("llada", store=MemoryFolder(tmp_path))
    good = [serving.submit(request(index, 5, memory)) for index, memory in enumerate(["high", None])]
    bad = [serving.submit(request(2, 5, memory)) for memory in ("low", "not there")]
    run(serving)
    for index, memory in enumerate(["high", None]):
        check("llada", request(index, 5, memory), good[index])
    for ticket in bad:
        with pytest.raises(MemoryFileError):
            ticket.result(0)
    saved("llada", "low").save(tmp_path / "low")
    again = serving.submit(request(2, 5, "low"))
    run(serving)
    check("llada", request(2, 5, "low"), again)
    for name in ("../low", "a/b", ".hidden", "", 7):
        with pytest.raises(MemoryFileError, match="no name of a memory"):
            serving.submit(request(2, 5, name))


@pytest.mark.parametrize("family", ["llada2"])
def test_a_prompt_is_run_once_for_all_memories_below_their_blocks(family):
    serving = engine(family, slots=2)
    config = {"block_size": 4, "max_new_tokens": 5}
    for memory in ("high", "low", None, "again"):
        asked = request(0, 30, memory, **config)
        ticket = serving.submit(asked)
        run(serving)
        check(family, asked, ticket)
    assert serving.figures().prefix_reused == 3 * 28
    assert serving.figures().prefix_entries == 1
    other = request(0, 30, "low", block_size=8, max_new_tokens=5)
    ticket = serving.submit(other)
    run(serving)
    check(family, other, ticket)
    assert serving.figures().prefix_reused == 3 * 28


def test_blocks_of_another_size_have_other_states():
    model, prompt = network("llada2"), text_ids(0, 21)
    cache = PromptCache(model)
    for block in (4, 8, 4):
        config = GenerationConfig(max_new_tokens=6, block_size=block)
        found = Decoder(model, words(), config, prompt_cache=cache).generate([prompt])
        plain = Decoder(model, words(), config).generate([prompt])
        assert found.sequences[0].equal(plain.sequences[0])
        assert found.num_reused_positions == (20 if block == 4 and len(cache) == 2 else 0)


# Writes --------------------------------------------------------------------------------------------------------------


def write_request(name, seed=0, length=20, config=CONFIGS["low"], **more):
    return WriteRequest(ids=text_ids(seed, length).tolist(), memory=name, config=config, seed=seed, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_and_is_what_the_text_would_become_alone(family):
    serving = engine(family, slots=4)
    writes = [serving.write(write_request(f"new{index}", index, 20 + index)) for index in range(3)]
    asked = [request(index, 6, f"new{index}") for index in range(3)]
    tickets = [serving.submit(each) for each in asked]
    run(serving)
    for index, (each, write, ticket) in enumerate(zip(asked, writes, tickets, strict=True)):
        assert write.result(0).together == 3
        memory = ParametricMemory(network(family), CONFIGS["low"], mask_token_id=words().mask_token_id)
        generator = [derive("memdlm.write", index)]
        with memory.write(text_ids(index, 20 + index)[None], generator=generator):
            expected = memory.export()
        found = write.result(0).saved
        for module, pair in expected.pairs.items():
            for side in ("A", "B"):
                torch.testing.assert_close(found.pairs[module][side], pair[side], rtol=1e-9, atol=1e-12)
        check(family, replace(each, memory=expected), ticket)
    serving.stop()


def test_reading_and_writing_take_turns():
    """A long write, and more responses than there are slots: each step does a bit of both, until both are done."""
    serving = engine("llada", slots=2)
    config = replace(CONFIGS["low"], chunk_length=8)
    write = serving.write(write_request("new", 0, 96, config))
    reads = [serving.submit(request(index, 5, max_new_tokens=4)) for index in range(6)]
    before, seen = serving.figures(), []
    while serving.step():
        figures = serving.figures()
        progress = [event for event in write._events if isinstance(event, Progress)]
        seen.append((figures.steps - before.steps, len(progress)))
        before = figures
    gradients = [done for _, done in seen]
    assert max(b - a for a, b in itertools.pairwise(gradients)) == 1
    # While there were responses, every gradient came with a step of them.
    assert all(steps == 1 for steps, done in seen[:12])
    assert reads[-1].result(0).seconds_running < write.result(0).seconds_running
    last = [event for event in write.events(0) if isinstance(event, Progress)][-1]
    assert (last.done, last.total) == (24, 24)
    for index, ticket in enumerate(reads):
        check("llada", request(index, 5, max_new_tokens=4), ticket)


def test_writing_goes_on_however_many_responses_arrive():
    serving = engine("llada", slots=1)
    write = serving.write(write_request("new", 0, 40, replace(CONFIGS["low"], chunk_length=8)))
    for index in range(60):
        serving.submit(request(index, 3, max_new_tokens=2))
        serving.step()
        if write.is_done:
            break
    assert write.is_done
    serving.stop()


def test_a_text_that_cannot_be_written_fails_alone_and_so_does_what_reads_it():
    # In float32, whose range is soon left.
    serving = Engine(Decoder(tiny("llada"), words()), slots=4)
    wild = MemoryConfig(
        inner_layer_fraction=0.5, inner_rank=4, inner_lr=1e6, inner_alpha=1e6, inner_grad_clip=0.0, num_inner_steps=2
    )
    good, bad = serving.write(write_request("good")), serving.write(write_request("bad", config=wild))
    reads = [serving.submit(request(0, 5, name)) for name in ("good", "bad")]
    run(serving)
    assert good.result(0).memory == "good"
    assert reads[0].result(0).ids
    with pytest.raises(NotFiniteError):
        bad.result(0)
    with pytest.raises(MemoryFileError, match="its write failed"):
        reads[1].result(0)


def test_of_a_batch_of_texts_only_the_bad_one_fails(monkeypatch):
    from memdlm.serving import writes

    plain = writes.WriteBatch.step

    def step(self):
        if any(ticket.request.memory == "bad" for ticket in self.tickets):
            raise NotFiniteError("too large")
        return plain(self)

    monkeypatch.setattr(writes.WriteBatch, "step", step)
    serving = engine("llada", slots=4)
    tickets = {name: serving.write(write_request(name, index)) for index, name in enumerate(["one", "bad", "two"])}
    run(serving)
    assert tickets["one"].result(0).together == 1
    assert tickets["two"].result(0).memory == "two"
    with pytest.raises(NotFiniteError):
        tickets["bad"].result(0)


def test_a_cancelled_write_ends_at_the_next_gradient():
    serving = engine("llada")
    write = serving.write(write_request("new", 0, 96, replace(CONFIGS["low"], chunk_length=8)))
    for _ in range(3):
        serving.step()
    write.cancel()
    assert not serving.step()
    assert serving.figures().writing == 0
    assert isinstance(write.error, CancelledError)
    assert not any(module._forward_hooks for module in network("llada").modules())
    with pytest.raises(MemoryFileError):
        serving.store.read("new")


# Jobs ----------------------------------------------------------------------------------------------------------------


def test_cancelling_frees_the_slot_at_the_next_step():
    serving = engine("llada", slots=1)
    first, second = serving.submit(request(0, 5)), serving.submit(request(1, 5))
    serving.step()
    assert [type(event) for event in first._events][:1] == [Started]
    assert not second._events
    first.cancel()
    serving.step()
    assert isinstance(first._events[-1], Failed)
    assert isinstance(second._events[0], Started)
    run(serving)
    check("llada", request(1, 5), second)
    with pytest.raises(CancelledError):
        first.result(0)
    waiting = serving.submit(request(0, 5))
    waiting.cancel()
    run(serving)
    assert serving.figures().cancelled == 2


def test_a_response_that_breaks_hurts_nobody_else(monkeypatch):
    serving = engine("llada2", slots=4)
    plain = serving._batch.pool.predict

    def predict(group):
        if any(each.request.seed == 2 for each in group):
            raise RuntimeError("out of memory")
        return plain(group)

    monkeypatch.setattr(serving._batch.pool, "predict", predict)
    tickets = [serving.submit(request(index, 6, temperature=0.8)) for index in range(4)]
    run(serving)
    for index, ticket in enumerate(tickets):
        if index == 2:
            with pytest.raises(RuntimeError, match="out of memory"):
                ticket.result(0)
        else:
            check("llada2", request(index, 6, temperature=0.8), ticket)


@pytest.mark.parametrize("family", ["llada", "llada2"])
def test_a_memory_of_monstrous_values_fails_alone_and_leaves_no_nan_in_its_row(family):
    kept = saved(family, "high")
    huge = replace(kept, pairs={m: {"A": p["A"], "B": p["B"].sign() * 1e308} for m, p in kept.pairs.items()})
    serving = engine(family, slots=2)
    serving.store.keep("huge", huge)
    # The row that takes the place of the bad one is shorter than its neighbour: what it may not see is left of before.
    asked = [request(1, 40, "low", max_new_tokens=24, suppress_tokens=(0,)), request(2, 4)]
    good, bad = serving.submit(asked[0]), serving.submit(request(0, 60, "huge"))
    while not bad.is_done:
        serving.step()
    later = serving.submit(asked[1])
    assert not good.is_done
    run(serving)
    with pytest.raises(NotFiniteError, match="the memory that is read"):
        bad.result(0)
    check(family, asked[0], good)
    check(family, asked[1], later)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.2, "editing_threshold": 0.0, "block_size": 4}])
def test_a_response_ends_with_its_end_token_or_a_stop_text(options):
    asked = request(3, 7, max_new_tokens=8, **options)
    whole = alone("llada2", asked)
    response = whole.sequences[0][7:].tolist()
    end = next((token for token in response[2:] if token not in response[:2]), response[0])
    serving = engine("llada2", end=end)
    ticket = serving.submit(asked)
    run(serving)
    check("llada2", asked, ticket, end)
    assert ticket.result(0).finish == "stop"
    word = words().convert_ids_to_tokens(response[3])
    serving = engine("llada2")
    ticket = serving.submit(replace(asked, stop=("nowhere", word)))
    run(serving)
    found = ticket.result(0)
    assert found.finish == "text"
    assert found.text == whole.texts[0][: whole.texts[0].find(word)]
    assert list(found.ids) == response[: len(found.ids)]
    assert found.generation.texts == [found.text]


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_a_response_ends_with_the_turn_or_a_stop_token_as_it_does_alone(family):
    """What is settled, the reason and the text know every token that ends a response, not EOS alone."""
    whole = alone(family, request(3, 7, max_new_tokens=8)).sequences[0][7:].tolist()
    end = next((token for token in whole[2:] if token not in whole[:2]), whole[0])
    asked = request(3, 7, max_new_tokens=8, stop_tokens=(end,))
    serving = engine(family)
    ticket = serving.submit(asked)
    run(serving)
    check(family, asked, ticket)
    assert ticket.result(0).ids[-1] == end
    assert ticket.result(0).finish == "stop"


def test_bad_requests_are_refused_before_they_wait():
    serving = engine("llada", slots=1)
    for asked, error in (
        (request(0, 3, compile="default"), "compile"),
        (request(0, 3, cache="approximate"), "cache"),
        (request(0, 3, cfg_scale=1.0), "slots"),
        (request(0, 3, stop=("",)), "stop"),
        (request(0, 3, suppress_tokens=(V,)), "vocabulary"),
    ):
        with pytest.raises(ConfigError, match=error):
            serving.submit(asked)
    with pytest.raises(DataError):
        serving.submit(GenerationRequest(prompt=[]))
    for ids in ([V], [], [[5, 6]], [0.5]):
        with pytest.raises(DataError):
            serving.write(WriteRequest(ids=ids, memory="new"))
    with pytest.raises(ConfigError, match="nothing_proj"):
        serving.write(WriteRequest(ids=[5, 6], memory="new", config=MemoryConfig(inner_target_modules="nothing_proj")))
    assert serving.figures().waiting == 0
    with pytest.raises(ConfigError, match="memory or a prompt cache"):
        Engine(
            Decoder(
                network("llada"),
                words(),
                prompt_cache=None,
                memory=ParametricMemory(network("llada"), CONFIGS["low"], mask_token_id=words().mask_token_id),
            )
        )
    # What no request may ask for is refused as a default as well, before anybody is served.
    with pytest.raises(ConfigError, match="cache='none'"):
        Engine(Decoder(network("llada2"), words(), GenerationConfig(cache="none")))


def test_a_full_queue_refuses():
    serving = engine("llada", queue_limit=2)
    for index in range(2):
        serving.submit(request(index))
    with pytest.raises(EngineFullError, match="queue_limit"):
        serving.submit(request(2))
    run(serving)
    serving.submit(request(2))
    serving.stop(drain_s=60)
    assert serving.figures().responses == 3
    with pytest.raises(EngineFullError, match="stopped"):
        serving.submit(request(2))


# The engine's thread --------------------------------------------------------------------------------------------------


def test_a_thread_of_its_own_serves_many_others():
    asked = [request(index, 5 + index, memory) for index, memory in enumerate(["low", None, "high", "again"])]
    found, told = {}, []
    with engine("llada") as serving:
        with pytest.raises(ConfigError, match="own thread"):
            serving.step()

        def ask(index):
            found[index] = serving.submit(asked[index])
            found[index].add_listener(lambda event: told.append((index, type(event))))
            found[index].result(60)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        write = serving.write(write_request("new"))
        for thread in threads:
            thread.join(60)
        assert write.result(60).memory == "new"
        events = list(serving.submit(request(0, 4, "new")).events(60))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Done)
    assert all(isinstance(event, Settled) for event in events[1:-1])
    for index, each in enumerate(asked):
        check("llada", each, found[index])
        assert [kind for who, kind in told if who == index][-1] is Done
    assert serving.figures().responses == 5


def test_stopping_ends_whatever_is_left():
    serving = engine("llada", slots=1).start()
    tickets = [serving.submit(request(index, 5, max_new_tokens=60)) for index in range(4)]
    write = serving.write(write_request("new", 0, 200, replace(CONFIGS["low"], chunk_length=8)))
    serving.stop()
    assert all(ticket.is_done for ticket in (*tickets, write))
    assert isinstance(tickets[-1].error, CancelledError)
    with pytest.raises(ConfigError, match="started before"):
        serving.start()
    assert not any(module._forward_hooks for module in network("llada").modules())


def test_a_listener_that_raises_is_warned_about_and_left_out():
    serving = engine("llada")
    ticket = serving.submit(request(0, 4))
    ticket.add_listener(lambda event: 1 / 0)
    with pytest.warns(UserWarning, match="listener"):
        run(serving)
    check("llada", request(0, 4), ticket)
    assert store("llada").read("low") is saved("llada", "low")
