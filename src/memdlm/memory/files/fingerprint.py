"""What a memory was written for: enough to refuse another base model or tokenizer, and to say what differs.

The digest of the base covers every bit of every weight, buffers and outer adapter included. It guards against
mistakes, not against forgery.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memdlm.memory.learned import LearnedWrite

STEP, OFFSET = 0x5851F42D4C957F2D, 0x14057B7EF767814F
"""Odd constants (Knuth's MMIX generator): the weight of place i is STEP * i + OFFSET modulo 2^64."""
NOT_COMPUTING = {
    *("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"),
    *("_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "use_cache", "model_type"),
    *("quantization_config", "id2label", "label2id", "problem_type", "_commit_hash", "return_dict"),
    *("output_hidden_states", "output_attentions", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"),
}
"""Fields of a model's configuration that do not change what its weights compute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What a memory was written for."""

    model: str
    """The name that the model was loaded by; for people, not compared."""
    family: str
    """The network's class."""
    options: dict[str, Any]
    """Of the model's configuration, what bears on the result."""
    weights: str
    """Digest of all weights. Values in 16 bits have the digest of the same values in 32."""
    mask_token_id: int
    tokenizer: str | None
    """Digest; None: not given."""
    learned: str | None
    """Digest of the learned start, rates and gate of the write; None: nothing of it was learned."""

    def mismatch(self, other: "Fingerprint") -> str | None:
        """Say in what way the model of `other` is not the one this was taken of; None: it is the same.

        What only one of the two knows (a tokenizer, a learned start, an option) is not compared.
        """
        mine, theirs = f"{self.family} {self.model!r}", f"{other.family} {other.model!r}"
        if self.family != other.family:
            return f"it was written for another family: {mine}, not {theirs}"
        for name in sorted(set(self.options) & set(other.options)):
            if self.options[name] != other.options[name]:
                return f"it was written with {name}={self.options[name]!r}; the model has {other.options[name]!r}"
        if self.weights != other.weights:
            return (
                f"it was written for other base weights: {mine} with digest {self.weights[:12]}, not {theirs} with "
                f"{other.weights[:12]}"
            )
        if None not in (self.tokenizer, other.tokenizer) and self.tokenizer != other.tokenizer:
            return "it was written with another tokenizer"
        if self.mask_token_id != other.mask_token_id:
            return f"it was written with mask_token_id {self.mask_token_id}, not {other.mask_token_id}"
        if None not in (self.learned, other.learned) and self.learned != other.learned:
            return "it was written from another learned start (memory_init.safetensors)"
        return None


@final
class Identity:
    """A model and a tokenizer whose fingerprint can be taken at any time; the weights are read again if they changed.

    A change through `.data` that leaves tensors in their place is the one that goes unnoticed.
    """

    def __init__(self, network: nn.Module, tokenizer: PreTrainedTokenizerBase | None, mask_token_id: int) -> None:
        self.network, self.mask_token_id = network, mask_token_id
        self.tokenizer = None if tokenizer is None else tokenizer_digest(tokenizer)
        self._known: tuple[Any, str] | None = None

    def fingerprint(self, learned: LearnedWrite | None) -> Fingerprint:
        """Return the fingerprint of what is there now."""
        config = getattr(self.network, "config", None)
        fields = {} if config is None else json.loads(config.to_json_string(use_diff=False))
        return Fingerprint(
            model=str(getattr(self.network, "name_or_path", "")),
            family=type(self.network).__name__,
            options={name: value for name, value in fields.items() if name not in NOT_COMPUTING},
            weights=self._weights(),
            mask_token_id=self.mask_token_id,
            tokenizer=self.tokenizer,
            learned=None if learned is None else tensor_digest(learned.tensors()),
        )

    def _weights(self) -> str:
        tensors = {name: value for name, value in self.network.state_dict().items() if isinstance(value, Tensor)}
        if any(tensor.is_inference() for tensor in tensors.values()):
            return tensor_digest(tensors)  # they have no version that would tell of a change
        key = {name: (tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()}
        if self._known is None or self._known[0] != key:
            self._known = key, tensor_digest(tensors)
        return self._known[1]


@torch.no_grad()
def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return 64 hexadecimal digits that depend on names, shapes and every bit, and not on the device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {_weighed(tensors[name])}\n".encode())
    return digest.hexdigest()


def _weighed(tensor: Tensor) -> int:
    """Return the sum of all values' bits as integers, each times its place's weight, modulo 2^64.

    Integers wrap around, so neither the order of summation nor the size of the pieces matters.
    """
    flat = tensor.detach().reshape(-1)
    if flat.element_size() == 8:
        # Words of 32 bits: of those of 64 the low bits are often zero, and a distance of 2^16 shifts the rest out.
        flat = flat.view(torch.int32)
    # Pieces that stay in a CPU's cache are five times faster there; elsewhere large ones save launches.
    size = 1 << (15 if flat.device.type == "cpu" else 24)
    weights = torch.arange(min(size, flat.numel()), dtype=torch.int64, device=flat.device) * STEP + OFFSET
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), size):
        words = _words(flat[start : start + size])
        total = total + (words * weights[: len(words)]).sum() + words.sum() * _signed(start * STEP)
    return int(total)


def _words(part: Tensor) -> Tensor:
    return (part.float().view(torch.int32) if part.is_floating_point() else part).to(torch.int64)


def _signed(number: int) -> int:
    """Return what an int64 makes of a number modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of how text becomes ids: the vocabulary and, of a fast tokenizer, all its rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    for passing in ("padding", "truncation"):  # state of the last call
        rules.pop(passing, None)
    known = {"rules": rules, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
