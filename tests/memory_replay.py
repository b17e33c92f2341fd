"""Fast weights between our stacked layout and the published one tensor per module."""

import torch

from goldens import model

NAMES = {"lora_A": "mem_inner_A", "lora_B": "mem_inner_B", "delta": "mem_inner_delta"}


def published_name(path: str, expert: int | None, tensor: str, family: str) -> str:
    """Our site path under the published module name."""
    head, leaf = path.rsplit(".", 1)
    if expert is not None:
        head = f"{head}.{expert}"
    return f"{to_published(f'{head}.{leaf}', family)}.{NAMES[tensor]}"


def to_published(path: str, family: str) -> str:
    network = model(family)
    return network.published_module_name(path)


def split(named: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """Fast weights (or their gradients) of one memory, one tensor per published module."""
    out = {}
    for name, value in named.items():
        path, tensor = name.rsplit(".", 1)
        if value.dim() == 4:
            for expert in range(value.shape[0]):
                out[published_name(path, expert, tensor, family)] = value[expert, 0]
        else:
            out[published_name(path, None, tensor, family)] = value[0]
    return out


def join(recorded: dict[str, torch.Tensor], like: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """The inverse of `split` for the names in `like`; what was not recorded keeps its value."""
    out = {}
    for name, value in like.items():
        path, tensor = name.rsplit(".", 1)
        if tensor != "lora_A":
            out[name] = value.detach()
        elif value.dim() == 4:
            parts = [recorded.get(published_name(path, e, tensor, family), value[e, 0]) for e in range(value.shape[0])]
            out[name] = torch.stack(parts)[:, None]
        else:
            out[name] = recorded.get(published_name(path, None, tensor, family), value[0])[None]
    return out
