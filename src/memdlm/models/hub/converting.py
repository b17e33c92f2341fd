"""An autoregressive decoder as a masked diffusion model: the same weights, attention to both sides, a mask token (A2D).

The tensors of Qwen2, Qwen3 and Llama have the names that the A2D families have on disk (Tiny-A2D), so nothing is
renamed, and none is left out. What is new is the row of the mask token. Training then teaches the network to fill
masks: it has seen neither the mask nor what comes later.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from memdlm.errors import CheckpointError, ConfigError
from memdlm.models.hub.chat_templates import check_template
from memdlm.models.hub.families import A2D_LLAMA, A2D_QWEN2, A2D_QWEN3, LLADA_TEMPLATE, Family, register
from memdlm.models.hub.resolution import DAMAGE, published_fields

SOURCES: dict[str, Family] = {"qwen2": A2D_QWEN2, "qwen3": A2D_QWEN3, "llama": A2D_LLAMA}
"""Model types of autoregressive decoders -> the family that they become."""
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {("<|im_start|>", "<|im_end|>"): CHATML, ("<|start_header_id|>", "<|eot_id|>"): LLADA_TEMPLATE}
"""For a tokenizer without a chat template: the one whose marks its vocabulary has."""
_OWN = ("architectures", "model_type", "auto_map", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Fields that say what the source is, not what its weights compute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """A model made of another, and what was done."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...]
    """What is new in it, in sentences."""
    generation: GenerationConfig | None = None
    """What generation_config.json says; None: there is none."""


def source_type(name: str, *, revision: str | None = None) -> str | None:
    """Return the model type of `name` if it is an autoregressive decoder that can be converted, else None."""
    fields = published_fields(name, revision=revision) or {}
    kind = fields.get("model_type")
    return kind if kind in SOURCES and fields.get("is_causal", True) is not False else None


def convert_decoder(
    name: str, *, revision: str | None = None, mask_token: str | None = None, block_size: int | None = None
) -> Converted:
    """Return the decoder `name` (Qwen2, Qwen3, Llama) as an A2D model with its tokenizer.

    `mask_token` (None: the tokenizer's own, else the family's) is added to the vocabulary if it is not there. Its row
    of the embeddings is the mean of the others; the table grows only where it has no row to spare, and a tied head
    stays tied. With `block_size`, the model is trained and decoded in blocks that do not see later ones.

    Raises CheckpointError when files are missing, damaged or do not match the configuration, ConfigError for a network
    that the families do not have (experts, sliding windows, scaled rotary positions).
    """
    register()
    source = _read(name, revision)
    family = SOURCES[source.config.model_type]
    tokenizer = _tokenizer(name, revision)
    token, is_new = _add_mask(tokenizer, mask_token, family)
    notes = [f"The mask token is {token!r}, id {tokenizer.mask_token_id}{', which is new' if is_new else ''}."]
    config = _config(source.config, family, tokenizer, block_size)
    if is_new or tokenizer.mask_token_id >= source.get_input_embeddings().num_embeddings:
        notes.append(_give_row(source, tokenizer))
        config.vocab_size = source.get_input_embeddings().num_embeddings
    note = _give_template(tokenizer, name)
    notes += [] if note is None else [note]
    with torch.device("meta"):
        model = family.lm_class(config)
    # Every tensor must be there, and no other; the tensors are the source's own.
    model.load_state_dict(source.state_dict(), strict=True, assign=True)
    if config.tie_word_embeddings:
        model.tie_weights()
    _check_whole(model, name)
    config.dtype = source.dtype
    ends = getattr(source.generation_config, "eos_token_id", None) or config.eos_token_id
    # How an autoregressive decoder samples says nothing about this one; its ids do.
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends,
        pad_token_id=config.pad_token_id,
        mask_token_id=config.mask_token_id,
    )
    return Converted(model=model.eval(), tokenizer=tokenizer, notes=tuple(notes), generation=generation)


