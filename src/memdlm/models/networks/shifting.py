"""Which output of a network predicts which token; everything that reads predictions asks here."""

import logging

import torch
from torch import Tensor, nn

from memdlm.errors import ConfigError
from memdlm.models.lora.wrappers import unwrap
from memdlm.types import Positions

log = logging.getLogger(__name__)
_TOLD: set[type[nn.Module]] = set()


def shift_of(model: nn.Module, asked: bool | None = None) -> bool:
    """Whether the output of `model` at position i - 1 predicts token i, if the option says `asked`.

    None: as the family was trained (`right_shift_logits` of its network). Raises ConfigError if the family shifts
    (Dream) and the option says no. A family that was trained without is used with a shift if asked, with a warning.
    """
    network = unwrap(model)
    own = getattr(network, "right_shift_logits", None)
    if asked is None or asked is own:
        return bool(own)
    name = type(network).__name__
    if own:
        raise ConfigError(
            f"right_shift_logits=False contradicts {name}, whose output at position i - 1 predicts token i. Leave "
            "right_shift_logits out."
        )
    if own is False and type(network) not in _TOLD:
        _TOLD.add(type(network))
        log.warning(
            "right_shift_logits=True: %s is published without a shift, its output at position i predicts token i. This "
            "is right only for weights that were trained on with a shift.",
            name,
        )
    return asked


def shifted(positions: Positions, length: int, is_visible: Tensor | None = None) -> Positions:
    """Return the places whose outputs predict the tokens at `positions` (row * length + column).

    It is one column earlier. The first column of a row keeps its own place, and so does the first that `is_visible`
    [B, length] shows: before it there is only padding, whose output means nothing.
    """
    is_first = positions % length == 0
    before = (positions - 1).clamp_min(0)
    if is_visible is not None:
        is_first = is_first | ~is_visible.flatten()[before].bool()
    return torch.where(is_first, positions, before)
