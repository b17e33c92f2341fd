"""Every family: chosen positions, checkpointing, dtypes, saving; experts against their loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from memdlm.errors import CheckpointError, ConfigError
from memdlm.models import LLaDAMoEConfig, build_model, load_model
from memdlm.models.experts import Experts, grouped_linear, looped_linear, route
from tiny import CONFIGS, random_ids, rng, tiny

every_family = pytest.mark.parametrize("family", sorted(CONFIGS))


@every_family
@torch.no_grad()
def test_chosen_positions_are_rows_of_the_whole(family):
    model, ids = tiny(family, torch.float64), random_ids(3, 7)
    positions = torch.tensor([0, 5, 8, 20])
    whole = model(ids).logits
    assert_close(model(ids, positions=positions).logits, whole.flatten(0, 1)[positions])
    hidden = model(ids, positions=positions, project=False)
    assert hidden.logits is None
    assert_close(model.predict(hidden.hidden_states[0]), whole.flatten(0, 1)[positions])


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
    x = torch.randn(7, 8, generator=g, dtype=dtype)
    expert = torch.rand(7, 4, generator=g).argsort(-1)[:, :2]  # the fifth expert gets no token
    weight = torch.rand(7, 2, generator=g, dtype=dtype)
    expected = torch.zeros_like(x)
    for t in range(7):
        for k in range(2):
            gate, up = (experts.gate_up_proj[expert[t, k]] @ x[t]).chunk(2)
            expected[t] += weight[t, k] * (experts.down_proj[expert[t, k]] @ (torch.nn.functional.silu(gate) * up))
    assert_close(experts(x, expert, weight), expected, rtol=1e-4, atol=1e-4)


def test_a_damaged_or_foreign_folder_is_refused_with_the_reason(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not exist"):
        load_model(tmp_path / "nothing")
    model = tiny("small")
    model.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="could not be read"):
        load_model(tmp_path / "cut")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"family 'bert' is not known. Possible: LLaDA, LLaDA-MoE"):
        load_model(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"dtype: 'float31'.*Did you mean 'float32'"):
        load_model(tmp_path / "cut", dtype="float31")


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    from safetensors.torch import save_file

    tiny("small").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model.norm.weight; unexpected: model.layers.0.extra.weight"):
        load_model(tmp_path)


def test_a_layer_list_of_the_wrong_length_is_refused():
    with pytest.raises(ConfigError, match="moe_layer_freq has 2 entries for 3 layers"):
        LLaDAMoEConfig(num_hidden_layers=3, moe_layer_freq=[1, 1])
