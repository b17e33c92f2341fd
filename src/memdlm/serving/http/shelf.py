"""Which memories are served, under which names: all of a store, less what was unloaded, plus what was loaded."""

import threading
from dataclasses import dataclass
from typing import final

from memdlm.errors import MemoryFileError
from memdlm.serving.engine import Engine
from memdlm.serving.http.errors import ApiError
from memdlm.serving.http.store import NamedStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """One name that requests may use."""

    name: str
    stored: str
    """The store's name of the memory."""
    place: str


@final
class Shelf:
    """The served memories of one engine. All methods may be called from any thread."""

    def __init__(self, store: NamedStore, engine: Engine, base: str) -> None:
        self.store, self.engine, self.base = store, engine, base
        self._lock = threading.Lock()
        self._aliases: dict[str, str] = {}
        self._hidden: set[str] = set()
        self._versions: dict[str, tuple[int, ...]] = {}

    def served(self) -> list[Served]:
        """Return what is served now, by name."""
        stored = self.store.names()
        with self._lock:
            names = {name: name for name in stored if name not in self._hidden and name != self.base}
            names |= {alias: name for alias, name in self._aliases.items() if name in stored}
        found = []
        for name, target in sorted(names.items()):
            try:
                found.append(Served(name=name, stored=target, place=self.store.place_of(target)))
            except MemoryFileError:  # deleted meanwhile
                continue
        return found

    def stored_name(self, name: str) -> str:
        """Return the store's name of a served memory, freshly read if its files have changed; ApiError for another."""
        with self._lock:
            target = self._aliases.get(name, name)
            is_hidden = target == name and name in self._hidden
        try:
            if is_hidden:
                raise MemoryFileError(name)
            version = self.store.version_of(target)
        except MemoryFileError as error:
            raise no_model(name) from error
        with self._lock:
            is_changed = self._versions.get(target, version) != version
            self._versions[target] = version
        if is_changed:
            self.engine.forget(target)
        return target

    def is_alias(self, name: str) -> bool:
        """Whether `name` is a further name of a memory that is stored under another."""
        with self._lock:
            return name in self._aliases

    def load(self, name: str, place: str, *, in_place: bool) -> None:
        """Serve the memory at `place` as `name`; ApiError for a name that is taken or a place outside of the store."""
        if name == self.base:
            raise ApiError(400, f"{name!r} is the name of the model; choose another.", param="lora_name")
        is_taken = name in [each.name for each in self.served()]
        if is_taken and not in_place:
            raise ApiError(
                400,
                f"the adapter {name!r} is loaded already. To load it again, set load_inplace to true.",
                param="lora_name",
            )
        try:
            stored = self.store.name_at(place)
        except MemoryFileError as error:
            raise ApiError(404, str(error), param="lora_path") from error
        if stored != name and name in self.store.names():
            raise ApiError(400, f"another stored memory has the name {name!r}; choose another.", param="lora_name")
        self.store.read(stored)  # a damaged one is refused here, and not by the first request
        self.engine.forget(stored)
        with self._lock:
            if stored == name:
                self._hidden.discard(name)
            else:
                self._aliases[name] = stored

    def unload(self, name: str) -> None:
        """Serve `name` no more; the files stay. ApiError for a name that is not served."""
        if name not in [each.name for each in self.served()]:
            raise no_model(name)
        with self._lock:
            stored = self._aliases.pop(name, None)
            if stored is None:
                self._hidden.add(name)
        self.engine.forget(name if stored is None else stored)

    def shown(self, name: str) -> None:
        """Serve a memory that was just written under this name."""
        with self._lock:
            self._hidden.discard(name)
            self._versions.pop(name, None)

    def delete(self, name: str) -> None:
        """Delete a stored memory, and serve it no more; ApiError for a name that is not stored."""
        try:
            self.store.delete(name)
        except MemoryFileError as error:
            if name in self.store.names():
                raise
            raise no_model(name) from error
        with self._lock:
            self._aliases = {alias: stored for alias, stored in self._aliases.items() if stored != name}
            self._hidden.discard(name)
            self._versions.pop(name, None)
        self.engine.forget(name)


def no_model(name: str) -> ApiError:
    """Return the error for a model or memory that is not served."""
    return ApiError(
        404,
        f"the model {name!r:.200} does not exist; /v1/models lists what does.",
        param="model",
        code="model_not_found",
    )
