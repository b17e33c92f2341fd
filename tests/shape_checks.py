"""Checks the shapes that signatures declare, in every function that a test runs.

A test that passes wrong ones on purpose is marked `no_shape_checks`, so that it sees the function's own refusal.
"""

from pathlib import Path
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray
from transformers import PreTrainedConfig

# The constructors that transformers makes for configurations take more than their signatures say.
PreTrainedConfig.__no_type_check__ = True


SOURCE = Path(__file__).parents[1] / "src"


def modules() -> list[str]:
    """Name the modules whose signatures state shapes; checks cost time in every function, also where there are none.

    What torch.compile takes whole is left alone: every check would break its graph.
    """
    files = [path for path in SOURCE.rglob("*.py") if "from memdlm.types import" in path.read_text()]
    names = [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in files]
    return [name for name in names if not name.startswith(("memdlm.models.blocks", "memdlm.models.networks"))]


def of_tensors(function: Any) -> Any:
    """Check the annotations that speak of tensors, and leave every other to the function's own refusals."""
    notes = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: hint for name, hint in notes.items() if _speaks_of_shapes(hint)}
    return beartype(function) if function.__annotations__ else function


def _speaks_of_shapes(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_speaks_of_shapes(each) for each in get_args(hint))
