"""Long texts chunk by chunk: one chunk is the whole text, several are several writes, and memory stays flat."""

import pytest
import torch
from torch.testing import assert_close

from memdlm.diffusion import Corrupted
from memdlm.errors import ConfigError
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.memory.chunks import Text
from memdlm.models import SmallDLMConfig, build_model
from memdlm.randomness import derive, uniform
from tiny import CONFIGS, MASK, PAD, V, families, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))


def memory_of(model, **options):
    options = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 1.0, **options}
    # Chunks of any length, and losses that a plain call gives: SDAR's own writes are in blocks.
    return ParametricMemory(model, MemoryConfig(**{"attention": "full", **options}), mask_token_id=MASK)


def values(memory, ids, **arguments):
    with memory.write(ids, **{"generator": rng(), **arguments}) as written:
        return [written.losses, *(tensor.clone() for tensor in memory.fast.tensors())]


@every_family
@pytest.mark.parametrize("length", [9, 40])
def test_one_chunk_is_the_unchunked_write(family, length):
    model, ids = tiny(family), random_ids(2, 9)
    assert_close(values(memory_of(model, chunk_length=length), ids), values(memory_of(model), ids), rtol=0, atol=0)


@every_family
def test_every_chunk_goes_on_where_the_last_one_ended(family):
    model, ids = tiny(family, torch.float64), random_ids(2, 12)
    strided = {"masking_strategy": "strided", "num_inner_steps": 1}
    losses, *after = values(memory_of(model, chunk_length=8, **strided), ids)
    first, *_ = values(memory_of(model, **strided), ids[:, :8])
    assert losses.shape == (2, 2)
    assert_close(losses[:1], first, rtol=0, atol=0)
    assert not any(torch.equal(a, b) for a, b in zip(after[1::2], _[1::2], strict=True))


@every_family
def test_a_shorter_text_in_the_batch_is_written_as_alone(family):
    model, ids = tiny(family, torch.float64), random_ids(2, 12)
    keep = torch.arange(12) < torch.tensor([12, 3])[:, None]
    memory = memory_of(model, chunk_length=4, masking_strategy="strided", num_inner_steps=1)
    generators = lambda: [derive("row", row) for row in range(2)]
    _, *together = values(memory, ids.masked_fill(~keep, PAD), attention_mask=keep, generator=generators())
    _, *alone = values(memory, ids[1:, :3], generator=generators()[1:])
    for several, one in zip(together, alone, strict=True):
        assert_close(several.select(-3, 1), one.select(-3, 0), rtol=0, atol=1e-9)


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_has_something_to_look_at_where_a_shorter_text_has_ended(family, attention):
    """The second row ends in the first chunk; in the later ones it is hidden but for the first column."""
    model, ids = tiny(family), random_ids(2, 12)
    model.set_attn_implementation(attention)
    keep = torch.arange(12) < torch.tensor([12, 3])[:, None]
    given = keep.clone()
    masks, states = [], []

    def watch(module, arguments, out):
        states.append(out)

    handles = [layer.register_forward_hook(watch) for layer in model.model.layers]
    memory = memory_of(model, chunk_length=4)
    try:
        with memory.write(ids, attention_mask=given, generator=rng()):
            pass
    finally:
        for handle in handles:
            handle.remove()
    assert states
    assert all(state.isfinite().all() for state in states)
    assert given.equal(keep), "what the caller passed is left as it was"
    for part in Text(ids, keep, given, None).chunks(4):
        masks.append(part.mask.sum(1).tolist())
    assert masks == [[4, 3], [4, 1], [4, 1]]
    assert given.equal(keep)


