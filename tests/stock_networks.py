"""The published networks written from their papers' formulas: torch and safetensors alone, one linear layer per expert.

Modules have the published names, so a checkpoint loads as it is and plain PEFT finds what an adapter names. Every
token sees every other.

    python tests/stock_networks.py IDS.pt OUT.pt CHECKPOINT CHECKPOINT:ADAPTER ...     # PEFT puts ADAPTER on
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


def linear(wide, out):
    return nn.Linear(wide, out, bias=False)


def container(**modules):
    found = nn.Module()
    for name, module in modules.items():
        found.add_module(name, module)
    return found


def rotated(x, theta, width):
    """Turn the first `width` channels of x [B, H, L, P] by their position."""
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), frequency).repeat(1, 2)
    part, rest = x[..., :width], x[..., width:]
    first, second = part.chunk(2, -1)
    turned = part * angle.cos().to(x) + torch.cat((-second, first), -1) * angle.sin().to(x)
    return torch.cat((turned, rest), -1)


def attended(q, k, v, heads, theta, width, norms=(None, None)):
    """Attention of q [B, L, H P] and k, v [B, L, G P], with G key heads shared by groups of query heads."""
    size = q.shape[-1] // heads
    q, k, v = (each.unflatten(-1, (-1, size)).transpose(1, 2) for each in (q, k, v))
    q, k = (each if norm is None else norm(each) for each, norm in zip((q, k), norms, strict=True))
    q, k = rotated(q, theta, width), rotated(k, theta, width)
    k, v = (each.repeat_interleave(heads // each.shape[1], 1) for each in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Gated(nn.Module):
    def __init__(self, wide, inner):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(wide, inner), linear(wide, inner), linear(inner, wide)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def mixed(experts, x, expert, weight):
    """Sum each token's experts, one expert after the other."""
    out = torch.zeros_like(x)
    for number, module in enumerate(experts):
        token, place = (expert == number).nonzero(as_tuple=True)
        if len(token):
            out = out.index_add(0, token, module(x[token]) * weight[token, place, None])
    return out


