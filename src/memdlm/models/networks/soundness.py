"""Find out where NaN in a model's results comes from, once it has appeared."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from memdlm.errors import NotFiniteError
from memdlm.finite import is_finite
from memdlm.models.lora.wrappers import unwrap


def blame(model: nn.Module) -> str:
    """Say whether the weights of `model` or something else makes it compute NaN; reads all weights."""
    for name, tensor in unwrap(model).state_dict().items():
        if isinstance(tensor, Tensor) and not bool(is_finite(tensor)):
            return f"The model's weights hold NaN or infinity, first in {name}: load a sound checkpoint."
    return (
        "The model's own weights are finite, so the memory that is read has grown too large (write it with a smaller "
        "mem_inner_lr), or the numbers are too large for the model's dtype (load it in float32 or bfloat16)."
    )


@contextmanager
def blaming(model: nn.Module) -> Iterator[None]:
    """Add to a NotFiniteError of the block where the NaN of `model` comes from."""
    try:
        yield
    except NotFiniteError as error:
        raise type(error)(f"{error} {blame(model)}") from error