def test_a_text_is_cut_with_all_that_belongs_to_it():
    ids = random_ids(2, 7)
    is_masked, t = ids > 9, torch.tensor([0.2, 0.6])
    square, row = torch.rand(2, 1, 7, 7, generator=rng()), torch.rand(2, 1, 1, 7, generator=rng())
    for mask in (square, row):
        parts = list(Text(ids, ids > 3, mask, Corrupted(ids + 1, is_masked, t)).chunks(3))
        assert [part.clean.shape[1] for part in parts] == [3, 3, 1]
        assert torch.cat([part.clean for part in parts], 1).equal(ids)
        assert torch.cat([part.is_maskable for part in parts], 1).equal(ids > 3)
        assert torch.cat([part.anchor.ids for part in parts], 1).equal(ids + 1)
        assert torch.cat([part.anchor.is_masked for part in parts], 1).equal(is_masked)
        assert all(part.anchor.t.equal(t) for part in parts)
        for start, part in zip((0, 3, 6), parts, strict=True):
            stop = min(start + 3, 7)
            rows = slice(start, stop) if mask is square else slice(None)
            assert part.mask.equal(mask[:, :, rows, start:stop])


@pytest.mark.parametrize("update", ["sequential", "accumulated"])
def test_nothing_of_a_chunk_is_kept(update):
    """Bytes that autograd holds at most, at 2 and at 8 chunks."""

    def peak(chunks):
        held, most = 0, 0

        class Kept:
            def __init__(self, tensor):
                nonlocal held, most
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                held += self.size
                most = max(most, held)

            def __del__(self):
                nonlocal held
                held -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor), torch.no_grad():
            # Strided, so that every chunk predicts equally many tokens.
            memory = memory_of(tiny("small"), **(STRIDED | {"chunk_update": update}), chunk_length=32)
            with memory.write(random_ids(1, 32 * chunks), generator=rng()):
                pass
        return most

    assert peak(8) == peak(2)


STRIDED = {"masking_strategy": "strided", "strides": 2, "num_inner_steps": 1, "chunk_update": "accumulated"}


def moves(memory, ids, **arguments):
    """By how much a write moves each tensor."""
    with memory.write(ids, generator=rng(), **arguments):
        after = [tensor.clone() for tensor in memory.fast.tensors()]
    memory.fast.reset(len(ids), rng())
    return [tensor - start for tensor, start in zip(after, memory.fast.tensors(), strict=True)]


@every_family
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_accumulated_chunks_take_the_step_of_their_gradients_sum(family, norm, clip):
    """A text of 12 tokens in chunks of 8: the gradients of 8 and of 4 tokens, each from its own write, unclipped."""
    model, ids = tiny(family, torch.float64), random_ids(2, 12)
    plain = {**STRIDED, "inner_grad_clip": 0.0, "loss_norm_type": norm, "loss_weight_type": "uniform"}
    first, second = (moves(memory_of(model, **plain), part) for part in (ids[:, :8], ids[:, 8:]))
    shares = (1.0, 1.0) if norm == "batch" else (8 / 12, 4 / 12)
    memory = memory_of(model, chunk_length=8, **(plain | {"inner_grad_clip": clip}))
    expected = [-(shares[0] * a + shares[1] * b) for a, b in zip(first, second, strict=True)]
    for found, gradient in zip(moves(memory, ids), memory.update.clip(expected), strict=True):
        assert_close(found, -gradient, rtol=1e-9, atol=1e-12)
    assert any(step.abs().max() > 0 for step in first)
    sequential = moves(memory_of(model, chunk_length=8, **(plain | {"chunk_update": "sequential"})), ids)
    assert not all(torch.allclose(a, -b) for a, b in zip(sequential, expected, strict=True))


