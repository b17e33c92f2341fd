"""Load tokenizers and set what masked diffusion needs: mask, end of turn, padding, and the family's chat template."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memdlm.errors import CheckpointError
from memdlm.hub import look_for
from memdlm.models.hub.chat_templates import check_template
from memdlm.models.hub.families import FAMILIES, NO_THINKING, Family, register
from memdlm.models.hub.resolution import find_family, find_file, published_fields, table_rows
from memdlm.models.lora.files import base_of_adapter, is_adapter, with_tokenizer
from memdlm.models.networks.checking import check_name

BRACKETS = (
    "{% for message in messages %}"
    "{% set tag = {'system': 'SYS', 'user': 'Question', 'assistant': 'Answer'}[message['role']] %}"
    "{{ '[' + tag + ']\n' + (message['content'] | trim) + '\n[/' + tag + ']\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[Answer]\n' }}{% endif %}"
)
"""The template of BERT-like models, which have none of their own."""
ENCODERS = ("albert", "bert", "roberta", "modernbert")
OF_TOKENIZERS = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
"""Files of a tokenizer; the last one says what it is."""


def load_tokenizer(
    name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer with its mask token, end-of-turn token, padding and right padding side set.

    If the folder or hub repository `name_or_path` has a model configuration too, the family follows from it:
    dense LLaDA gets its published chat template, BERT-like models get one with bracketed turns, others keep their own.
    Qwen-shaped families without a template get that of Qwen, and one that knows `enable_thinking` takes it for false
    unless the caller says otherwise.
    A checkpoint without a tokenizer, of a family that names where it is (MDLM: GPT-2's), gets that one, and a mask
    token at the row that the configuration says.
    `eot_token` and `eot_token_id` are set if the vocabulary has the family's end of turn. For an adapter without
    a tokenizer of its own, the base model's is loaded.

    Raises CheckpointError when there is no tokenizer, when it has neither EOS nor PAD, when it lacks the mask token (a
    model that was trained for masked diffusion has a trained embedding for it, so none is added), when the mask
    token's id has no row in the model's embedding table, or when the chat template does not end within bounds.
    """
    check_name(name_or_path, "name_or_path")
    register()
    name = str(name_or_path)
    fields = None
    if is_adapter(name, token=token):
        fields, name = _fields_of_base(name, token), with_tokenizer(name, token=token)
    if fields is None:
        fields = published_fields(name, revision=revision, token=token, optional=True)
    family = None if fields is None else find_family(fields)
    tokenizer = _open(name, family, revision, token)
    _check_words(tokenizer, name)
    if tokenizer.eos_token is None and tokenizer.pad_token is None:
        raise CheckpointError(f"{name}: the tokenizer has neither an EOS nor a PAD token; set one of them.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.pad_token
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.pad_token
    _set_mask_token(tokenizer, name, family, fields or {})
    _check_mask_id(tokenizer, name, family, fields)
    _set_turns(tokenizer, family, str((fields or {}).get("model_type")))
    if isinstance(tokenizer.chat_template, str):
        check_template(tokenizer.chat_template, name)
    return tokenizer


def _fields_of_base(adapter: str, token: str | bool | None) -> dict[str, Any] | None:
    """Return the configuration of the base model that an adapter names; None if it cannot be read."""
    try:
        return published_fields(base_of_adapter(adapter, token=token), token=token, optional=True)
    except CheckpointError:
        # The caller may name another base. Loading that one says what is wrong, if anything is.
        return None


def _open(name: str, family: Family | None, revision: str | None, token: str | bool | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `name`, or the family's if there is none."""
    source, options, advice = name, {"revision": revision}, _way_out(name)
    if family is not None and family.tokenizer is not None:
        found = [find_file(name, file, revision=revision, token=token) for file in OF_TOKENIZERS]
        if not any(found[:-1]):
            source, options = family.tokenizer, {}
            advice = (
                f" {name} has no tokenizer of its own: memdlm takes {source!r} from the hub for {family.name}. Load "
                f"that once while the hub answers, or put its files ({', '.join(OF_TOKENIZERS)}) beside the weights."
            )
            look_for(source)
        elif found[-1] is None or "tokenizer_class" not in _object_in(found[-1]):
            # The files that everyone has of it do not say what they are.
            options["tokenizer_type"] = family.tokenizer
    try:
        found_one: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, padding_side="right", token=token, **options
        )
    except Exception as error:
        # For a damaged file transformers raises errors of any class, the tokenizers library a plain Exception.
        words = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{name}: no tokenizer could be loaded: {words}{advice}") from error
    return found_one


def _object_in(path: Path) -> dict[str, Any]:
    """Return the object in a file of JSON, or an empty one: whoever reads the tokenizer says what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_words(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer whose class found none of its files: it knows nothing but special tokens."""
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        raise CheckpointError(
            f"{name}: the tokenizer knows only its {len(vocabulary)} special tokens: {type(tokenizer).__name__}, which "
            f"the model's type stands for, found no vocabulary of its kind.{_way_out(name)}"
        )


def _way_out(name: str) -> str:
    if not (Path(name) / "vocab.txt").is_file():
        return ""
    return (
        " The folder has a vocab.txt: `memdlm convert --vocabulary vocab.txt --pattern ...` makes a tokenizer of it "
        "that splits text by a regular expression."
    )


def _set_mask_token(
    tokenizer: PreTrainedTokenizerBase, name: str, family: Family | None, fields: dict[str, Any]
) -> None:
    families = FAMILIES if family is None else (family,)
    candidates = sorted({token for each in families for token in (each.mask_token, *each.other_mask_tokens)})
    vocabulary = tokenizer.get_vocab()
    if tokenizer.mask_token is not None and (family is None or not any(token in vocabulary for token in candidates)):
        return
    stated = fields.get("mask_token_id")
    # A token of the vocabulary, although the tokenizer does not call it its mask token (SDAR).
    named = [token for token, number in vocabulary.items() if family is not None and number == stated]
    for token in (*candidates, *named):
        if token in vocabulary:
            tokenizer.mask_token = token
            return
    row = _mask_row(family, fields)
    if row is not None and row == len(tokenizer):
        tokenizer.add_special_tokens({"mask_token": candidates[0]})
        return
    raise CheckpointError(
        f"{name}: the tokenizer has no mask token. It sets none, and its vocabulary of {len(vocabulary)} has none of "
        f"{', '.join(candidates)}. Load the tokenizer that belongs to a masked diffusion model."
        + ("" if row is None else f" The mask of this one is token {row}, behind the last of its tokenizer.")
    )


def _mask_row(family: Family | None, fields: dict[str, Any]) -> int | None:
    """Return the id of the mask token of a family whose tokenizer has none of its own, None for other families."""
    if family is None or family.tokenizer is None:
        return None
    rows, stated = table_rows(fields) or getattr(family.config_class, "vocab_size", None), fields.get("mask_token_id")
    return stated if isinstance(stated, int) or not isinstance(rows, int) else rows - 1


def _check_mask_id(
    tokenizer: PreTrainedTokenizerBase, name: str, family: Family | None, fields: dict[str, Any] | None
) -> None:
    rows = None if fields is None else table_rows(fields)
    if rows is not None and not isinstance(rows, int):
        raise CheckpointError(f"{name}: vocab_size in its config.json is {rows!r}, which is not an integer.")
    if rows is not None and tokenizer.mask_token_id >= rows:
        raise CheckpointError(
            f"{name}: the mask token {tokenizer.mask_token!r} has id {tokenizer.mask_token_id}, but the model's "
            f"embedding table has {rows} rows; resize the model's embeddings and train that row, or use the tokenizer "
            "that belongs to the model."
        )
    own = _mask_row(family, fields or {})
    if own is not None and tokenizer.mask_token_id != own:
        raise CheckpointError(
            f"{name}: the mask token {tokenizer.mask_token!r} has id {tokenizer.mask_token_id}, but the mask of the "
            f"model is {own}. Set mask_token_id in config.json, or use the tokenizer that belongs to the model."
        )


def _set_turns(tokenizer: PreTrainedTokenizerBase, family: Family | None, model_type: str) -> None:
    if family is not None:
        vocabulary = tokenizer.get_vocab()
        if family.eot_token in vocabulary:
            tokenizer.eot_token = family.eot_token
            tokenizer.eot_token_id = vocabulary[family.eot_token]
        if family.chat_template is not None:
            tokenizer.chat_template = family.chat_template
        elif tokenizer.chat_template is None and family.eot_token in vocabulary:
            tokenizer.chat_template = family.spare_template
        template = tokenizer.chat_template
        if isinstance(template, str) and "enable_thinking" in template and NO_THINKING not in template:
            tokenizer.chat_template = NO_THINKING + template
    elif model_type in ENCODERS:
        tokenizer.chat_template = BRACKETS
