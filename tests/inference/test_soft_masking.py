"""Soft-masking: the formula, what training sees, and decoding against a plain transcription, in float64."""

import pytest
import torch
from test_exactness import network, prompts_of, words
from torch.testing import assert_close

from memdlm.diffusion.choice import TokenSampler
from memdlm.diffusion.soft_masking import SoftMask
from memdlm.errors import ConfigError
from memdlm.inference import GenerationConfig, generate
from memdlm.models import ModelDenoiser
from memdlm.models.networks.soft_inputs import blended_inputs
from tiny import V, rng, tiny

SOFT = {"soft_mask": True, "soft_mask_scale": 0.9, "soft_mask_steepness": 2.0, "soft_mask_centre": -2.0}
MASK = words().mask_token_id


def feedback(logits, k=3, scale=0.9, steepness=2.0, centre=-2.0):
    """Equations 1 and 2, for one position: (tokens, weights, lambda)."""
    p = logits.clone()
    p[MASK] = -torch.inf
    p = p.softmax(-1)
    entropy = -sum(float(x) * float(x.log()) for x in p if x > 0)
    best = sorted(range(len(p)), key=lambda i: -float(p[i]))[:k]
    weights = [float(p[i]) / sum(float(p[j]) for j in best) for i in best]
    return best, weights, scale / (1 + torch.exp(torch.tensor(-steepness * (-entropy - centre))).item())


def test_the_feedback_is_the_papers():
    logits = torch.randn(5, V, generator=rng(3), dtype=torch.float64) * 2
    soft = SoftMask(mask_token_id=MASK, top_k=3, scale=0.9, steepness=2.0, centre=-2.0)
    found = soft.feedback(logits, torch.arange(5))
    for row in range(5):
        tokens, weights, share = feedback(logits[row])
        assert found.tokens[row].tolist() == tokens
        assert found.weights[row].tolist() == pytest.approx(weights)
        assert float(found.share[row]) == pytest.approx(share)
    model = tiny("llada2", torch.float64)
    denoise, ids = ModelDenoiser(model), torch.full((2, 6), MASK)
    positions = torch.tensor([1, 4, 9])
    asked = soft.ask(denoise, ids, positions)
    for mine, theirs in zip(asked, soft.feedback(denoise.logits(ids, positions), positions), strict=True):
        assert_close(mine, theirs)
    assert not asked.share.requires_grad


@pytest.mark.parametrize("family", ["small", "llada_switches"])
def test_the_network_sees_the_mixture(family):
    model = tiny(family, torch.float64)
    table = model.get_input_embeddings().weight
    ids = torch.randint(0, V, (2, 5), generator=rng(1))
    positions, tokens = torch.tensor([2, 7]), torch.tensor([[3, 4], [5, 6]])
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64)
    share = torch.tensor([0.4, 1.0], dtype=torch.float64)
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with blended_inputs(model, positions, tokens, weights, share):
        inside = model(ids).logits
    after = model(ids).logits
    handle.remove()
    expected = table[ids].flatten(0, 1).clone()
    expected[2] = 0.6 * table[ids[0, 2]] + 0.4 * (0.75 * table[3] + 0.25 * table[4])
    expected[7] = 0.5 * table[5] + 0.5 * table[6]
    model.get_input_embeddings().register_forward_hook(lambda *_: expected.view(2, 5, -1))
    assert_close(model(ids).logits, inside)
    assert not torch.allclose(after, inside)


@torch.no_grad()
def transcribed(model, prompt, count):
    """One token a step, most confident first; every pass sees the last one's predictions."""
    ids = torch.cat((prompt, torch.full((count,), MASK)))
    known = {}
    for _ in range(count):
        table = model.get_input_embeddings().weight
        inputs = table[ids].clone()
        for place, (tokens, weights, share) in known.items():
            if ids[place] == MASK:
                mixture = sum(weight * table[token] for token, weight in zip(tokens, weights, strict=True))
                inputs[place] = (1 - share) * inputs[place] + share * mixture
        handle = model.get_input_embeddings().register_forward_hook(lambda *_, inputs=inputs: inputs[None])
        logits = model(ids[None]).logits[0]
        handle.remove()
        open_places = [place for place in range(len(ids)) if ids[place] == MASK]
        chosen, sure = TokenSampler(mask_token_id=MASK).choose(logits[open_places])
        best = int(sure.argmax())
        known = {place: feedback(logits[place]) for place in open_places}
        ids[open_places[best]] = chosen[best]
    return ids


@pytest.mark.parametrize("family", ["small", "lladamoe"])
def test_decoding_feeds_every_prediction_back(family):
    model, prompts = network(family), prompts_of((5, 3, 6))
    config = {"max_new_tokens": 6, "eos_early_stop": False}
    soft = generate(model, words(), prompts, GenerationConfig(**config, **SOFT)).sequences
    hard = generate(model, words(), prompts, GenerationConfig(**config)).sequences
    assert [row.tolist() for row in soft] != [row.tolist() for row in hard]
    for prompt, row in zip(prompts, soft, strict=True):
        expected = transcribed(model, prompt, 6).tolist()
        assert row.tolist() == expected[: len(row)]


def test_the_cache_and_the_batch_change_nothing():
    model, prompts = network("llada2"), prompts_of((5, 9, 6, 17))
    config = {"max_new_tokens": 12, "block_size": 4, "threshold": 0.6, **SOFT}
    found = [
        generate(model, words(), prompts, GenerationConfig(**config, cache=cache)).sequences
        for cache in ("exact", "none")
    ]
    alone = [generate(model, words(), [prompt], GenerationConfig(**config)).sequences[0] for prompt in prompts]
    rows = [[row.tolist() for row in each] for each in (*found, alone)]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft_mask_top_k": 2}, "no effect without soft_mask=True"),
        ({"soft_mask": True, "cfg_scale": 1.0}, "soft_mask and cfg_scale"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**options)
