"""Which output predicts which token: one rule, of the family, for everything that reads predictions."""

import logging

import pytest
import torch
from torch.testing import assert_close

from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.diffusion import Linear
from memdlm.diffusion.masking import corrupt
from memdlm.errors import ConfigError
from memdlm.evaluation.masked_loss import loss_under, masked_loss, masked_text
from memdlm.inference import Decoder, GenerationConfig, generate, infill, score
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import BlockCausal, ModelDenoiser
from memdlm.models.networks import shifting
from memdlm.models.networks.shifting import shift_of, shifted
from memdlm.training.outer import Batch
from memdlm.training.outer import score as outer_score
from tiny import A2D, CONFIGS, MASK, PAD, V, random_ids, tiny

FAMILIES = sorted({**CONFIGS, **A2D})
MEMORY = MemoryConfig(inner_layer_fraction=0.5, inner_rank=2, inner_lr=0.5)


def words():
    return build_word_tokenizer([f"w{index:02}" for index in range(V - 5)])


def moved(logits):
    """The published rule: the first position keeps its own."""
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_an_option_the_family_decides(family):
    model, ids = tiny(family, torch.float64), random_ids(2, 7)
    positions, whole = torch.arange(14), model(ids).logits
    expected = (moved(whole) if family == "dream" else whole).flatten(0, 1)
    assert_close(ModelDenoiser(model).logits(ids, positions), expected)
    if shift_of(model):
        assert_close(ModelDenoiser(model, right_shift_logits=True).logits(ids, positions), expected)
    states = model(ids, output_hidden_states=True).hidden_states[-1]
    hidden = ModelDenoiser(model).hidden(ids, positions).unflatten(0, (2, 7))
    assert_close(hidden, moved(states) if family == "dream" else states)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: ModelDenoiser(model, right_shift_logits=False),
        lambda model: ParametricMemory(model, MEMORY, mask_token_id=MASK, right_shift_logits=False),
        lambda model: generate(model, words(), ["w1"], GenerationConfig(max_new_tokens=2, right_shift_logits=False)),
        lambda model: score(
            model, random_ids(1, 3)[0], random_ids(1, 3)[0], 2, mask_token_id=MASK, right_shift_logits=False
        ),
        lambda model: masked_loss(model, text(), mask_token_id=MASK, right_shift_logits=False),
    ],
    ids=["denoiser", "memory", "generate", "score", "masked_loss"],
)
def test_an_option_that_contradicts_the_family_is_refused(use):
    with pytest.raises(ConfigError, match=r"right_shift_logits=False contradicts DreamModel.*Leave"):
        use(tiny("dream"))


def test_a_shift_that_a_family_was_not_trained_with_warns_once_and_one_that_it_may_learn_does_not(caplog, monkeypatch):
    monkeypatch.setattr(shifting, "_TOLD", set())
    with caplog.at_level(logging.WARNING, logger="memdlm"):
        assert shift_of(tiny("a2d_qwen3"), True)
        assert shift_of(tiny("small"), True)
        assert not caplog.records
        assert shift_of(tiny("sdar"), True)
        assert shift_of(tiny("sdar"), True)
    assert len(caplog.records) == 1
    assert "SDARForCausalLM is published without a shift" in caplog.text


def test_the_first_position_and_the_first_behind_padding_keep_their_own():
    is_visible = torch.tensor([[True] * 4, [False, False, True, True]])
    assert shifted(torch.arange(8), 4).tolist() == [0, 0, 1, 2, 4, 4, 5, 6]
    assert shifted(torch.arange(8), 4, is_visible).tolist() == [0, 0, 1, 2, 4, 5, 6, 6]


@torch.no_grad()
def test_padding_on_the_left_changes_no_prediction():
    """A text that begins with a mask is predicted from its own first position, not from the padding before it."""
    model, ids = tiny("dream", torch.float64), random_ids(1, 6)
    ids[0, 0] = MASK
    alone = ModelDenoiser(model).logits(ids, torch.arange(6))
    padded = torch.cat((torch.full((1, 3), PAD), ids), dim=1)
    keep = (torch.arange(9) >= 3)[None]
    found = ModelDenoiser(model, attention_mask=keep).logits(padded, torch.arange(3, 9))
    # Rotations are relative, so three columns more change nothing.
    assert_close(found, alone)