class LLaDA(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, self.c = c["d_model"], c
        blocks = [
            container(
                **{name: nn.RMSNorm(d, c["rms_norm_eps"]) for name in ("attn_norm", "ff_norm")},
                **{name: linear(d, d) for name in ("q_proj", "k_proj", "v_proj", "attn_out")},
                **{name: linear(d, c["mlp_hidden_size"]) for name in ("ff_proj", "up_proj")},
                ff_out=linear(c["mlp_hidden_size"], d),
            )
            for _ in range(c["n_layers"])
        ]
        ends = {"wte": nn.Embedding(c["vocab_size"], d), "ln_f": nn.RMSNorm(d, c["rms_norm_eps"])}
        ends["ff_out"] = linear(d, c["vocab_size"])
        self.model = container(transformer=container(blocks=nn.ModuleList(blocks), **ends))

    def forward(self, ids):
        body, heads = self.model.transformer, self.c["n_heads"]
        x = body.wte(ids)
        for block in body.blocks:
            y = block.attn_norm(x)
            y = attended(
                *(block.q_proj(y), block.k_proj(y), block.v_proj(y)),
                *(heads, self.c["rope_theta"], self.c["d_model"] // heads),
            )
            x = x + block.attn_out(y)
            y = block.ff_norm(x)
            x = x + block.ff_out(F.silu(block.ff_proj(y)) * block.up_proj(y))
        return body.ff_out(body.ln_f(x))


class Mixture(nn.Module):
    """Embedding, layers of attention and experts, output: what both mixtures of experts share."""

    def __init__(self, c):
        super().__init__()
        d, self.c = c["hidden_size"], c
        self.size = c.get("head_dim") or d // c["num_attention_heads"]
        layers = [
            container(
                **{name: nn.RMSNorm(d, c["rms_norm_eps"]) for name in ("input_layernorm", "post_attention_layernorm")},
                **self.parts(index),
            )
            for index in range(c["num_hidden_layers"])
        ]
        norm = nn.RMSNorm(d, c["rms_norm_eps"])
        embedding = {self.embedding: nn.Embedding(c["vocab_size"], d)}
        self.model = container(layers=nn.ModuleList(layers), norm=norm, **embedding)
        self.lm_head = linear(d, c["vocab_size"])

    def forward(self, ids):
        x = getattr(self.model, self.embedding)(ids)
        for layer in self.model.layers:
            x = x + self.attention(layer, layer.input_layernorm(x))
            x = x + self.feed_forward(layer.mlp, layer.post_attention_layernorm(x).flatten(0, 1)).view_as(x)
        return self.lm_head(self.model.norm(x))

    def attend(self, q, k, v, norms):
        c = self.c
        width = int(self.size * c["partial_rotary_factor"])
        return attended(q, k, v, c["num_attention_heads"], c["rope_theta"], width, norms)

    def norms(self, names):
        return {name: nn.RMSNorm(self.size, self.c["rms_norm_eps"]) for name in names}

    def gated(self, count, inner):
        return nn.ModuleList(Gated(self.c["hidden_size"], inner) for _ in range(count))


class LLaDAMoE(Mixture):
    embedding = "embed_tokens"

    def parts(self, index):
        d, c = self.c["hidden_size"], self.c
        linears = {name: linear(d, d) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        experts = self.gated(c["num_experts"], c["expert_intermediate_size"])
        return {
            "self_attn": container(**linears, **self.norms(("q_norm", "k_norm"))),
            "mlp": container(gate=linear(d, c["num_experts"]), experts=experts),
        }

    def attention(self, layer, x):
        at = layer.self_attn
        return at.o_proj(self.attend(at.q_proj(x), at.k_proj(x), at.v_proj(x), (at.q_norm, at.k_norm)))

    def feed_forward(self, mlp, x):
        weight, expert = mlp.gate(x).softmax(-1).topk(self.c["num_experts_per_tok"])
        return mixed(mlp.experts, x, expert, weight)


class LLaDA2(Mixture):
    embedding = "word_embeddings"

    def parts(self, index):
        d, c = self.c["hidden_size"], self.c
        heads, keys = c["num_attention_heads"], c["num_key_value_heads"]
        attention = container(
            query_key_value=linear(d, (heads + 2 * keys) * self.size),
            dense=linear(heads * self.size, d),
            **self.norms(("query_layernorm", "key_layernorm")),
        )
        if index < c["first_k_dense_replace"]:
            return {"attention": attention, "mlp": Gated(d, c["intermediate_size"])}
        gate = linear(d, c["num_experts"])
        gate.register_buffer("expert_bias", torch.zeros(c["num_experts"]))
        shared = Gated(d, c["moe_intermediate_size"] * c["num_shared_experts"])
        experts = self.gated(c["num_experts"], c["moe_intermediate_size"])
        return {"attention": attention, "mlp": container(gate=gate, experts=experts, shared_experts=shared)}

    def attention(self, layer, x):
        at, c = layer.attention, self.c
        heads, keys = c["num_attention_heads"] * self.size, c["num_key_value_heads"] * self.size
        q, k, v = at.query_key_value(x).split((heads, keys, keys), -1)
        return at.dense(self.attend(q, k, v, (at.query_layernorm, at.key_layernorm)))

    def feed_forward(self, mlp, x):
        if isinstance(mlp, Gated):
            return mlp(x)
        c = self.c
        score = mlp.gate(x).sigmoid()
        choice = score + mlp.gate.expert_bias
        groups = choice.unflatten(-1, (c["n_group"], -1))
        best = groups.topk(2, -1).values.sum(-1).topk(c["topk_group"]).indices
        is_open = torch.zeros_like(groups[..., 0]).scatter(1, best, 1).bool()[..., None]
        expert = groups.masked_fill(~is_open, -torch.inf).flatten(1).topk(c["num_experts_per_tok"]).indices
        weight = score.gather(1, expert)
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]
        return mixed(mlp.experts, x, expert, weight) + mlp.shared_experts(x)


class Qwen(Mixture):
    """Dream (Qwen2's shape) and SDAR (Qwen3's). Their memories here are read under full attention."""

    embedding = "embed_tokens"

    def parts(self, index):
        d, c, is_biased = self.c["hidden_size"], self.c, self.c["model_type"] == "Dream"
        heads, keys = c["num_attention_heads"] * self.size, c["num_key_value_heads"] * self.size
        linears = {
            name: nn.Linear(d, wide, bias=is_biased)
            for name, wide in (("q_proj", heads), ("k_proj", keys), ("v_proj", keys))
        }
        norms = {} if is_biased else self.norms(("q_norm", "k_norm"))
        attention = container(**linears, o_proj=linear(heads, d), **norms)
        return {"self_attn": attention, "mlp": Gated(d, c["intermediate_size"])}

    def attention(self, layer, x):
        at, c = layer.self_attn, self.c
        norms = (getattr(at, "q_norm", None), getattr(at, "k_norm", None))
        q, k, v = at.q_proj(x), at.k_proj(x), at.v_proj(x)
        return at.o_proj(attended(q, k, v, c["num_attention_heads"], c["rope_theta"], self.size, norms))

    def feed_forward(self, mlp, x):
        return mlp(x)


NETWORKS = {"llada": LLaDA, "lladamoe": LLaDAMoE, "llada2_moe_21": LLaDA2, "Dream": Qwen, "sdar": Qwen}


def network(folder):
    config = json.loads((Path(folder) / "config.json").read_text())
    found = NETWORKS[config["model_type"]](config)
    found.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return found.eval()


@torch.no_grad()
def main(ids, out, *jobs):
    torch.set_num_threads(1)
    logits = []
    for job in jobs:
        folder, _, adapter = job.partition(":")
        found = network(folder)
        if adapter:
            from peft import PeftModel

            found = PeftModel.from_pretrained(found, adapter).eval()
        logits.append(found(torch.load(ids)))
    torch.save(logits, out)
    assert "memdlm" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
