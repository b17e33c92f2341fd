"""Block-diffusion training as published: dLLM's BD3LM trainer and SDAR's own training step."""

import copy
import re

import pytest
import torch
from torch.testing import assert_close

from goldens import cannot_replay, folders, model, must_know, read_json, tensors
from memdlm.diffusion import Corrupted, Linear, make_schedule, masked_loss
from memdlm.models.blocks.masks import BlockDiffusion
from memdlm.models.border.block_diffusion import BlockDiffusionDenoiser
from memdlm.types import Denoise

pytestmark = pytest.mark.golden
MASK = 505
SCHEDULERS = {"LinearAlphaScheduler": "linear", "CosineAlphaScheduler": "cosine"}
OF_BD3LM = {
    *("block_size", "length", "loss_weight_type", "loss_norm_type", "right_shift_logits", "scheduler", "labels"),
    *("loss", "base_grad_norm", "base_grad_norm_if_pad_row_trained", "per_param_grad_norm", "num_masked"),
    "position_ids",
}
OF_SDAR = {"block_size", "loss", "answer_tokens", "num_masked", "lengths", "same_noise_as_forward_add_noise_packed"}
TENSORS = re.compile(
    r"grad/.+|(noised_|concat_)?input_ids|t|(masked|maskable|attention|p)_mask|token_(nll|loss)|logits(_masked)?"
    r"|concat_position_ids"
)
BD3LM = [
    (family, name)
    for family in folders("bd3lm.json")
    for name in read_json(family, "bd3lm.json")
    if name.startswith("train/")
]
SDAR = [(family, name) for family in folders("train.json") for name in read_json(family, "train.json")]


class Kept(Denoise):
    """A denoiser that keeps the logits it was asked for."""

    def __init__(self, inner):
        self.inner = inner

    def logits(self, ids, positions):
        self.seen = self.inner.logits(ids, positions)
        return self.seen

    def hidden(self, ids, positions):
        return self.inner.hidden(ids, positions)


def recorded(family, file, name, known):
    """The record and the tensors of a case."""
    record = read_json(family, f"{file}.json")[name]
    must_know(name, record, known)
    found = tensors(family, f"{file}.safetensors")
    found = {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}
    must_know(name, found, filter(TENSORS.fullmatch, found), "tensor")
    return record, found


@pytest.mark.parametrize(("family", "name"), BD3LM, ids="/".join)
def test_bd3lm(family, name):
    record, data = recorded(family, "bd3lm", name, OF_BD3LM)
    if "noised_input_ids" not in data:
        pytest.skip("figures alone: the states of this case were not kept")
    network = copy.deepcopy(model(family)).train()
    clean, noised = data["input_ids"], Corrupted(data["noised_input_ids"], data["masked_mask"], data["t"])
    inputs = tensors(family, "inputs.safetensors")
    if record["labels"] == "inputs.labels":
        assert data["maskable_mask"].equal(inputs["labels"] != -100)
        assert clean.equal(inputs["input_ids"])
    elif "BOS" in record["labels"]:
        assert clean[:, 1:].equal(inputs["input_ids"])
        assert not data["maskable_mask"][:, 0].any()
    assert int(data["masked_mask"].sum()) == record["num_masked"]
    block, schedule = record["block_size"], make_schedule(SCHEDULERS[record["scheduler"]])
    if "attention_mask" in data:
        allowed = BlockDiffusion(block).allowed(2 * clean.shape[1], clean.device)
        assert allowed.equal(data["attention_mask"])
    denoise = Kept(BlockDiffusionDenoiser(network, clean, block, right_shift_logits=record["right_shift_logits"]))
    lost = masked_loss(
        denoise,
        clean,
        noised,
        data["maskable_mask"],
        schedule=schedule,
        weighting=record["loss_weight_type"],
        norm=record["loss_norm_type"],
    )
    assert_close(lost.loss.item(), record["loss"], rtol=2e-6, atol=0)
    assert_close(lost.sums, data["token_nll"].double().sum(1).to(lost.sums), rtol=5e-6, atol=0)
    if "logits" in data:
        assert_close(denoise.seen, data["logits"][data["masked_mask"]], rtol=0, atol=3e-4)
    lost.loss.backward()
    gradients = {each: p.grad for each, p in network.named_parameters() if p.grad is not None}
    total = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    # The published class never trains the embedding of the padding token through the input; ours does.
    assert_close(total, record["base_grad_norm_if_pad_row_trained"], rtol=1e-5, atol=0)
    for parameter, norm in (record.get("per_param_grad_norm") or {}).items():
        if "embed_tokens" not in parameter:
            assert_close(gradients[parameter].norm().item(), norm, rtol=1e-4, atol=1e-5)
    for key, value in data.items():
        if key.startswith("grad/"):
            assert_close(gradients[key.removeprefix("grad/")], value, rtol=1e-4, atol=1e-4)


