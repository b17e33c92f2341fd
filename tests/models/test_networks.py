"""Every family: chosen positions, checkpointing, dtypes, saving; experts against their loop."""

import pytest
import torch
from accelerate.utils import convert_to_fp32
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from memdlm.errors import ConfigError
from memdlm.models import LLaDA2MoeConfig, LLaDAConfig, LLaDAMoEConfig, build_model, load_model
from memdlm.models.blocks.experts import Experts, grouped_linear, looped_linear, route
from memdlm.models.networks.llada2 import GroupRouter
from memdlm.models.networks.requests import Prediction, Request
from tiny import CONFIGS, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))


@every_family
@torch.no_grad()
def test_chosen_positions_are_rows_of_the_whole(family):
    model, ids = tiny(family, torch.float64), random_ids(3, 7)
    positions = torch.tensor([0, 5, 8, 20])
    whole = model(ids).logits
    assert_close(model(ids, positions=positions).logits, whole.flatten(0, 1)[positions])
    hidden = model(ids, positions=positions, request=Request(hidden_only=True))
    assert hidden.logits is None
    assert_close(model.predict(hidden.hidden), whole.flatten(0, 1)[positions])


def test_wrappers_see_the_tensors_of_a_request_and_of_a_prediction():
    """FSDP2 casts what pytrees hold, accelerate the outputs of a forward pass under autocast."""
    asked = tree_map_only(torch.Tensor, Tensor.bfloat16, Request(weights=torch.ones(2)))
    assert isinstance(asked, Request)
    assert asked.weights.dtype == torch.bfloat16
    found = convert_to_fp32(Prediction(hidden=torch.ones(2, dtype=torch.bfloat16)))
    assert isinstance(found, Prediction)
    assert found.hidden.dtype == torch.float32
    assert found.logits is None


@every_family
def test_only_chosen_positions_reach_the_vocabulary(family):
    model, seen = tiny(family), []
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    model(random_ids(2, 9), positions=torch.tensor([3, 4, 11]))
    assert seen == [(3, model.lm_head.out_features)]


@every_family
def test_gradient_checkpointing_changes_nothing(family):
    def gradients(checkpointing):
        model = tiny(family, torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(random_ids(2, 6)).logits.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_every_dtype_works(family, dtype):
    exact = tiny(family, torch.float64)(random_ids(2, 6)).logits
    logits = tiny(family, dtype)(random_ids(2, 6)).logits
    assert logits.dtype == dtype
    is_possible = exact > -1e5  # MDLM never predicts its mask
    exact, logits = exact[is_possible], logits[is_possible]
    error = (logits.double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.2, torch.float64: 1e-12}[dtype]


@every_family
def test_a_saved_model_loads_to_the_same_bits(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert not again.training
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].equal(value)
    ids = random_ids(2, 6)
    assert again(ids).logits.equal(model(ids).logits)


def test_experts_are_saved_one_tensor_each(tmp_path):
    tiny("lladamoe").save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "model.layers.1.mlp.experts.5.gate_proj.weight" in names
    assert "model.layers.1.shared_expert.down_proj.weight" in names
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert "model.layers.2.mlp.expert_bias" in names
    assert not any("gate_up" in name for name in names)


def test_the_same_seed_builds_the_same_model_and_leaves_the_global_stream_alone():
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    a, b, c = (build_model(CONFIGS["small"](), seed=seed) for seed in (0, 0, 1))
    assert torch.rand(1).equal(before)
    assert a.lm_head.weight.equal(b.lm_head.weight)
    assert not a.lm_head.weight.equal(c.lm_head.weight)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    width=st.sampled_from([4, 8]),
    out=st.sampled_from([4, 12]),
    seed=st.integers(0, 99),
)
def test_grouped_products_equal_the_loop(sizes, width, out, seed):
    g = rng(seed)
    x = torch.randn(sum(sizes), width, generator=g, requires_grad=True)
    weight = torch.randn(len(sizes), out, width, generator=g, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    results = []
    for product in (grouped_linear, looped_linear):
        y = product(x, weight, ends)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight), allow_unused=True)))
    for ours, oracle in zip(*results, strict=True):
        if oracle is None:
            assert ours is None or not ours.any()
        else:
            assert_close(ours, oracle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 9])
