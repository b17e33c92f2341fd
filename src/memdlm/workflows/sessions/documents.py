"""Which documents are written, into which memories, and which of these need not be written again."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from memdlm.data.documents import READERS, Document, plain_ids, read_document
from memdlm.errors import ConfigError, DataError, MemoryFileError
from memdlm.memory import MemoryConfig, SavedMemory, is_memory, read_memory
from memdlm.memory.files.library import sources_of
from memdlm.memory.files.saved import MEMORY, inspect_memory
from memdlm.outputs import find
from memdlm.templates import message_ids

SUFFIX = ".mem"
BETWEEN = "\n\n"
"""Stands between documents that are written, or shown, as one text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One memory to be written: its folder, and the documents whose text goes into it."""

    place: str
    documents: tuple[Document, ...]

    @property
    def text(self) -> str:
        """The documents' texts, in order."""
        return BETWEEN.join(document.text for document in self.documents)

    @property
    def origin(self) -> dict[str, Any]:
        """Where the text comes from, as the memory's provenance says it."""
        found = [{"source": each.path, "source_sha256": each.sha256} for each in self.documents]
        return found[0] if len(found) == 1 else {"sources": found}

    def ids(self, tokenizer: PreTrainedTokenizerBase, *, as_message: bool) -> Tensor:
        """Return the ids [L] that are written; see `document_ids`."""
        joined = replace(self.documents[0], text=self.text)
        return document_ids(joined, tokenizer, as_message=as_message)


def document_ids(document: Document, tokenizer: PreTrainedTokenizerBase, *, as_message: bool) -> Tensor:
    """Return the ids [L] that are written; raises DataError when there are none, or there is no chat template."""
    if as_message:
        if tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template; leave as_message out.")
        ids = message_ids(tokenizer, [{"role": "user", "content": document.text}])
    else:
        ids = plain_ids(tokenizer, document.text)
    if not ids:
        raise DataError(f"document: {document.path!r} has no tokens.")
    return torch.tensor(ids, dtype=torch.int64)


def targets_of(files: Sequence[str], output: str, *, joined: bool) -> tuple[list[Target], list[str]]:
    """Return the memories that `files` (documents and folders of documents) are to become, and the files left out.

    One document becomes the memory `output`, and so do `joined` ones. Several documents, those of a folder, and one
    document for an `output` that holds memories and nothing else, become memories of their own names in `output`. The
    files of a folder that are no documents are left out. Raises DataError for a document that cannot be read and a
    folder without documents, ConfigError when two memories would have the same name.
    """
    named: list[tuple[str, Document]] = []
    left_out: list[str] = []
    for each in files:
        if not Path(each).is_dir():
            named.append((Path(each).stem, read_document(each)))
            continue
        found, others = _documents_in(Path(each))
        left_out += others
        named += [(_name(path.relative_to(each)), read_document(path)) for path in found]
    _refuse_repeated([document.path for _, document in named], "file: {} is named twice. Leave one out.")
    is_one = len(files) == 1 and not Path(files[0]).is_dir()
    if joined and is_one:
        raise ConfigError("joined has no effect on one document; leave it out, or name several files or a folder.")
    if joined or (is_one and not _holds_memories_alone(output)):
        return [Target(place=output, documents=tuple(document for _, document in named))], left_out
    if is_memory(output):
        raise ConfigError(
            f"output: {output!r} is a memory; {len(named)} documents need a folder that holds memories. Name another "
            "folder, or add --joined for one memory of all."
        )
    places = [os.path.join(output, f"{name}{SUFFIX}") for name, _ in named]
    _refuse_repeated(
        places,
        "output: two documents would both become {}. Rename one of them, or write them into different folders.",
    )
    return [Target(place=place, documents=(each,)) for place, (_, each) in zip(places, named, strict=True)], left_out


def _holds_memories_alone(output: str) -> bool:
    """Whether `output` is a folder of readable memories. Among somebody's files nothing is written."""
    entries = list(Path(output).iterdir()) if Path(output).is_dir() else []
    return bool(entries) and all(is_memory(each) and inspect_memory(each).problem is None for each in entries)


def _documents_in(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the documents in `folder` and the folders below, by name, and the other files; hidden ones are neither."""
    found, others = [], []
    for path in _files_in(folder):
        if path.suffix.lower() in READERS:
            found.append(path)
        else:
            others.append(str(path))
    if not found:
        raise DataError(f"document: the folder {str(folder)!r} holds no documents; possible: {', '.join(READERS)}.")
    return sorted(found), sorted(others)


def _files_in(folder: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise DataError(f"document: {error.filename!r} cannot be read: {error.strerror}.") from error

    for parent, names, files in os.walk(folder, onerror=stop):
        names[:] = [each for each in names if not each.startswith(".") and not is_memory(Path(parent, each))]
        yield from (Path(parent, each) for each in files if not each.startswith("."))


def _name(path: Path) -> str:
    return "-".join(path.with_suffix("").parts)


def _refuse_repeated(names: Sequence[str], message: str) -> None:
    seen: set[str] = set()
    for each in names:
        if each in seen:
            raise ConfigError(message.format(repr(each)))
        seen.add(each)


def earlier_memory(target: Target) -> SavedMemory | None:
    """Return the memory that lies where `target` is to be, damaged ones excepted; None: there is none."""
    find(target.place, MEMORY)
    if not is_memory(target.place):
        return None
    try:
        return read_memory(target.place)
    except MemoryFileError:
        return None


def is_unchanged(target: Target, saved: SavedMemory, config: MemoryConfig, said: Mapping[str, Any]) -> bool:
    """Whether `saved` was written from the same documents, with the same options of the memory and of the command."""
    expected = [document.sha256 for document in target.documents]
    found = [source.get("source_sha256") for source in sources_of(saved)]
    return found == expected and saved.provenance.get("written_with") == said and _is_same(saved.config, config)


def _is_same(written: MemoryConfig, wanted: MemoryConfig) -> bool:
    # Without a chunk length, a long text was written in chunks of the positions that the model was trained on.
    chunk = written.chunk_length if wanted.chunk_length is None else wanted.chunk_length
    return written == replace(wanted, chunk_length=chunk)