def text():
    return masked_text(random_ids(1, 12)[0], ratio=0.4, views=2, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_scores_of_a_text_are_those_of_the_shifted_logits():
    model, hidden = tiny("dream", torch.float64), text()
    nats, count = 0.0, 0
    for view in hidden.is_masked:
        logits = moved(model(hidden.ids[None].masked_fill(view, MASK)).logits)[0]
        nats += float(torch.nn.functional.cross_entropy(logits[view], hidden.ids[view], reduction="sum"))
        count += int(view.sum())
    assert masked_loss(model, hidden, mask_token_id=MASK) == pytest.approx(nats / count)
    memory = ParametricMemory(model, MEMORY, mask_token_id=MASK)
    assert memory.right_shift_logits
    assert loss_under(memory, hidden) == pytest.approx(nats / count)


def test_an_inner_step_goes_down_the_loss_of_the_shifted_logits():
    """The gradient of a write, against autograd through the published rule."""
    model, ids = tiny("dream", torch.float64), random_ids(1, 10)
    config = MemoryConfig(
        masking_strategy="no_progressive",
        inner_adapter_type="full",
        inner_layer_fraction=0.5,
        inner_lr=0.1,
        inner_grad_clip=0.0,
        inner_dropout=0.0,
    )
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named["input_ids"] if "input_ids" in named else arguments[0]),
        with_kwargs=True,
    )
    with memory.write(ids) as written:
        deltas = [each.detach().clone() for each in memory.fast.tensors()]
    handle.remove()
    state = next(each for each in seen if each is not None)
    is_masked = state == MASK
    logits = moved(model(state).logits)
    loss = torch.nn.functional.cross_entropy(logits[is_masked], ids[is_masked])
    assert written.losses[0] == pytest.approx(loss.item())
    adapted = dict(model.named_modules())
    weights = [adapted[name.rsplit(".", 1)[0]].weight for name in memory.fast.names()]
    for delta, gradient in zip(deltas, torch.autograd.grad(loss, weights), strict=True):
        assert_close(delta.squeeze(0), -0.1 * gradient)


@pytest.mark.parametrize("pattern", [None, BlockCausal(4)], ids=str)
def test_an_infilling_that_begins_with_a_mask_does_not_depend_on_the_batch(pattern):
    model, tokenizer = tiny("dream", torch.float64), words()
    mask = tokenizer.mask_token_id
    rows = [torch.tensor([mask, 7, mask, 9, 10, mask, 8]), torch.tensor([mask, mask, 6]), torch.tensor([5, mask])]
    config = GenerationConfig(block_size=4, **({"threshold": 0.3} if pattern else {}))
    together = infill(model, tokenizer, rows, config, attention_pattern=pattern).sequences
    for row, done in zip(rows, together, strict=True):
        alone = infill(model, tokenizer, [row], config, attention_pattern=pattern).sequences[0]
        assert done.tolist() == alone.tolist()
        assert done[row != mask].equal(row[row != mask])


@pytest.mark.parametrize(
    ("option", "message"),
    [({"cache": "approximate"}, "not for DreamModel"), ({"compile": "default"}, "not for DreamModel")],
)
def test_what_a_shift_excludes_is_refused_by_the_familys_name(option, message):
    decoder = Decoder(tiny("dream"), words(), GenerationConfig(max_new_tokens=2, **option))
    with pytest.raises(ConfigError, match=message):
        decoder.generate(["w1"])
    assert decoder.caching(None) is decoder, "the whole canvas is seen: nothing of a prompt can be kept"


def test_the_outer_loss_is_that_of_the_shifted_logits():
    model, ids = tiny("dream", torch.float64), random_ids(2, 9)
    is_maskable = torch.ones(2, 9, dtype=torch.bool)
    draws = torch.rand(2, 9, generator=torch.Generator().manual_seed(3))
    noised = corrupt(ids, is_maskable, torch.tensor([0.5, 0.7]), draws, schedule=Linear(), mask_token_id=MASK)
    batch = Batch(clean=ids, labels=ids, attention_mask=None, is_padding=None, is_maskable=is_maskable, noised=noised)
    scored = outer_score(
        model, batch, schedule=Linear(), weighting="uniform", norm="token", total_tokens=18.0, total_rows=2.0
    )
    logits = moved(model(noised.ids).logits)[noised.is_masked]
    expected = torch.nn.functional.cross_entropy(logits, ids[noised.is_masked], reduction="sum") / 18
    assert_close(scored.loss, expected)
