"""The arguments of an evaluation: `key=value` texts, converted to types and checked; none is silently ignored."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from transformers import GenerationConfig as TransformersGenerationConfig

from memdlm.errors import ConfigError, unknown
from memdlm.inference.config import GenerationConfig
from memdlm.memory.config import MemoryConfig
from memdlm.memory.flags import DEFAULTS, PREFIX, memory_from_flags, unusual
from memdlm.models.hub.devices import AUTO, DTYPE_HELP
from memdlm.models.hub.loading import DTYPES
from memdlm.options import names_of, option, validate

Arguments: TypeAlias = Mapping[str, Any]

ALIASES = {
    "cfg": "cfg_scale",
    "max_gen_toks": "max_new_tokens",
    "adapter_model_name_or_path": "adapter",
    "model_name_or_path": "pretrained",
}
"""Names that the published harness and lm-eval have for our options."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for the length of a response, in order of precedence."""
DEFAULT_NEW_TOKENS = 256
"""lm-eval's own default for tasks that do not say how long a response may be."""
_FOREIGN = frozenset(TransformersGenerationConfig().to_dict())


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """What is evaluated, and how likelihoods are estimated."""

    pretrained: str = option("", "Folder or hub name of the model; an adapter folder also loads its base model.")
    tokenizer: str | None = option(None, "Folder or hub name of the tokenizer, if it is not the model's own.")
    adapter: str | None = option(None, "Folder or hub name of an outer LoRA adapter on top of the model.")
    base_model_name_or_path: str | None = option(None, "Base model, if it is not the one that the adapter names.")
    revision: str | None = option(None, "Revision of the model on the hub.")
    dtype: str = option(AUTO, DTYPE_HELP, choices=(AUTO, *DTYPES))
    load_in_4bit: bool = option(False, "Quantise the model to 4 bits (nf4) while loading.")
    attn_implementation: str | None = option(None, "Attention implementation, such as sdpa or eager.")
    max_length: int | None = option(
        None,
        "Maximum tokens of prompt and response; longer prompts lose their beginning. Unset: the model's own.",
        minimum=2,
    )
    add_special_tokens: bool = option(False, "Let the tokenizer add its own special tokens to prompts.")
    mc_num: int = option(128, "Number of noised copies per log-likelihood.", minimum=1)
    mc_batch_size: int = option(
        32, "Noised copies per forward pass and per stratified round; mc_num must be a multiple.", minimum=1
    )
    mc_attention: str = option(
        "full",
        "Attention of log-likelihoods. full: full attention, as published for every family; decode: that "
        "of decoding (LLaDA2.x: block-causal; the context is then computed once for all its choices and "
        "copies).",
        choices=("full", "decode"),
    )
    is_check_greedy: bool = option(False, "Also check whether decoding would give the continuation (slow).")
    request_seed: int = option(0, "Seed of memories, samples and likelihoods; every request has a stream of its own.")
    mem_enabled: bool = option(False, "Write every prompt into memory before it is answered or scored.")
    memory: str | None = option(
        None, "Folder of a memory that memdlm memorize wrote; it is read for every request, and not changed."
    )

    def __post_init__(self) -> None:
        validate(self)
        if not self.pretrained:
            raise ConfigError("pretrained is missing; name the model: --model_args pretrained=NAME_OR_PATH,...")
        if self.memory is not None and self.mem_enabled:
            raise ConfigError(
                f"memory={self.memory!r} and mem_enabled=True exclude each other: one memory is open at a time. Read a "
                "saved memory, or write every prompt into a new one."
            )
        if self.mc_num % min(self.mc_num, self.mc_batch_size):
            raise ConfigError(f"mc_num {self.mc_num} must be a multiple of mc_batch_size {self.mc_batch_size}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All arguments of an evaluation, checked."""

    options: HarnessOptions
    generation: dict[str, Any]
    """The `GenerationConfig` options that were given; tasks may override them."""
    memory: MemoryConfig | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """How a task wants a prompt answered."""

    config: GenerationConfig
    stops: tuple[str, ...]
    """Stop texts: a response ends before the first of them."""
    new_tokens: int


def generation_fields() -> list[str]:
    """Return the names of the decoding options; `max_length` is the evaluation's own (`HarnessOptions`)."""
    return [name for name in names_of(GenerationConfig) if name != "max_length"]


def option_names() -> list[str]:
    """Return every name that `parse_arguments` knows."""
    return [*names_of(HarnessOptions), *generation_fields(), *DEFAULTS]


def parse_arguments(arguments: Arguments) -> Settings:
    """Sort `key=value` arguments into settings; values may be texts or typed.

    Raises ConfigError for an unknown key (with the nearest known one), a value of the wrong kind, a memory option
    while `mem_enabled` is off, and a memory shared by the rows of a batch or by ranks (results would depend on both).
    """
    given: dict[str, Any] = {}
    for key, value in arguments.items():
        name = ALIASES.get(key, key)
        if name in given:
            both = [each for each in arguments if ALIASES.get(each, each) == name]
            raise ConfigError(f"{' and '.join(both)} are names of the same model argument: give one of them.")
        given[name] = value
    for key in given:
        if key not in option_names():
            raise ConfigError(unknown("model argument", key, option_names()))
    own = _typed(HarnessOptions, given)
    options = HarnessOptions(**own)
    generation = {name: value for name, value in _typed(GenerationConfig, given).items() if name != "max_length"}
    GenerationConfig(**{"max_new_tokens": DEFAULT_NEW_TOKENS, **generation})
    flags = {f"{PREFIX}{name}": value for name, value in _typed(MemoryConfig, given, PREFIX).items()}
    for name, bad in (("mem_per_sample", False), ("mem_sync_inner", True)):
        if options.mem_enabled and flags.get(name) is bad:
            raise ConfigError(
                f"{name}={bad} would make a request's result depend on its batch or on the number of processes; "
                "leave it out: in evaluation every prompt has a memory of its own."
            )
    said = unusual(flags) if options.mem_enabled else flags
    memory = memory_from_flags(flags, said, is_on=options.mem_enabled)
    return Settings(options=options, generation=generation, memory=memory)


def parse_request(gen_kwargs: Arguments, settings: Settings) -> tuple[Request, tuple[str, ...]]:
    """Turn a task's generation arguments into a `Request`; also return the names of ignored arguments.

    Ignored are those of transformers that mean nothing to a diffusion model. `until` (a text or a list), the length
    under any of its names, `do_sample`, `temperature` and all options of `GenerationConfig` are read; the task's values
    override the settings'. Raises ConfigError for an unknown key.
    """
    rest = dict(gen_kwargs)
    until = rest.pop("until", None)
    stops = tuple(each for each in ([until] if isinstance(until, str) else until or ()) if each)
    lengths = [rest.pop(name, None) for name in LENGTHS]
    wanted = next((int(each) for each in lengths if each is not None), None)
    new_tokens = wanted or settings.generation.get("max_new_tokens") or DEFAULT_NEW_TOKENS
    if rest.pop("do_sample", None) is False:
        rest["temperature"] = 0.0
    known = {key: value for key, value in rest.items() if ALIASES.get(key, key) in generation_fields()}
    ignored = tuple(sorted(key for key in rest if key not in known and key in _FOREIGN))
    for key in rest:
        if key not in known and key not in ignored:
            raise ConfigError(
                unknown("generation argument", key, ["until", "do_sample", *LENGTHS, *generation_fields()])
            )
    own = _typed(GenerationConfig, {ALIASES.get(key, key): value for key, value in known.items()})
    config = GenerationConfig(**{**settings.generation, **own, "max_new_tokens": new_tokens})
    return Request(config=config, stops=stops, new_tokens=new_tokens), ignored


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Return `text` up to the first of `stops` in it."""
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(found)] if found else text


def _typed(config_class: type, given: Arguments, prefix: str = "") -> dict[str, Any]:
    """Pick the options of `config_class` out of `given`, in the types of its fields."""
    hints = get_type_hints(config_class)
    return {
        name: typed(given[prefix + name], hints[name], prefix + name)
        for name in names_of(config_class)
        if prefix + name in given
    }


def typed(value: Any, hint: Any, name: str) -> Any:
    """Convert a command-line value to the type `hint`; lists may be written [a;b], since commas separate arguments.

    Raises ConfigError when a text cannot be converted; values of other types are left for the config to check.
    """
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(member) or member for member in members]
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    if tuple in kinds:
        return _ids(value, name)
    if str in kinds:
        text = str(value)
        return ",".join(text[1:-1].split(";")) if text.startswith("[") and text.endswith("]") else text
    if not isinstance(value, str):
        return value
    if bool in kinds and value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(value)
            except ValueError:
                continue
    raise ConfigError(f"{name}={value!r} is not valid: it must be {' or '.join(map(_word, kinds))}.")


def _ids(value: Any, name: str) -> tuple[int, ...]:
    items = value.strip("[]()").replace(";", ",").split(",") if isinstance(value, str) else value
    items = [items] if isinstance(items, int) else items
    try:
        return tuple(int(item) for item in items if str(item).strip())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}={value!r} is no list of token ids; write it as [1;2;3].") from error


def _word(kind: type) -> str:
    return "None" if kind is type(None) else kind.__name__