def test_any_rank_is_one_grouped_product(rank, dtype, monkeypatch):
    """Rows that are no whole number of 16 bytes are filled up; the loop would wait for the device."""
    g = rng(rank)
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    x = torch.randn(7, 10, generator=g, dtype=dtype, requires_grad=True)
    down = torch.randn(3, rank, 10, generator=g, dtype=dtype, requires_grad=True)
    up = torch.randn(3, 6, rank, generator=g, dtype=dtype, requires_grad=True)
    found = []
    for product in (looped_linear, grouped_linear):
        if product is grouped_linear:
            monkeypatch.setattr("memdlm.models.blocks.experts.looped_linear", None)
        y = product(product(x, down, ends), up, ends)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, down, up))))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for oracle, ours in zip(*found, strict=True):
        assert_close(ours, oracle, rtol=tolerance, atol=tolerance * oracle.abs().max().item())


def test_no_rows_give_no_rows_and_a_gradient_of_zero(monkeypatch):
    monkeypatch.setattr("memdlm.models.blocks.experts.looped_linear", None)
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(2, 4, 8, requires_grad=True)
    y = grouped_linear(x, weight, torch.zeros(2, dtype=torch.int32))
    assert y.shape == (0, 4)
    y.sum().backward()
    assert not weight.grad.any()


def test_under_autocast_experts_compute_in_its_dtype_as_linear_layers_do():
    g = rng()
    x, weight = torch.randn(6, 8, generator=g), torch.randn(1, 8, 8, generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        ours = grouped_linear(x, weight, torch.tensor([6], dtype=torch.int32))
        linear = torch.nn.functional.linear(x, weight[0])
    assert ours.dtype == linear.dtype == torch.bfloat16
    assert_close(ours, linear)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x.double(), weight.double(), torch.tensor([6])).dtype == torch.float64


