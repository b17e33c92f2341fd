"""Where a network keeps its blocks."""

from torch import nn

from memdlm.errors import ConfigError


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of an unwrapped network: those of our families, else the longest list of equal modules.

    Raises ConfigError when there is no such list.
    """
    layers = getattr(getattr(network, "model", None), "layers", None)
    if isinstance(layers, nn.ModuleList):
        return list(layers)
    lists = [list(module) for module in network.modules() if isinstance(module, nn.ModuleList)]
    same = [each for each in lists if len({type(item) for item in each}) == 1]
    if not same:
        raise ConfigError(f"{type(network).__name__} has no list of equal blocks to put fast weights into.")
    return max(same, key=len)
