"""Another network as a masked diffusion model in a folder, for all commands: a decoder, or a masked language model."""

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memdlm.data.documents import read_document
from memdlm.data.tokenizer import PATTERNS, build_pattern_tokenizer
from memdlm.errors import ConfigError, DataError
from memdlm.models import load_model, load_tokenizer
from memdlm.models.hub.converting import Converted, convert_decoder, source_type
from memdlm.models.hub.loading import DTYPES, cast_parameters
from memdlm.models.hub.resolution import resolve_config
from memdlm.models.networks.checking import vocabulary_of
from memdlm.options import option, validate
from memdlm.outputs import Kind, Output, output_folder

CONVERTED = Kind(name="converted", words="a converted model")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What is converted, and how."""

    model: str | None = option(
        None, "Folder or hub name of a Qwen2, Qwen3 or Llama decoder, of a masked language model, or of an encoder."
    )
    output: str | None = option(None, "Folder to write.")
    revision: str | None = option(None, "Branch, tag or commit of a hub repository.")
    mask_token: str | None = option(
        None, "Of a decoder: the mask token; it is added where the vocabulary lacks it. Unset: <|mask|>."
    )
    block_size: int | None = option(
        None,
        "Of a decoder: tokens per block, where blocks do not see later ones; unset: every token sees every other.",
        minimum=1,
        maximum=2**20,
    )
    tie_head: bool = option(
        False, "Put a new head on an encoder that has none, tied to its embeddings. It is untrained."
    )
    vocabulary: str | None = option(
        None, "File with a token per line, for a tokenizer that splits text by pattern. It replaces the model's own."
    )
    pattern: str | None = option(
        None, f"Regular expression of a token, or the name of one: {', '.join(PATTERNS)}. With vocabulary."
    )
    dtype: str = option("auto", "Number type of the weights; auto: the source's.", choices=("auto", *DTYPES))
    overwrite: bool = option(False, "Replace an earlier conversion in output.")

    def __post_init__(self) -> None:
        validate(self)
        for name in ("model", "output"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is missing.")
        if (self.vocabulary is None) != (self.pattern is None):
            raise ConfigError(
                f"vocabulary={self.vocabulary!r} and pattern={self.pattern!r} belong together: set both, or neither."
            )


def convert(options: ConvertOptions) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Write the converted model and its tokenizer; returns the model and what is new in it, in sentences."""
    with output_folder(str(options.output), CONVERTED, overwrite=options.overwrite) as output:
        kind = source_type(str(options.model), revision=options.revision)
        made = _of_encoder(options) if kind is None else _of_decoder(options, kind)
        _write(made, output, options.dtype)
    return made.model, made.notes


def _of_decoder(options: ConvertOptions, kind: str) -> Converted:
    for name in ("tie_head", "vocabulary", "pattern"):
        if getattr(options, name):
            raise ConfigError(
                f"{name}={getattr(options, name)!r} has no effect on a {kind} decoder, which has a head and a "
                "tokenizer; leave it out."
            )
    return convert_decoder(
        str(options.model),
        revision=options.revision,
        mask_token=options.mask_token,
        block_size=options.block_size,
    )


def _of_encoder(options: ConvertOptions) -> Converted:
    for name in ("mask_token", "block_size"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"{name}={getattr(options, name)!r} has no effect: {options.model} is not one of the decoders that are "
                "made to look both ways (Qwen2, Qwen3, Llama). Leave it out."
            )
    family, _ = resolve_config(str(options.model), revision=options.revision)
    if family is not None:
        raise ConfigError(
            f"{options.model} is a {family.name} model, which fills masks already: there is nothing to convert. Use it "
            "as it is."
        )
    model = load_model(str(options.model), revision=options.revision, tie_head=options.tie_head)
    notes = ["The head is new: it is tied to the embeddings, and untrained."] if options.tie_head else []
    if options.vocabulary is None:
        tokenizer = load_tokenizer(str(options.model), revision=options.revision)
    else:
        tokenizer = _pattern_tokenizer(options.vocabulary, str(options.pattern), model)
        notes.append(f"The tokenizer splits text by a pattern; it has {len(tokenizer)} tokens.")
    return Converted(model=model, tokenizer=tokenizer, notes=tuple(notes))


def _pattern_tokenizer(path: str, pattern: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    # Lines, and not words: a token may hold spaces, and the line's number is its id.
    lines = read_document(path).text.split("\n")
    tokens = lines[:-1] if not lines[-1] else lines
    rows = vocabulary_of(model)
    if rows is not None and len(tokens) > rows:
        raise DataError(f"{path} has {len(tokens)} tokens, but the model's embeddings have {rows} rows.")
    return build_pattern_tokenizer(tokens, PATTERNS.get(pattern, pattern))


def _write(made: Converted, output: Output, dtype: str) -> None:
    cast_parameters(made.model, dtype)
    with output.replaced() as folder:
        made.model.save_pretrained(folder)
        if made.generation is not None:
            made.generation.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