@given(tokens=st.integers(1, 6), samples=st.integers(1, 3), chosen=st.integers(1, 3), seed=st.integers(0, 99))
def test_routing_sorts_by_expert_then_sample_and_back(tokens, samples, chosen, seed):
    num_experts, total = 4, tokens * samples
    expert = torch.rand(total, num_experts, generator=rng(seed)).argsort(-1)[:, :chosen]
    routing = route(expert, num_experts, samples)
    sorted_experts = expert.flatten()[routing.order]
    sample = routing.token // tokens
    key = sorted_experts * samples + sample
    assert (key.diff() >= 0).all()
    sizes = key.bincount(minlength=num_experts * samples)
    assert routing.ends.tolist() == sizes.cumsum(0).tolist()
    assert routing.expert_ends.tolist() == sorted_experts.bincount(minlength=num_experts).cumsum(0).tolist()
    values = torch.arange(total * chosen)
    assert routing.restore(values[routing.order]).equal(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_equal_a_sum_over_all_experts(dtype):
    g = rng(2)
    experts = Experts(5, 8, 12).to(dtype)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=dtype)
    x = torch.randn(7, 8, generator=g, dtype=dtype, requires_grad=True)
    expert = torch.rand(7, 4, generator=g).argsort(-1)[:, :2]  # the fifth expert gets no token
    weight = torch.rand(7, 2, generator=g, dtype=dtype)
    expected = torch.zeros_like(x)
    for t in range(7):
        for k in range(2):
            gate, up = (experts.gate_up_proj[expert[t, k]] @ x[t]).chunk(2)
            expected[t] = expected[t] + weight[t, k] * (
                experts.down_proj[expert[t, k]] @ (torch.nn.functional.silu(gate) * up)
            )
    out = experts(x, expert, weight)
    assert_close(out, expected, rtol=1e-4, atol=1e-4)
    leaves = (x, *experts.parameters())
    ours, oracle = (torch.autograd.grad(each.square().sum(), leaves) for each in (out, expected))
    for mine, theirs in zip(ours, oracle, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert not ours[1][expert_without_a_token(expert)].any()


def expert_without_a_token(expert):
    return next(e for e in range(5) if not (expert == e).any())


def test_a_layer_list_of_the_wrong_length_is_refused():
    with pytest.raises(ConfigError, match="moe_layer_freq has 2 entries for 3 layers"):
        LLaDAMoEConfig(num_hidden_layers=3, moe_layer_freq=[1, 1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LLaDAConfig(block_type="sequential"), "block_type='sequential' is not supported.*'llama'"),
        (lambda: LLaDAConfig(alibi=True), "alibi=True is not supported"),
        (lambda: LLaDAConfig(d_model=30, n_heads=4), "d_model 30, n_heads 4"),
        (lambda: LLaDAConfig(vocab_size=10, embedding_size=8), "embedding_size 8 is below vocab_size 10"),
        (lambda: LLaDA2MoeConfig(num_experts=8, n_group=8), "at least 2"),
        (lambda: LLaDA2MoeConfig(num_experts=8, n_group=4, topk_group=1, num_experts_per_tok=3), "topk_group 1"),
        (lambda: LLaDA2MoeConfig(rope_scaling={"factor": 2}), "rope_scaling"),
    ],
)
def test_a_configuration_that_no_published_network_has_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@given(tokens=st.integers(1, 9), seed=st.integers(0, 99), biased=st.booleans())
def test_group_routing_follows_its_definition(tokens, seed, biased):
    """Biased scores choose groups and experts; the weights are the unbiased scores, renormalised and scaled."""
    config = CONFIGS["llada2"]()
    router, g = GroupRouter(config).double(), rng(seed)
    router.weight.data = torch.randn(router.weight.shape, generator=g, dtype=torch.float64)
    if biased:
        router.expert_bias.copy_(torch.randn(config.num_experts, generator=g))
    x = torch.randn(tokens, config.hidden_size, generator=g, dtype=torch.float64)
    expert, weight = router(x)
    score = (x @ router.weight.T).sigmoid()
    ranking = score + router.expert_bias
    size = config.num_experts // config.n_group
    for t in range(tokens):
        groups = [ranking[t, i * size : (i + 1) * size].sort(descending=True).values[:2].sum() for i in range(4)]
        best = sorted(range(4), key=lambda i: -groups[i])[: config.topk_group]
        allowed = [e for e in range(config.num_experts) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -ranking[t, e])[: config.num_experts_per_tok]
        assert expert[t].tolist() == chosen
        assert_close(weight[t], score[t, chosen] / score[t, chosen].sum() * config.routed_scaling_factor)


def test_the_routing_bias_stays_float32_in_a_half_precision_load(tmp_path):
    model = tiny("llada2")
    for layer in model.model.layers[1:]:
        layer.mlp.gate.expert_bias.copy_(torch.rand(8, generator=rng(1)) * 1e-3 + 1)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, dtype="bfloat16")
    for old, new in zip(model.model.layers[1:], again.model.layers[1:], strict=True):
        assert new.mlp.gate.expert_bias.dtype == torch.float32
        assert new.mlp.gate.expert_bias.equal(old.mlp.gate.expert_bias)
        assert new.mlp.gate.weight.dtype == torch.bfloat16


def test_embedding_scale_and_logit_scale_are_what_they_say():
    scaled, plain = (
        build_model(LLaDAConfig(**SMALL_LLADA, **switch), seed=0)
        for switch in ({"input_emb_norm": True, "scale_logits": True}, {})
    )
    ids = random_ids(1, 5)
    with torch.no_grad():
        embeds = plain.model.embed_tokens(ids)
        assert_close(scaled(ids).logits, plain(inputs_embeds=embeds * 32**0.5).logits * 32**-0.5)


SMALL_LLADA = {"vocab_size": 32, "d_model": 32, "mlp_hidden_size": 48, "n_layers": 2, "n_heads": 4}


def test_more_embedding_rows_than_words_and_tied_weights():
    model = tiny("llada_switches")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (36, 32)
    assert model(random_ids(1, 3)).logits.shape[-1] == 36


@pytest.mark.parametrize("shared", [None, 0])
def test_no_shared_experts_can_be_said_in_two_ways(shared):
    config = CONFIGS["llada2"]()
    config.num_shared_experts = shared
    model = build_model(config, seed=0)
    assert not any("shared" in name for name in model.state_dict())
    assert model(random_ids(1, 4)).logits.isfinite().all()
