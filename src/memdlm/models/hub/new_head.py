"""A new vocabulary projection on an encoder that has none: tied to its embeddings, and untrained."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from memdlm.errors import ConfigError

log = logging.getLogger(__name__)

SEED = 0
"""From which the new head's weights are drawn: they are the same every time."""


def settle_new_head(model: PreTrainedModel, info: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what was read, `info`, without the tensors of the new head, and say what is new.

    Raises ConfigError when the files have a head, or the network does not tie its head to its embeddings.
    """
    body = f"{model.base_model_prefix}."
    new = sorted(key for key in map(str, info.get("missing_keys") or ()) if not key.startswith(body))
    if not new:
        raise ConfigError(f"tie_head=True has no effect: {name} has a head of its own. Leave it out.")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        raise ConfigError(
            f"tie_head=True: {type(model).__name__} does not tie its head to its embeddings (tie_word_embeddings in "
            "config.json); a head of its own would know nothing."
        )
    log.warning(
        "%s has no head. A new one is tied to its embeddings; %s are untrained: train before you rely on predictions.",
        name,
        ", ".join(new),
    )
    return {**info, "missing_keys": [key for key in info["missing_keys"] if str(key) not in new]}