@families("dream", "sdar", "mdlm", "lladamoe", "small_windowed", "llada_switches")
@pytest.mark.parametrize(
    "options", [{}, {"num_inner_steps": 2}, {"num_inner_epochs": 2}, {"outer_gradient": "exact_top"}]
)
def test_an_outer_loss_goes_through_accumulated_chunks(family, options):
    """By central differences in float64, of all that a write learns (start, rates, gate) and of the adapted blocks."""
    model = tiny(family, torch.float64)
    shape = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 0.7, "strides": 2}
    config = MemoryConfig.recall(**shape, **options, chunk_length=5, chunk_overlap=1)
    assert config.chunk_update == "accumulated"
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    learned = dict(memory.learned.named_parameters())
    with torch.no_grad():
        for index, parameter in enumerate(learned.values()):
            draw = torch.randn(parameter.shape, generator=derive("start", index), dtype=torch.float64)
            parameter.add_((0.2 * draw).to(parameter))
    ids, question = random_ids(2, 12), random_ids(2, 7, seed=1)

    def loss():
        with memory.write(ids, generator=rng(3)) as written:
            assert len(written.losses) == options.get("num_inner_steps", 1) * options.get("num_inner_epochs", 1)
            return model(question).logits.log_softmax(-1)[..., 5].mean()

    model.requires_grad_(True)
    loss().backward()
    tested = {**learned, "above": next(iter(model.model.layers[-1].parameters()))}
    if config.outer_gradient == "exact":
        tested["below"] = next(iter(model.model.layers[0].parameters()))
    # So small a step because one of the routers chooses another expert 1e-6 away.
    step = 1e-7
    for index, (name, parameter) in enumerate(tested.items()):
        direction = torch.randn(parameter.shape, generator=derive("d", index), dtype=torch.float64)
        found = []
        with torch.no_grad():
            for move in (step, -2 * step, step):
                parameter.add_((move * direction).to(parameter))
                found.append(loss())
        slope = (found[0] - found[1]) / (2 * step)
        assert_close((parameter.grad * direction).sum(), slope, rtol=1e-5, atol=1e-8)
        assert parameter.grad.abs().sum() > 0, name


@every_family
@pytest.mark.parametrize(
    "options", [{"inner_dropout": 0.3}, {"inner_score_fraction": 0.5}, {"inner_loss_type": "distill"}]
)
def test_accumulated_chunks_are_written_alike_with_and_without_a_graph(family, options):
    model, ids, question = tiny(family), random_ids(2, 12), random_ids(2, 7, seed=1)
    shape = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "num_inner_steps": 2}
    # SDAR would be written in blocks, which chunks of 5 tokens cut through.
    config = MemoryConfig.recall(**shape, **options, strides=2, chunk_length=5, attention="full")
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    found = []
    for is_tracked in (True, False):
        with torch.set_grad_enabled(is_tracked), memory.write(ids, generator=rng(3)) as written:
            found.append((written.losses, model(question).logits))
    for tracked, plain in zip(*found, strict=True):
        assert_close(tracked, plain, rtol=0, atol=0)


