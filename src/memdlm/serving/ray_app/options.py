"""What the application is told: the options of `memdlm serve`, and how many replicas there are of what size."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from memdlm.errors import ConfigError, unknown
from memdlm.inference import GenerationConfig
from memdlm.memory import MemoryConfig
from memdlm.memory.flags import DEFAULTS, PREFIX, memory_from_flags
from memdlm.memory.learned import saved_config
from memdlm.models.hub.loading import MEMORY_CONFIG_FILE
from memdlm.options import names_of, option
from memdlm.serving.http.options import ServeOptions


@dataclass(frozen=True, kw_only=True)
class RayOptions(ServeOptions):
    """Which model is served by how many replicas."""

    replicas: int = option(1, "Replicas, each with a model and an engine of its own.", minimum=1)
    cpus: float = option(1.0, "CPUs that Ray sets aside for a replica.", minimum=0)
    gpus: float = option(0.0, "GPUs that Ray sets aside for a replica.", minimum=0)
    memories_per_replica: int = option(
        64, "Memories that a replica holds, those asked for last; memory_mib must have room for them.", minimum=1
    )
    routed_by_memory: bool = option(True, "Send a request to a replica that has its memory, if one is free.")
    max_ongoing: int | None = option(
        None, "Requests at a time in one replica, before others are asked; unset: twice the slots.", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        idle = {"port": 8000, "host": "127.0.0.1", "max_connections": 512, "access_log": True}
        for name, plain in idle.items():
            if getattr(self, name) != plain:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} has no effect here: Ray Serve listens. Give its own http_options."
                )

    @property
    def at_once(self) -> int:
        """Requests at a time in one replica."""
        return 2 * self.slots if self.max_ongoing is None else self.max_ongoing


def parsed(given: Mapping[str, Any]) -> tuple[RayOptions, GenerationConfig, MemoryConfig | None]:
    """Return the options that `given` sets, with the flags of `memdlm serve` as keys; values may be texts.

    Raises ConfigError for a key that is not known, and a value that is not possible.
    """
    hints = {
        **get_type_hints(GenerationConfig),
        **{f"{PREFIX}{name}": hint for name, hint in get_type_hints(MemoryConfig).items()},
        **get_type_hints(RayOptions),
    }
    names = [*names_of(RayOptions), *names_of(GenerationConfig), *DEFAULTS]
    values = {}
    for name, value in given.items():
        if name not in names:
            raise ConfigError(unknown("option", name, names))
        try:
            values[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{name}={value!r:.80} is not possible: {error.errors()[0]['msg']}.") from error
    options = RayOptions(**{name: values[name] for name in names_of(RayOptions) if name in values})
    chosen = {name: values[name] for name in names_of(GenerationConfig) if name in values}
    if "max_length" in chosen:
        chosen.setdefault("max_new_tokens", None)
    config = GenerationConfig() if options.preset is None else GenerationConfig.preset(options.preset)
    config = dataclasses.replace(config, **chosen)
    config.refuse_idle(chosen)
    written = {**DEFAULTS, **_learned(options), **{name: values[name] for name in DEFAULTS if name in values}}
    memory = memory_from_flags(written, values, is_on=options.memories is not None, switch="memories=URL")
    return options, config, memory


def _learned(options: RayOptions) -> dict[str, Any]:
    """Return, as mem_* flags, the options that the model's memory was trained with; {} if it was not."""
    folder = Path(str(options.adapter or options.model))
    if not (folder / MEMORY_CONFIG_FILE).is_file():
        return {}
    return {f"{PREFIX}{name}": value for name, value in dataclasses.asdict(saved_config(folder)).items()}
