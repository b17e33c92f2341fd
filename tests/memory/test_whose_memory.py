"""Whose memory a network reads: one open block per network, in one thread; copies and what follows a block are bare."""

import _thread
import copy
import io
import pickle
import threading

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.errors import ConfigError
from memdlm.inference import GenerationConfig, generate, score, stream
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import LoRAOptions, add_outer_lora
from memdlm.models.networks.patching import in_this_thread
from memdlm.randomness import derive
from tiny import CONFIGS, V, random_ids, rng, tiny

WORDS = build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])
MASK = WORDS.mask_token_id
IDS = random_ids(2, 9)


def bert(dtype=torch.float32):
    config = BertConfig(vocab_size=V, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForMaskedLM(config).to(dtype).eval()


NETWORKS = {**{name: lambda dtype=torch.float32, name=name: tiny(name, dtype) for name in CONFIGS}, "bert": bert}
every_network = pytest.mark.parametrize("name", sorted(NETWORKS))


def memory_of(model, **options):
    targets = "dense" if isinstance(model, BertForMaskedLM) else "gate_proj,up_proj,down_proj"
    shape = {
        "inner_layer_fraction": 0.5,
        "inner_rank": 4,
        "inner_alpha": 8.0,
        "inner_lr": 1.0,
        "prompt_mask_ratio": 0.5,
    }
    config = MemoryConfig(**{"inner_target_modules": targets, **shape, **options})
    return ParametricMemory(model, config, mask_token_id=MASK)


def is_bare(model):
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "__reduce_ex__" in vars(module)
        or "forward" in vars(module)
        for module in model.modules()
    ) and all(getattr(module, "additions", None) is None for module in model.modules())


