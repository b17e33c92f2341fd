"""A Ray Serve application: replicas hold engines, and a request goes to one that has its memory. Needs the extra `ray`.

serve run memdlm.serving.ray_app:app model=MODEL memories=URL replicas=2
"""

import importlib
from typing import Any

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    # The options are read without Ray; the application is not.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.building"), name)
