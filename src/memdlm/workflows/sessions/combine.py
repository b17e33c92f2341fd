"""Put saved memories together, and measure what each text loses by sharing a memory with the others."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memdlm.data.documents import read_document
from memdlm.errors import ConfigError, DataError
from memdlm.evaluation.masked_loss import Interference, interference
from memdlm.memory import MemoryConfig, ParametricMemory, SavedMemory, concatenate
from memdlm.memory.files.library import sources_of
from memdlm.memory.files.saved import MEMORY
from memdlm.options import option, validate
from memdlm.outputs import output_folder
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.decoding import ModelOptions, load_parts
from memdlm.workflows.sessions.documents import BETWEEN, document_ids
from memdlm.workflows.sessions.reading import saved_memories

HOW = ("sum", "average")


@dataclass(frozen=True, kw_only=True)
class CombineOptions(ModelOptions):
    """How memories are put together, and where the result goes."""

    output: str | None = option(None, "Folder to write the combined memory to.")
    overwrite: bool = option(False, "Replace an earlier memory in output.")
    how: str = option(
        "sum", "sum: add what the memories add (a learned start counts once); average: add the mean.", choices=HOW
    )
    weights: tuple[float, ...] | None = option(None, "With how=sum: one factor per memory, in order; unset: 1 each.")
    measure: bool = option(
        True, "Load the model and measure what each document loses (needs the documents where they were memorised)."
    )
    seed: int = option(0, "Seed of the masks that losses are measured with.")

    def __post_init__(self) -> None:
        if isinstance(self.weights, list):
            object.__setattr__(self, "weights", tuple(self.weights))
        validate(self)
        if not self.output:
            raise ConfigError("--output is missing: name a folder for the combined memory.")
        if self.weights is not None and self.how != "sum":
            raise ConfigError(f"weights has no effect with how={self.how!r}; use how=sum.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Combined:
    """The combined memory, and what it costs the texts of its parts."""

    memory: SavedMemory
    interference: list[Interference]
    """Per measured text, in nats per masked token."""
    not_measured: dict[str, str]
    """Per memory whose text was not measured, the reason."""


def combine(paths: list[str], options: CombineOptions, display: Display) -> Combined:
    """Combine the memories at `paths`, measure the result, and save it.

    The model is loaded if it is needed: to measure, and for a learned start that must be counted once. Raises
    MemoryFileError for memories that do not fit together or belong to another model.
    """
    memories = saved_memories(paths)
    if len(memories) < 2:
        raise ConfigError(f"combine: it takes at least 2 memories, got {len(memories)}. Name more.")
    parts = list(memories.values())
    weights = _weights(options, len(parts))
    has_start = any(part.fingerprint.learned is not None for part in parts) and abs(sum(weights) - 1) > 1e-9
    with output_folder(str(options.output), MEMORY, overwrite=options.overwrite) as output:
        if not options.measure and not has_start:
            _refuse_idle(options)
            combined = concatenate(parts, weights)
            combined.save_to(output)
            return Combined(memory=combined, interference=[], not_measured={})
        name = options.model if options.model is not None else parts[0].fingerprint.model
        # Refused before the model is loaded, if they do not fit each other.
        concatenate(parts, [1 / len(parts)] * len(parts))
        model, tokenizer = load_parts(replace(options, model=name), display)
        memory = ParametricMemory(model, _config(parts), mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
        for path, part in memories.items():
            memory.check_fits(part, f"memory {path!r}")
        combined = concatenate(parts, weights, start=memory.unwritten() if has_start else None)
        texts, missing = _texts(memories, tokenizer) if options.measure else ({}, {})
        found = interference(memory, texts, [memories[path] for path in texts], combined, seed=options.seed)
        combined = combined.noted(interference=[asdict(each) for each in found])
        combined.save_to(output)
    return Combined(memory=combined, interference=found, not_measured=missing)


def _weights(options: CombineOptions, count: int) -> list[float]:
    if options.how == "average":
        return [1 / count] * count
    if options.weights is not None and len(options.weights) != count:
        raise ConfigError(f"weights: there are {len(options.weights)} for {count} memories; give one each.")
    return list(options.weights or [1.0] * count)


def _refuse_idle(options: CombineOptions) -> None:
    for name in ("model", "adapter", "load_in_4bit"):
        if getattr(options, name):
            raise ConfigError(f"{name} has no effect with measure=False: no model is loaded. Leave one of them out.")


def _config(parts: list[SavedMemory]) -> MemoryConfig:
    """Return the options that all parts share; of those that differ, a chunk length bounds what is read at once."""
    return next((part.config for part in parts if part.config.chunk_length is not None), parts[0].config)


def _texts(
    memories: Mapping[str, SavedMemory], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the ids that each memory was written from, and why there are none for the others."""
    texts: dict[str, Tensor] = {}
    missing: dict[str, str] = {}
    for path, saved in memories.items():
        try:
            texts[path] = _ids(saved, tokenizer)
        except DataError as error:
            missing[path] = str(error)
    return texts, missing


def _ids(saved: SavedMemory, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    documents = []
    for source in sources_of(saved):
        if "source" not in source:
            raise DataError("the memory does not say which document it was written from.")
        documents.append(read_document(source["source"]))
        if documents[-1].sha256 != source.get("source_sha256"):
            raise DataError(f"{source['source']!r} was changed since it was memorised.")
    joined = replace(documents[0], text=BETWEEN.join(each.text for each in documents))
    return document_ids(joined, tokenizer, as_message=bool(saved.provenance.get("as_message")))