@pytest.mark.parametrize("weighting", ["scheduler", "inverse", "uniform"])
@pytest.mark.parametrize(
    "options",
    [
        {"masking_strategy": "strided", "strides": 4, "num_inner_steps": 1},
        {"masking_strategy": "strided", "strides": 4, "num_inner_steps": 2},
        {"masking_strategy": "no_progressive"},
    ],
    ids=["a step", "two steps", "nominal times"],
)
@pytest.mark.parametrize("length", [8, 9, 11])
def test_accumulated_chunks_are_the_write_in_one_piece_where_attention_ends_at_each_token(weighting, options, length):
    """Chunks of 4, the last of which may hold a single token, whose own share of masks is 0 or 1."""
    config = SmallDLMConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        sliding_window=0,
        token_mixing=False,
        initializer_range=0.3,
    )
    model, ids = build_model(config, seed=0).double().eval(), random_ids(2, length)
    keep = torch.arange(length) < torch.tensor([length, 7])[:, None]
    found = []
    for chunks in ({}, {"chunk_length": 4, "chunk_update": "accumulated"}):
        shape = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 1.0}
        whole = {"loss_norm_type": "batch", "loss_weight_type": weighting, "prompt_mask_ratio": 1.0}
        memory = ParametricMemory(model, MemoryConfig(**shape, **(whole | options), **chunks), mask_token_id=MASK)
        # The offset of the strides is one draw per chunk: a generator whose every draw is the same number.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("memdlm.memory.writer.uniform", lambda shape, *rest: torch.full(tuple(shape), 0.3))
            with memory.write(ids, attention_mask=keep, generator=rng()) as written:
                found.append((written.losses, *(value.clone() for value in memory.fast.tensors())))
    for whole, cut in zip(*found, strict=True):
        assert_close(cut, whole, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("update", ["sequential", "accumulated"])
@pytest.mark.parametrize("family", ["llada", "lladamoe", "llada2", "small", "sdar", "dream"])
def test_what_a_row_draws_after_its_write_does_not_depend_on_its_neighbours(family, update):
    """A row of one chunk beside a row of four: the decoding draws from where the write left the generator."""
    memory = memory_of(tiny(family), chunk_length=5, chunk_update=update)
    long, after = random_ids(2, 17), []
    keep = torch.arange(17) < torch.tensor([3, 17])[:, None]
    for rows, width in ((slice(0, 2), 17), (slice(0, 1), 3)):
        generators = [derive("row", row) for row in range(2)][rows]
        with memory.write(long[rows, :width], attention_mask=keep[rows, :width], generator=generators):
            values = [value.select(-3, 0).clone() for value in memory.fast.tensors()]
        after.append((values, uniform((len(generators), 4), generators)[0]))
    (together, drawn), (alone, drawn_alone) = after
    assert_close(drawn, drawn_alone, rtol=0, atol=0)
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.parametrize("update", ["sequential", "accumulated"])
def test_an_overlap_is_shown_and_not_written_again(family, update):
    model, ids = tiny(family), random_ids(2, 14)
    memory = memory_of(model, **(STRIDED | {"chunk_update": update}), chunk_length=6, chunk_overlap=2)
    done = []
    with memory.write(ids, generator=rng(), on_chunk=done.append) as written:
        assert written.num_tokens == 2 * 14
    assert done == [6, 10, 14]
    parts = list(Text(ids, ids >= 0, None, None).chunks(6, 2))
    assert [part.clean.tolist() for part in parts] == [ids[:, start : start + 6].tolist() for start in (0, 4, 8)]
    assert [part.is_maskable[0].tolist() for part in parts] == [[True] * 6, *[[False] * 2 + [True] * 4] * 2]
    assert [part.clean.shape[1] for part in Text(ids[:, :10], ids[:, :10] >= 0, None, None).chunks(6, 2)] == [6, 6]


def test_a_word_of_the_chunk_before_changes_what_an_overlap_writes():
    model, ids = tiny("llada", torch.float64), random_ids(1, 12)
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % 20
    differs = []
    for overlap in (0, 1):
        memory = memory_of(model, **STRIDED, chunk_length=6, chunk_overlap=overlap)
        later = []
        for text in (ids, other):
            seen: list[torch.Tensor] = []
            note = lambda module, args, out, seen=seen: seen.append(args[0])
            hook = model.model.embed_tokens.register_forward_hook(note)
            with memory.write(text, generator=rng()):
                pass
            hook.remove()
            later.append(torch.cat([each.flatten() for each in seen[1:]]))
        differs.append(not torch.equal(*later))
    assert differs == [False, True]


def test_a_shorter_text_in_the_batch_is_accumulated_as_alone():
    model, ids = tiny("llada", torch.float64), random_ids(2, 12)
    keep = torch.arange(12) < torch.tensor([12, 3])[:, None]
    memory = memory_of(model, chunk_length=4, **STRIDED)
    generators = lambda: [derive("row", row) for row in range(2)]
    _, *together = values(memory, ids.masked_fill(~keep, PAD), attention_mask=keep, generator=generators())
    _, *alone = values(memory, ids[1:, :3], generator=generators()[1:])
    for several, one in zip(together, alone, strict=True):
        assert_close(several.select(-3, 1), one.select(-3, 0), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chunk_overlap": 4}, "mem_chunk_overlap=4 has no effect without mem_chunk_length"),
        ({"chunk_length": 4, "chunk_overlap": 4}, "mem_chunk_overlap=4 leaves nothing new"),
        ({"chunk_length": 4, "chunk_update": "joint"}, "chunk_update"),
    ],
)
def test_refusals(options, reason):
    with pytest.raises(ConfigError, match=reason):
        MemoryConfig(**options)