def _read(name: str, revision: str | None) -> Any:
    """Load the decoder; every tensor must be in the files, and every tensor of the files in the decoder."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, config=config, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except DAMAGE as error:
        raise CheckpointError(f"{name}: the model could not be read: {error}") from error
    problems = {kind: sorted(map(str, info.get(f"{kind}_keys") or ())) for kind in ("missing", "unexpected")}
    problems["of the wrong size"] = sorted(str(key) for key, *_ in info.get("mismatched_keys") or ())
    if any(problems.values()):
        words = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"{name}: tensors do not match the configuration. {words}.")
    return model


def _tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="right")
    except Exception as error:  # as in load_tokenizer: a damaged file raises errors of any class
        words = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{name}: no tokenizer could be loaded: {words}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(f"{name}: the tokenizer has neither an EOS nor a PAD token; set one of them.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _add_mask(tokenizer: PreTrainedTokenizerBase, asked: str | None, family: Family) -> tuple[str, bool]:
    """Set the mask token; return it, and whether the vocabulary did not have it."""
    token = str(asked or tokenizer.mask_token or family.mask_token)
    if token in tokenizer.all_special_tokens and token != tokenizer.mask_token:
        raise ConfigError(
            f"mask_token {token!r} has a use already (it is one of {', '.join(tokenizer.all_special_tokens)}); name "
            f"another, or leave it out for {family.mask_token!r}."
        )
    is_new = token not in tokenizer.get_vocab()
    tokenizer.add_special_tokens({"mask_token": token})
    return token, is_new


def _config(
    source: PreTrainedConfig, family: Family, tokenizer: PreTrainedTokenizerBase, block_size: int | None
) -> Any:
    """Return the family's configuration with the values of `source`, defaults included."""
    fields = {key: value for key, value in source.to_dict().items() if key not in _OWN}
    if "sliding_window" in fields and not fields.get("use_sliding_window"):
        fields = {key: value for key, value in fields.items() if key not in ("sliding_window", "max_window_layers")}
    made: Any = family.config_class.from_dict(fields)
    made.mask_token_id, made.pad_token_id = tokenizer.mask_token_id, tokenizer.pad_token_id
    made.block_size = block_size
    made.architectures = [family.lm_class.__name__]
    return made


@torch.no_grad()
def _give_row(source: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the mask token a row in the embeddings, and in a head of its own; return what was done."""
    table, mask = source.get_input_embeddings(), int(tokenizer.mask_token_id)
    rows = table.num_embeddings
    known = sorted(number for number in set(tokenizer.get_vocab().values()) if number < rows and number != mask)
    if mask >= rows:
        with torch.random.fork_rng(devices=[]):  # it draws values, which are replaced below
            source.resize_token_embeddings(mask + 1, mean_resizing=False)
    for layer in (source.get_input_embeddings(), source.get_output_embeddings()):
        layer.weight[min(mask, rows) :][: mask + 1 - min(mask, rows)] = _mean(layer.weight, known)
    if mask < rows:
        return f"It takes an unused row of the {rows} in the embeddings, set to the mean of the vocabulary's."
    return f"The embeddings grew from {rows} to {mask + 1} rows; the new ones are the mean of the vocabulary's."


def _mean(weight: Tensor, rows: list[int]) -> Tensor:
    # In float32: a sum of many 16-bit numbers loses most of them.
    return weight[torch.tensor(rows)].float().mean(0).to(weight.dtype)


def _give_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str | None:
    """Give a tokenizer without a chat template the one whose marks it knows; return what was done."""
    if isinstance(tokenizer.chat_template, str):
        check_template(tokenizer.chat_template, name)
        return None
    vocabulary = tokenizer.get_vocab()
    for marks, template in TEMPLATES.items():
        if all(mark in vocabulary for mark in marks):
            tokenizer.chat_template = template
            return f"The tokenizer had no chat template; it got the one with {marks[0]} and {marks[1]}."
    return "The tokenizer has no chat template, and its vocabulary has the marks of none: training on chats needs one."


def _check_whole(model: PreTrainedModel, name: str) -> None:
    """Raise CheckpointError unless every tensor of `model` has values."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    empty = sorted(key for key, tensor in tensors.items() if tensor.is_meta)
    if empty:
        raise CheckpointError(f"{name}: no values for {', '.join(empty)}.")
