"""Adapters and memories as what other programs load: one ordinary model, or an adapter of PEFT's layout alone."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memdlm.errors import ConfigError
from memdlm.memory import ParametricMemory, SavedMemory, read_memory
from memdlm.memory.files.combining import fold
from memdlm.memory.files.library import find_memory
from memdlm.memory.files.saved import is_memory
from memdlm.models import load_model, load_tokenizer, merge_outer_adapter
from memdlm.models.blocks.looped import check_not_looped
from memdlm.models.hub.devices import AUTO, DEVICE_HELP
from memdlm.models.hub.loading import DTYPES, base_dtype, cast_parameters, line_of
from memdlm.models.lora.adapters import adapter_config
from memdlm.models.lora.files import base_of_adapter, is_adapter, with_tokenizer
from memdlm.options import option, validate
from memdlm.outputs import Kind, Output, output_folder
from memdlm.workflows.display import Display

MODEL = Kind(name="model", words="a merged model")
ADAPTER = Kind(name="adapter", words="an exported adapter")


def merge(base: str, adapter: str, output: Output, *, dtype: str, device: str, display: Display) -> None:
    """Fold an outer adapter into its base, and write the model in the published layout, with its tokenizer.

    `adapter` may be the folder of a memory. Raises MemoryFileError when it was written for another base.
    """
    if is_memory(adapter):
        _merge_memory(Path(adapter), read_memory(adapter), base, output, display, dtype=dtype, device=device)
        return
    # Sums are taken in the base's own precision, not in the one that the device prefers, and rounded once.
    model = load_model(base, dtype=base_dtype(base), device=device, adapter=adapter)
    display.say(line_of(model))
    merge_outer_adapter(model)
    _write(model, load_tokenizer(with_tokenizer(adapter, base)), output, dtype)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Output, dtype: str) -> None:
    cast_parameters(model, dtype)
    with output.replaced() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What a memory becomes, and where it goes."""

    output: str | None = option(None, "Folder to write.")
    overwrite: bool = option(False, "Replace an earlier export in output.")
    merged: bool = option(
        False, "Write a whole model with the memory folded into its weights, in place of an adapter that PEFT loads."
    )
    model: str | None = option(
        None, "Folder or hub name of the base model; unset: the one that the memory was written for."
    )
    adapter: str | None = option(
        None, "With merged: folder or hub name of the outer adapter that was on the model when the memory was written."
    )
    dtype: str = option(
        AUTO,
        "With merged: number type of the weights; auto: the base's. A 16-bit type rounds most of a small memory away.",
        choices=(AUTO, *DTYPES),
    )
    device: str = option(AUTO, f"With merged: {DEVICE_HELP}")

    def __post_init__(self) -> None:
        validate(self)
        if not self.output:
            raise ConfigError("--output is missing: name a folder to write.")
        for name, default in (("adapter", None), ("dtype", AUTO), ("device", AUTO)):
            if not self.merged and getattr(self, name) != default:
                raise ConfigError(f"{name}={getattr(self, name)!r} has no effect without merged; leave it out.")


def export_memory(path: str, options: ExportOptions, display: Display) -> SavedMemory:
    """Write the memory at `path` as a plain adapter, or as a model that holds it; returns the memory.

    The adapter is for the published network, with one linear layer per expert, and for the weights that the memory was
    written for, an outer adapter included. Raises MemoryFileError when the model to merge into is another one.
    """
    place = find_memory(path)
    with output_folder(
        str(options.output), MODEL if options.merged else ADAPTER, overwrite=options.overwrite
    ) as output:
        saved = read_memory(place)
        check_not_looped(saved.fingerprint.options, "a memory is not exported")
        base = saved.fingerprint.model if options.model is None else options.model
        if options.merged:
            more = {"dtype": options.dtype, "device": options.device}
            _merge_memory(place, saved, base, output, display, adapter=options.adapter, **more)
        else:
            named = replace(saved, fingerprint=replace(saved.fingerprint, model=base))
            with output.replaced() as folder:
                named.write_adapter(folder)
    return saved


def _merge_memory(
    place: Path,
    saved: SavedMemory,
    name: str,
    output: Output,
    display: Display,
    *,
    dtype: str,
    device: str,
    adapter: str | None = None,
) -> None:
    base = base_of_adapter(name) if is_adapter(name) else name
    model = load_model(name, dtype=base_dtype(base), device=device, adapter=adapter)
    display.say(line_of(model))
    tokenizer = load_tokenizer(name)

    def memory() -> ParametricMemory:
        return ParametricMemory(model, saved.reading_config, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)

    memory().check_fits(saved, f"memory {str(place)!r}")
    if adapter_config(model) is not None:
        merge_outer_adapter(model)
    # Built again: merging puts other modules in the place of the adapted ones.
    fold(saved, memory().fast)
    _write(model, tokenizer, output, dtype)
