"""Names that the published project gives to options, beside ours. docs/migrating.md lists its commands.

Command lines and recipes take either name. Both names of one option together are an error: one value would be lost.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memdlm.errors import ConfigError


def _as_given(value: Any) -> Any:
    return value


def _sampling(value: Any) -> str:
    """Turn the value of the published `group_by_length` into ours."""
    said = str(value).lower()
    if said not in ("true", "false"):
        raise ConfigError(f"group_by_length={value!r} is not possible. It takes true or false.")
    return "group_by_length" if said == "true" else "random"


def _share(value: Any) -> Any:
    """Check the published `warmup_ratio`; as `warmup_steps`, a number from 1 on would be a count of steps."""
    try:
        is_share = 0 <= float(value) < 1
    except (TypeError, ValueError):
        is_share = False
    if not is_share:
        raise ConfigError(f"warmup_ratio={value!r} is not possible. It takes a number from 0 to below 1.")
    return value


@dataclass(frozen=True, slots=True)
class Alias:
    """What a published name means here."""

    ours: tuple[str, ...]
    """Our names for it; a command has at most one of them that counts, the first."""
    value: Callable[[Any], Any] = _as_given
    """Turns the published option's value into ours."""


ALIASES: Mapping[str, Alias] = {
    "model_name_or_path": Alias(("model",)),
    "adapter_model_name_or_path": Alias(("adapter",)),
    "base_model_name_or_path": Alias(("base", "model")),
    "model2_name_or_path": Alias(("model2",)),
    "model2_adapter_model_name_or_path": Alias(("adapter2",)),
    "model2_base_model_name_or_path": Alias(("model2",)),
    "dataset_name": Alias(("dataset_args",)),
    "dataset_split": Alias(("split",)),
    "num_steps": Alias(("steps",)),
    "cfg": Alias(("cfg_scale",)),
    "group_by_length": Alias(("train_sampling_strategy",), _sampling),
    "warmup_ratio": Alias(("warmup_steps",), _share),
}
"""By published name. It counts where a command has our name and no option of the published name."""

NOT_HERE: Mapping[str, str] = {
    "sft_map_fn_path": "rows are encoded with the chat template; --column_map names their columns",
    "remove_columns": "preprocessed data has no source columns",
    "disable_caching": "memdlm preprocess keeps tokenized data, train alone keeps none",
    "num_gpu": "start N processes: accelerate launch --num_processes N --no_python memdlm ...",
    "output_path": "--output names a folder; it gets the JSON and the picture",
    "chat_template": "memdlm chat uses it, memdlm generate only with --chat",
    "visualize": "denoising is shown live in a terminal; --trace FILE.html writes a page that replays it",
    "mem_mask_ratio_epsilon": "anchors are masked as the batch is (time_epsilon), or by mem_prompt_mask_ratio",
    "accelerate_config": "ACCELERATE_CONFIG=FILE sbatch .../slurm/train.sh RECIPE",
    "script_path": "name a recipe: memdlm train RECIPE",
    "push_to_hub": "upload the folder: hf upload NAME FOLDER",
}
"""Published options without a counterpart: what to do instead."""


def instead(flag: str) -> str:
    """Return what replaces a published option that memdlm does not have, as a sentence; "" for any other."""
    name = _name(flag)
    return f" It is an option of the published project: {NOT_HERE[name]}." if name in NOT_HERE else ""


def translated(argv: Sequence[str], flags: Collection[str]) -> list[str]:
    """Return `argv` with published names replaced by ours; `flags` are the command's own.

    Raises ConfigError if one option is given under two names.
    """
    words, seen = list(argv), dict[str, str]()
    ends = words.index("--") if "--" in words else len(words)
    for place, word in enumerate(words[:ends]):
        if not word.startswith("--"):
            continue
        flag, _, value = word.partition("=")
        ours = flag if flag in flags else _ours(flag, flags)
        if ours is None:
            continue
        option = _name(ours)
        if seen.setdefault(option, _name(flag)) != _name(flag):
            raise ConfigError(f"--{seen[option]} and --{_name(flag)} are names of the same option: give one of them.")
        if ours == flag:
            continue
        convert = ALIASES[_name(flag)].value
        if "=" in word:
            words[place] = f"{ours}={convert(value)}"
            continue
        words[place] = ours
        if convert is not _as_given:
            has_value = place + 1 < ends and not words[place + 1].startswith("--")
            words[place] = f"{ours}={convert(words[place + 1] if has_value else 'True')}"
            if has_value:
                words[place + 1] = ""
    return [word for word, given in zip(words, argv, strict=True) if word or not given]


def translated_keys(recipe: Mapping[str, Any], options: Collection[str]) -> dict[str, Any]:
    """Return `recipe` with published names replaced by ours; raises ConfigError for one option under two names."""
    found: dict[str, Any] = {}
    for name, value in recipe.items():
        ours = None if name in options else _ours(f"--{name}", [f"--{each}" for each in options])
        key = name if ours is None else _name(ours)
        if key in found or (ours is not None and key in recipe):
            raise ConfigError(f"{name} is another name of {key}, and both are given: leave one out.")
        found[key] = value if ours is None else ALIASES[name].value(value)
    return found


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _ours(flag: str, flags: Collection[str]) -> str | None:
    """Return our flag for a published one; None if it is no published one, or the command lacks ours."""
    alias = ALIASES.get(_name(flag))
    possible = () if alias is None else alias.ours
    return next((f"--{name}" for name in possible if f"--{name}" in flags), None)
