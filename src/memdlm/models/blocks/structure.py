"""Where a network keeps its blocks."""

from torch import nn

from memdlm.errors import ConfigError
from memdlm.models.blocks.looped import passes_of


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of an unwrapped network: those of our families, else the longest list of equal modules.

    A network that runs blocks several times (ALBERT) has one per pass. Raises ConfigError when there is no such list,
    or when the network has more layers than blocks and it is not known which of them run again.
    """
    layers = getattr(getattr(network, "model", None), "layers", None)
    if isinstance(layers, nn.ModuleList):
        return list(layers)
    passes = passes_of(network)
    if passes is not None:
        return list(passes.values())
    lists = [list(module) for module in network.modules() if isinstance(module, nn.ModuleList)]
    same = [each for each in lists if len({type(item) for item in each}) == 1]
    if not same:
        raise ConfigError(f"{type(network).__name__} has no list of equal blocks to put fast weights into.")
    found, stated = max(same, key=len), getattr(getattr(network, "config", None), "num_hidden_layers", None)
    if isinstance(stated, int) and stated > len(found):
        raise ConfigError(
            f"{type(network).__name__} has {stated} layers but {len(found)} blocks, so some run more than once. Fast "
            "weights in such a block would act in every pass; this is supported for ALBERT alone."
        )
    return found
