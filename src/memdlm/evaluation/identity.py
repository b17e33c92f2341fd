"""Identify evaluations: only the same model under the same settings may share cached answers."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memdlm.evaluation.harness_options import Settings
from memdlm.models.hub.resolution import find_file
from memdlm.models.lora.files import base_of_adapter, is_adapter
from memdlm.version import __version__

_NOT_THE_ANSWER = ("use_cache", "cache_requests", "output_path", "func", "limit", "log_samples", "batch_size", "device")
"""Options of lm-eval that change no prompt."""


def settings_identity(settings: Settings) -> str:
    """Return a short digest of everything besides the prompt that an answer depends on: weights, memory, decoding.

    Weights are identified by names, sizes and times of their files; reading them would take as long as loading.
    """
    memory = None if settings.memory is None else dataclasses.asdict(settings.memory)
    options = dataclasses.asdict(settings.options)
    return _digest([__version__, options, settings.generation, memory, _files(settings)])


def requests_identity(options: Mapping[str, Any], settings: Settings) -> str:
    """Return a short digest of everything that the prompts of a task depend on."""
    asked = {name: value for name, value in options.items() if name not in _NOT_THE_ANSWER}
    return _digest([__version__, asked, _files(settings)])


def _files(settings: Settings) -> dict[str, Any]:
    options = settings.options
    names = [options.pretrained, options.adapter, options.base_model_name_or_path, options.tokenizer]
    found: dict[str, Any] = {}
    for name in filter(None, names):
        found[name] = _stamps(name, options.revision)
        if is_adapter(name):
            base = base_of_adapter(name)
            found[base] = _stamps(base, None)
    if options.memory is not None:
        found[options.memory] = _stamps(options.memory, None)
    return found


def _stamps(name: str, revision: str | None) -> Any:
    """Describe a folder by its files; a hub name by the cached path of its configuration, which holds the commit."""
    if Path(name).is_dir():
        facts = [(path.name, path.stat()) for path in sorted(Path(name).iterdir()) if path.is_file()]
        return [str(Path(name).resolve()), *([path, stat.st_size, stat.st_mtime_ns] for path, stat in facts)]
    return str(find_file(name, "config.json", revision=revision, token=None))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