def in_thread(call):
    """Return what `call` returns or raises in a thread of its own."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="another")
    thread.start()
    thread.join()
    return found[0]


@every_network
@torch.no_grad()
def test_a_second_block_is_refused_and_the_first_stays(name):
    model = NETWORKS[name]()
    base, memory, other = model(IDS).logits, memory_of(model), memory_of(model, inner_layer_fraction=1.0)
    with memory.write(IDS[:1], generator=rng()):
        kept = memory.export()
    with memory.write(IDS, generator=rng()):
        inside = model(IDS).logits
        assert not inside.equal(base)
        for enter in (
            lambda: other.write(IDS),
            lambda: memory.write(IDS),
            lambda: memory.recall(kept),
            lambda: memory_of(model).recall(kept),
        ):
            with pytest.raises(ConfigError, match=r"write block of thread 'MainThread'.*test_whose_memory.py"), enter():
                pass
            assert model(IDS).logits.equal(inside)
    assert model(IDS).logits.equal(base)
    assert is_bare(model)
    with memory.recall(kept), pytest.raises(ConfigError, match="a recall block"), other.write(IDS):
        pass
    with other.write(IDS, generator=rng()):
        pass
    assert model(IDS).logits.equal(base)


@every_network
@torch.no_grad()
def test_another_thread_is_refused(name):
    model = NETWORKS[name]()
    base, memory = model(IDS).logits, memory_of(model)
    with memory.write(IDS, generator=rng()):
        inside = model(IDS).logits
        for call in (
            lambda: model(IDS),
            lambda: memory.export(0),
            lambda: generate(model, WORDS, [[1, 2]], GenerationConfig(max_new_tokens=2)),
            lambda: score(model, IDS[0], IDS[1], 2, mask_token_id=MASK),
            lambda: memory_of(model).write(IDS).__enter__(),
            lambda: memory.write(IDS).__enter__(),
        ):
            error = in_thread(call)
            assert isinstance(error, ConfigError), error
            assert "MainThread" in str(error)
            assert model(IDS).logits.equal(inside)
    assert is_bare(model)
    assert in_thread(lambda: model(IDS).logits).equal(base)


@pytest.mark.parametrize("name", ["lladamoe", "small", "bert"])
def test_threads_read_their_own_memory_or_are_refused(name):
    """Writers and readers at once: every answer is right, or a ConfigError."""
    model = NETWORKS[name]()
    base = model(IDS).logits.detach()

    def solo(seed):
        with memory_of(model).write(random_ids(2, 9, seed), generator=rng(seed)), torch.no_grad():
            return model(IDS).logits

    def plain():
        with torch.no_grad():
            return model(IDS).logits

    known = [solo(seed) for seed in range(3)]
    wrong, strange, right = [], [], []

    def work(offset):
        for turn in range(8):
            seed = (offset + turn) % 4
            try:
                found = plain() if seed == 3 else solo(seed)
                (right if found.equal(base if seed == 3 else known[seed]) else wrong).append(seed)
            except ConfigError:
                pass
            except Exception as error:
                strange.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not strange
    assert right
    assert is_bare(model)


@every_network
@torch.no_grad()
def test_a_copy_made_inside_a_block_is_a_bare_model(name):
    model = NETWORKS[name]()
    base, memory = model(IDS).logits, memory_of(model)
    with memory.write(IDS, generator=rng()):
        inside, buffer = model(IDS).logits, io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = {
            "deepcopy": copy.deepcopy(model),
            "copy": copy.copy(model),
            "pickle": pickle.loads(pickle.dumps(model)),
            "torch.save": torch.load(buffer, weights_only=False),
        }
        part = copy.deepcopy(next(module for module in model.modules() if module._forward_hooks))
        assert is_bare(part)
        for how, twin in copies.items():
            assert is_bare(twin), how
            assert twin(IDS).logits.equal(base), how
            assert list(twin.state_dict()) == list(model.state_dict())
            with memory_of(twin).write(IDS, generator=rng()):
                assert twin(IDS).logits.equal(inside), how
                assert model(IDS).logits.equal(inside)
            assert twin(IDS).logits.equal(base), how
        assert model(IDS).logits.equal(inside)
        with pytest.raises(ConfigError, match="not copied while it is open"):
            copy.deepcopy(memory)
    assert is_bare(model)


@every_network
@torch.no_grad()
def test_what_was_there_before_a_block_is_there_after_it(name):
    model = NETWORKS[name]()
    seen, memory, base = [], memory_of(model), model(IDS).logits
    handles = [module.register_forward_hook(lambda *_: seen.append(1)) for module in model.modules()]
    state = {module: {key: repr(value) for key, value in vars(module).items()} for module in model.modules()}
    for end in (RuntimeError, GeneratorExit, KeyboardInterrupt):
        with pytest.raises(end), memory.write(IDS, generator=rng()):
            raise end
        assert model(IDS).logits.equal(base)
        assert {
            module: {key: repr(value) for key, value in vars(module).items()} for module in model.modules()
        } == state
    for handle in handles:
        handle.remove()
    assert is_bare(model)


@every_network
@torch.no_grad()
def test_several_texts_are_the_rows_of_one_write(name):
    model = NETWORKS[name](torch.float64)
    memory, texts, asked = memory_of(model), random_ids(3, 8, seed=2), random_ids(3, 9, seed=3)
    with memory.write(texts, generator=[derive("row", row) for row in range(3)]):
        together = model(asked).logits
        with memory.of_rows(torch.tensor([2, 0])):
            assert_close(model(asked[[2, 0]]).logits, together[[2, 0]])
            with pytest.raises(ConfigError, match="chosen already"), memory.of_rows(torch.tensor([0])):
                pass
        for rows in (1, 2, 4):
            with pytest.raises(ConfigError, match=f"holds 3 samples, but the model was called with {rows} rows"):
                model(random_ids(rows, 9))
        for rows in ([3], [-1], []):
            with (
                pytest.raises(ConfigError, match="are not there"),
                memory.of_rows(torch.tensor(rows, dtype=torch.int64)),
            ):
                pass
        assert model(asked).logits.equal(together)
    for row in range(3):
        with memory.write(texts[row : row + 1], generator=[derive("row", row)]):
            assert_close(model(asked[row : row + 1]).logits, together[row : row + 1], rtol=0, atol=1e-7)
    with pytest.raises(ConfigError, match="no memory is open"), memory.of_rows(torch.tensor([0])):
        pass


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"llada_switches"}))
@torch.no_grad()
def test_between_the_steps_of_a_stream_the_model_is_bare_and_held(name):
    model, options = tiny(name), GenerationConfig(max_new_tokens=4)
    base, memory, prompts = model(IDS).logits, memory_of(model), [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10]]
    expected = generate(model, WORDS, prompts, options, memory=memory)
    plain = generate(model, WORDS, prompts, options)
    final = None
    for step in stream(model, WORDS, prompts, options, memory=memory):
        final = step.ids
        assert model(IDS).logits.equal(base)
        assert copy.deepcopy(model)(IDS).logits.equal(base)
        again = generate(model, WORDS, prompts, options)
        assert all(a.equal(b) for a, b in zip(again.sequences, plain.sequences, strict=True))
        for other in (memory, memory_of(model)):
            with pytest.raises(ConfigError, match="open already"), other.write(IDS):
                pass
    for row, sequence in zip(final, expected.sequences, strict=True):
        assert row[: len(sequence)].equal(sequence)
    assert is_bare(model)


@torch.no_grad()
def test_a_stream_may_go_on_in_another_thread_and_end_early():
    model = tiny("lladamoe")
    memory, base = memory_of(model), model(IDS).logits
    options = GenerationConfig(max_new_tokens=4)
    expected = [step.ids for step in stream(model, WORDS, [[1, 2, 3, 4]], options, memory=memory)]
    steps = stream(model, WORDS, [[1, 2, 3, 4]], options, memory=memory)
    assert next(steps).ids.equal(expected[0])
    assert in_thread(lambda: next(steps)).ids.equal(expected[1])
    assert next(steps).ids.equal(expected[2])
    steps.close()
    assert is_bare(model)
    next(stream(model, WORDS, [[1, 2, 3, 4]], options, memory=memory))  # and let go of
    assert model(IDS).logits.equal(base)
    with memory.write(IDS):
        pass


def test_wrappers_are_the_network_they_wrap():
    model = tiny("small")
    compiled = torch.compile(model, backend="eager")
    with memory_of(compiled).write(IDS), pytest.raises(ConfigError, match="open already"), memory_of(model).write(IDS):
        pass
    model = add_outer_lora(tiny("lladamoe"), LoRAOptions(r=4))
    with memory_of(model).write(IDS), pytest.raises(ConfigError, match="open already"), memory_of(model).write(IDS):
        pass


def test_a_learned_start_is_packed_beside_an_open_memory():
    model = tiny("lladamoe")
    options = MemoryConfig.recall(inner_layer_fraction=0.5, inner_rank=4, strides=2)
    memory = ParametricMemory(model, options, mask_token_id=MASK)
    alone = memory.unwritten()
    with memory.write(IDS), torch.no_grad():
        inside = model(IDS).logits
        beside = in_thread(memory.unwritten)
        assert model(IDS).logits.equal(inside)
    assert all(beside.pairs[name]["A"].equal(pair["A"]) for name, pair in alone.pairs.items())


def test_an_older_graph_is_not_differentiated_through_another_open_memory():
    model = tiny("small", torch.float64)
    memory, other = memory_of(model, outer_gradient="exact"), memory_of(model)
    with memory.write(IDS, generator=rng()):
        loss = model(IDS).logits.square().mean()
    with other.write(IDS), pytest.raises(ConfigError, match="open already"):
        loss.backward(retain_graph=True)
    loss.backward()
    assert is_bare(model)


def test_a_thread_of_autograd_s_own_counts_as_the_owner_s(monkeypatch):
    """CUDA's backward passes run on threads that Python did not start."""
    is_mine, found, done = in_this_thread(), [], threading.Event()

    def look():
        found.append(is_mine())
        done.set()

    for graph, expected in ((-1, False), (7, True)):
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda graph=graph: graph)
        done.clear()
        _thread.start_new_thread(look, ())
        assert done.wait(10)
        assert found.pop() is expected
    assert in_thread(is_mine) is False, "a backward pass of another thread of Python's is not ours"
    assert is_mine()
