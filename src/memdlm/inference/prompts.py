"""Prompts as users give them -> right-padded ids, and ids -> text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memdlm.errors import ConfigError, DataError
from memdlm.models.checking import check_range
from memdlm.models.families import FAMILIES
from memdlm.options import shortened

Prompt: TypeAlias = str | Sequence[Mapping[str, str]] | Sequence[int] | Tensor
"""Text (tokenized as it is), messages (put through the chat template), or ids."""


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """The tokens decoding needs to know."""

    mask: int
    eos: int
    ends: tuple[int, ...]
    """Tokens before which a response's text ends: EOS and, where the vocabulary has one, end of turn."""


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Read them off a tokenizer; raises ConfigError when it has no mask or no EOS token."""
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

    Raises DataError, naming the prompt's index, for one that is empty, of another kind, no text (lone surrogates), or
    with ids outside the `vocabulary`.
    """
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, (str, bytes))
    is_list = is_list or (isinstance(prompts, Tensor) and prompts.dim() > 0)
    if not is_list or len(prompts) == 0:
        raise DataError(f"prompts must be a non-empty list, one entry per prompt, got {shortened(prompts)}.")
    encoded = [_encode(tokenizer, prompt, index) for index, prompt in enumerate(prompts)]
    for index, ids in enumerate(encoded):
        if ids.numel() == 0:
            raise DataError(f"prompt {index} is empty; give at least one token.")
        check_range(ids, f"prompt {index}", vocabulary)
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, index: int) -> Tensor:
    if isinstance(prompt, Tensor):
        # A row of one, as tokenizers return it, is meant as the row.
        ids = prompt.squeeze(0) if prompt.dim() == 2 and len(prompt) == 1 else prompt
        if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise DataError(
                f"prompt {index} must be int64 of shape [L], got {prompt.dtype} of shape {tuple(prompt.shape)}."
            )
        return ids.long().cpu()
    if isinstance(prompt, str):
        return torch.tensor(_tokens(tokenizer, prompt, index), dtype=torch.int64)
    items = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) else None
    if items and all(isinstance(item, Mapping) for item in items):
        return torch.tensor(_templated(tokenizer, items, index), dtype=torch.int64)
    if items is not None and all(type(item) is int and abs(item) < 2**62 for item in items):
        return torch.tensor(items, dtype=torch.int64)
    raise DataError(f"prompt {index} is {shortened(prompt)}; give text, messages, or a list of ids.")


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, index: int) -> list[int]:
    _check_text(text, f"prompt {index}")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[Any], index: int) -> list[int]:
    for message in messages:
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise DataError(
                    f"prompt {index} has a message without a {field} that is text: {shortened(dict(message))}; give "
                    '{"role": "user", "content": "..."}.'
                )
            _check_text(message[field], f"prompt {index}")
    if tokenizer.chat_template is None:
        raise DataError(f"prompt {index} is a list of messages, but the tokenizer has no chat template; give text.")
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise DataError(f"prompt {index}: the chat template refuses these messages: {error}") from error
    return ids


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where} is no text: {error.reason} at character {error.start}; remove it.") from error


def pad(rows: Sequence[Tensor], value: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Right-pad 1-D tensors to [B, L]; returns (ids, lengths [B])."""
    lengths = torch.tensor([row.numel() for row in rows])
    width = int(lengths.max()) if length is None else length
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : row.numel()] = row
    return ids, lengths


def visible(text_ids: Tensor, ends: Sequence[int]) -> Tensor:
    """Cut a response [T] before its first end token."""
    is_end = torch.isin(text_ids, torch.tensor(list(ends), device=text_ids.device))
    return text_ids[: int(is_end.int().argmax())] if bool(is_end.any()) else text_ids
