"""A weighted sum of values, whose gradients are taken chunk by chunk with it: those of one call, once."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from memdlm.diffusion import Linear, normalise
from memdlm.diffusion.losses import Nats, Planner
from memdlm.models import ModelDenoiser
from memdlm.models.blocks import chunked_loss
from memdlm.models.blocks.chunked_loss import sum_in_chunks
from memdlm.randomness import derive
from memdlm.training import score
from rank_worker import batch_of
from tiny import CONFIGS, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))
V = 41


def small_chunks(monkeypatch, rows, vocabulary=V):
    monkeypatch.setattr(chunked_loss, "MAX_SUMMED_LOGITS", rows * vocabulary)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
)
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_it_is_the_weighted_sum_of_one_call(dtype, tolerance, rows, monkeypatch):
    small_chunks(monkeypatch, rows)
    head = nn.Linear(8, V).to(dtype)
    targets = torch.randint(0, V, (10,), generator=rng(1))
    weights = torch.linspace(0, 3e-4, 10).double()
    found = []
    for is_fused in (True, False):
        hidden = torch.randn(10, 8, generator=rng()).to(dtype).requires_grad_()
        if is_fused:
            total, values = sum_in_chunks(Nats(targets), hidden, head, V, weights, tuple(head.parameters()))
        else:
            values = Nats(targets)(hidden, slice(0, 10), head)
            total = (values * weights.to(values.dtype)).sum()
        found.append((total, values.detach(), *torch.autograd.grad(total * 7, (hidden, *head.parameters()))))
    assert not found[0][1].requires_grad
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


def test_many_chunks_in_bfloat16_lose_nothing(monkeypatch):
    """Each adds little to a gradient that is large by then: in 16 bits that would be rounded away."""
    hidden, targets = torch.randn(2000, 8, generator=rng()).abs().bfloat16(), torch.zeros(2000, dtype=torch.int64)
    weights = torch.ones(2000).double()

    def gradient(dtype, rows):
        small_chunks(monkeypatch, rows)
        head = nn.Linear(8, V, bias=False)
        nn.init.normal_(head.weight, generator=rng(3))
        head = head.to(torch.bfloat16).to(dtype)  # the same numbers in both
        total, _ = sum_in_chunks(Nats(targets), hidden.to(dtype), head, V, weights, tuple(head.parameters()))
        return torch.autograd.grad(total, head.weight)[0].double()

    exact = gradient(torch.float64, 2000)
    one, many = ((gradient(torch.bfloat16, rows) - exact).norm() / exact.norm() for rows in (2000, 4))
    assert many <= 1.5 * one


def test_a_gpu_gets_chunks_by_its_memory(monkeypatch):
    sizes = {"small": 2**30, "large": 80 * 10**9}
    for name, total in sizes.items():
        card = SimpleNamespace(total_memory=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        sizes[name] = chunked_loss.at_once(2**23, torch.device("cuda"))
    assert sizes["small"] == 2**23
    assert 2**23 < sizes["large"] <= 80 * 10**9 / 32 / 16
    assert chunked_loss.at_once(5, torch.device("cpu")) == 5


def gradients_of(model, batch, norm, is_fused, **options):
    model.zero_grad()
    common = {"schedule": Linear(), "weighting": "scheduler", **options}
    if is_fused:
        lost = score(model, batch, norm=norm, **common)
        loss = lost.loss
        assert not lost.sums.requires_grad
    else:
        lost = score(model, batch, **common)
        loss = normalise(lost.sums, lost.counts, norm).squeeze()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"": loss.detach(), "bound": lost.bound, "sums": lost.sums.detach(), **found}


@every_family
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
@pytest.mark.parametrize("planner", [None, Planner(1.0)])
def test_the_training_loss_is_the_normalised_sums(family, norm, planner, monkeypatch):
    small_chunks(monkeypatch, 3)
    model, batch = tiny(family, torch.float64).train(), batch_of(slice(None))
    fused, plain = (gradients_of(model, batch, norm, each, planner=planner) for each in (True, False))
    assert fused.keys() == plain.keys()
    # Outside the head 1/t is computed in float32 on both sides.
    assert_close(fused, plain, rtol=1e-6, atol=1e-10)


def test_an_adapter_on_the_head_gets_its_gradient(monkeypatch):
    small_chunks(monkeypatch, 3)
    model = get_peft_model(tiny("llada", torch.float64), LoraConfig(r=2, target_modules=["lm_head", "up_proj"]))
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=derive("B", index)).to(parameter) * 0.1)
    model, batch = model.double(), batch_of(slice(None))
    fused, plain = (gradients_of(model, batch, "token", each) for each in (True, False))
    assert any("lm_head" in name for name in fused)
    assert not any("base_layer" in name for name in fused)
    assert_close(fused, plain, rtol=1e-6, atol=1e-10)


def test_mixed_precision_is_that_of_one_call(monkeypatch):
    small_chunks(monkeypatch, 3)
    model, batch = tiny("llada"), batch_of(slice(None))
    with torch.autocast("cpu", torch.bfloat16):
        fused, plain = (gradients_of(model, batch, "token", each) for each in (True, False))
    for name, value in plain.items():
        assert fused[name].dtype == value.dtype
        assert_close(fused[name], value, rtol=0.05, atol=0.02 * value.abs().max().item(), msg=name)


def test_no_more_than_a_chunk_exists_at_once_and_none_is_projected_twice(monkeypatch):
    model, batch, seen = tiny("small"), batch_of(slice(None)), []
    small_chunks(monkeypatch, 4, model.lm_head.weight.shape[0])
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    gradients_of(model, batch, "token", True)
    assert max(seen) == 4
    assert sum(seen) == int(batch.noised.is_masked.sum())


def test_the_gradients_are_there_once():
    model, ids = tiny("small"), random_ids(1, 6)
    positions = torch.arange(6)
    total, _ = ModelDenoiser(model).read_sum(ids, positions, Nats(ids[0]), torch.ones(6))
    (gradient,) = torch.autograd.grad(total, [model.lm_head.weight], retain_graph=True)
    assert gradient.any()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(total, [model.lm_head.weight])
    total, _ = ModelDenoiser(model).read_sum(ids, positions, Nats(ids[0]), torch.ones(6))
    (gradient,) = torch.autograd.grad(total, [model.lm_head.weight], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_a_head_that_is_not_trained_needs_no_gradient():
    model, ids = tiny("llada"), random_ids(1, 6)
    model.lm_head.requires_grad_(False)
    total, _ = ModelDenoiser(model).read_sum(ids, torch.arange(6), Nats(ids[0]), torch.ones(6))
    total.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_nothing_to_score_is_a_loss_of_zero():
    model, ids = tiny("small"), random_ids(1, 6)
    none = torch.zeros(0, dtype=torch.int64)
    total, values = ModelDenoiser(model).read_sum(ids, none, Nats(none), torch.zeros(0))
    total.backward()
    assert total == 0
    assert values.shape == (0,)