def samples_of(record, data):
    """Yield (row, first column, length, noised ids, clean ids, positions) of every packed sample."""
    for row, lengths in enumerate(record["lengths"]):
        start = 0
        for length in lengths:
            noised, clean = (slice(2 * start + half * length, 2 * start + (half + 1) * length) for half in (0, 1))
            ids, places = data["concat_input_ids"][row], data["concat_position_ids"][row]
            assert places[noised].equal(torch.arange(length))
            assert places[clean].equal(torch.arange(length))
            yield row, start, length, ids[noised], ids[clean]
            start += length


@pytest.mark.parametrize(("family", "name"), SDAR, ids="/".join)
def test_sdar(family, name):
    """Packed samples do not see each other, so each is a row of its own; the rest is options."""
    record, data = recorded(family, "train", name, OF_SDAR)
    if "concat_input_ids" not in data:
        pytest.skip("figures alone: the states of this case were not kept")
    block, is_masked = record["block_size"], data["masked_mask"]
    samples = list(samples_of(record, data))
    width = max(length for _, _, length, _, _ in samples)
    noised, clean = (torch.zeros(len(samples), width, dtype=torch.int64) for _ in range(2))
    keep, masked = (torch.zeros(len(samples), width, dtype=torch.bool) for _ in range(2))
    t = torch.full((len(samples),), 0.5)
    numbered = torch.zeros(is_masked.shape, dtype=torch.int64).masked_scatter(is_masked, torch.arange(is_masked.sum()))
    order, expected = [], torch.zeros_like(data["attention_mask"])
    for number, (row, start, length, of_noised, of_clean) in enumerate(samples):
        here = slice(start, start + length)
        noised[number, :length], clean[number, :length], keep[number, :length] = of_noised, of_clean, True
        masked[number, :length] = is_masked[row, here]
        order.append(numbered[row, here][is_masked[row, here]])
        of_sample = data["p_mask"][order[-1]]
        if len(of_sample):
            assert (of_sample == of_sample[0]).all(), "one probability for a sample"
            t[number] = of_sample[0]
        if row == 0:
            both = slice(2 * start, 2 * (start + length))
            expected[both, both] = BlockDiffusion(block).allowed(2 * length, keep.device)
    if data["attention_mask"].dim() != 2:
        cannot_replay(name, "its attention mask is not that of one row")
    assert expected.equal(data["attention_mask"])
    assert (noised == MASK).equal(masked)
    denoise = Kept(BlockDiffusionDenoiser(model(family), clean, block, attention_mask=keep))
    with torch.no_grad():
        lost = masked_loss(
            denoise,
            clean,
            Corrupted(noised, masked, t),
            keep,
            schedule=Linear(),
            weighting="inverse",
            norm="token",
            total_tokens=torch.tensor(record["answer_tokens"]),
            total_rows=torch.tensor(len(samples)),
        )
    assert_close(lost.loss.item(), record["loss"], rtol=2e-6, atol=0)
    assert_close(lost.sums.sum().item() / record["answer_tokens"], record["loss"], rtol=2e-6, atol=0)
    if "logits_masked" in data:
        assert_close(denoise.seen, data["logits_masked"][torch.cat(order)], rtol=0, atol=3e-4)
    nats = torch.nn.functional.cross_entropy(denoise.seen, clean[masked], reduction="none")
    assert_close(data["token_loss"][torch.cat(order)], nats / t[masked.nonzero()[:, 0]], rtol=1e-4, atol=1e-5)
