"""A network with one linear layer per expert and the published module names: what adapters on the hub were made on."""

import copy

import torch
from torch import nn

from memdlm.models.blocks.experts import Experts
from memdlm.models.blocks.layers import GatedMLP


class Lookup(nn.Module):
    """Calls the module that `root` has under `name` now, which PEFT may have replaced."""

    def __init__(self, root, name):
        super().__init__()
        self.root, self.name = [root], name  # in a list: not registered a second time

    def forward(self, x):
        return self.root[0].get_submodule(self.name)(x)


class LoopedExperts(nn.Module):
    """One expert after the other, each a gated feed-forward of its own."""

    def __init__(self, root, names):
        super().__init__()
        self.root, self.names = [root], names

    def forward(self, x, expert, weight):
        out = torch.zeros_like(x)
        for e, (gate, up, down) in enumerate(self.names):
            token, choice = (expert == e).nonzero(as_tuple=True)
            if len(token):
                gate, up, down = (self.root[0].get_submodule(name) for name in (gate, up, down))
                inner = nn.functional.silu(gate(x[token])) * up(x[token])
                out = out.index_add(0, token, down(inner) * weight[token, choice, None])
        return out


class PerExpert(nn.Module):
    """The linear layers of `model` under their published names, run in `model`'s order."""

    def __init__(self, model):
        super().__init__()
        network = copy.deepcopy(model)
        self.network = [network]
        self.head = model.published_module_name("lm_head")
        for path, module in list(network.named_modules()):
            name = model.published_module_name
            if isinstance(module, nn.Linear):
                self._register(name(path), module)
                network.set_submodule(path, Lookup(self, name(path)))
            elif isinstance(module, Experts):
                names = []
                for e in range(module.num_experts):
                    mlp = GatedMLP(module.hidden_size, module.intermediate_size).to(module.down_proj.dtype)
                    gate, up = module.gate_up_proj[e].chunk(2)
                    for part, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", module.down_proj[e])):
                        mlp.get_submodule(part).weight = nn.Parameter(value.detach().clone())
                        self._register(name(f"{path}.{e}.{part}"), mlp.get_submodule(part))
                    names.append([name(f"{path}.{e}.{part}") for part in module.projections])
                network.set_submodule(path, LoopedExperts(self, names))

    def _register(self, name, module):
        *parents, leaf = name.split(".")
        at = self
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, nn.Module())
            at = at._modules[parent]
        at.add_module(leaf, module)

    def forward(self, ids):
        return self.network[0](ids).logits
