"""From prompts as users give them to ids, and the part of a response that is its text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memdlm.errors import ConfigError, DataError
from memdlm.models.hub.families import FAMILIES
from memdlm.models.networks.checking import check_range
from memdlm.options import shortened
from memdlm.templates import message_ids, prompt_ids

Prompt: TypeAlias = str | Sequence[Mapping[str, str]] | Sequence[int] | Tensor
"""Text (as it is: control tokens that it spells are tokens), messages (put through the chat template, their contents
as text), or ids."""


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The tokens decoding needs to know."""

    mask: int
    eos: int
    ends: tuple[int, ...]
    """Tokens before which a response's text ends: EOS and, where the vocabulary has one, end of turn."""


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Read the special tokens off a tokenizer; raises ConfigError when it has no mask or no EOS token."""
    for name in ("mask", "eos"):
        if getattr(tokenizer, f"{name}_token_id", None) is None:
            raise ConfigError(f"the tokenizer has no {name} token; load it with memdlm.load_tokenizer.")
    vocabulary = tokenizer.get_vocab()
    turns = {vocabulary[family.eot_token] for family in FAMILIES if family.eot_token in vocabulary}
    eos = int(tokenizer.eos_token_id)
    return SpecialIds(int(tokenizer.mask_token_id), eos, (eos, *sorted(turns - {eos})))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], vocabulary: int | None = None
) -> list[Tensor]:
    """Return one int64 tensor of ids per prompt.

    Raises DataError, naming the prompt's index, for a prompt that is empty, of another type, not encodable (lone
    surrogates), refused by the chat template, or with ids outside the `vocabulary`.
    """
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, (str, bytes))
    is_list = is_list or (isinstance(prompts, Tensor) and prompts.dim() > 0)
    if not is_list or len(prompts) == 0:
        raise DataError(f"prompts must be a non-empty list, one entry per prompt, got {shortened(prompts)}.")
    encoded = []
    for index, prompt in enumerate(prompts):
        try:
            encoded.append(_encode(tokenizer, prompt))
        except DataError as error:
            raise DataError(f"prompt {index}: {error}") from error
    for index, ids in enumerate(encoded):
        if ids.numel() == 0:
            raise DataError(f"prompt {index} is empty; give at least one token.")
        check_range(ids, f"prompt {index}", vocabulary)
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Tensor:
    if isinstance(prompt, Tensor):
        # A batch of one row, as tokenizers return it, means that row.
        ids = prompt.squeeze(0) if prompt.dim() == 2 and len(prompt) == 1 else prompt
        if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise DataError(f"it must be int64 of shape [L], got {prompt.dtype} of shape {tuple(prompt.shape)}.")
        if ids.is_meta:
            raise DataError("it has no values (it is on the meta device).")
        return ids.long().cpu()
    if isinstance(prompt, str):
        return torch.tensor(prompt_ids(tokenizer, prompt), dtype=torch.int64)
    items: list[Any] | None = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) else None
    if items and all(isinstance(item, Mapping) for item in items):
        return torch.tensor(message_ids(tokenizer, items, generation=True), dtype=torch.int64)
    if items is not None and all(type(item) is int and abs(item) < 2**62 for item in items):
        return torch.tensor(items, dtype=torch.int64)
    raise DataError(f"{shortened(prompt)} is not a prompt; give text, messages, or a list of ids.")


def visible(text_ids: Tensor, ends: Sequence[int]) -> Tensor:
    """Cut a response [T] before its first end token."""
    is_end = torch.isin(text_ids, torch.tensor(list(ends), device=text_ids.device))
    return text_ids[: int(is_end.int().argmax())] if bool(is_end.any()) else text_ids
