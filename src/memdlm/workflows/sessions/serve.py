"""Load a model, and answer requests over HTTP until a signal comes."""

import errno
import importlib
import importlib.util
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdlm.errors import ConfigError, MachineError
from memdlm.inference import Decoder, GenerationConfig
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.options import option
from memdlm.serving.engine import Engine
from memdlm.serving.http.options import Secret, ServerOptions, api_key
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.decoding import ModelOptions, check_vocabulary, load_parts

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
"""What the extra `serve` installs."""
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ModelOptions, ServerOptions):
    """Which model is served, to whom, and how much at a time."""

    slots: int = option(8, "Answers that are decoded together.", minimum=1, maximum=2**12)
    queue: int = option(64, "Most jobs that wait; one more is refused with status 429.", minimum=1, maximum=2**16)
    memory_mib: int = option(1024, "MiB on the device for the memories in use; others are read again.", minimum=1)
    prefix_mib: int = option(1024, "MiB on the device for keys and values of prompts that were seen.", minimum=0)
    preset: str | None = option(None, "Preset of options recommended for a model family; other flags override it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.read_only and self.memories is None:
            raise ConfigError("read_only has no effect without memories: there is nothing that clients could change.")
        if self.served_model_name is not None and (not self.served_model_name.strip() or ":" in self.served_model_name):
            raise ConfigError(
                f"served_model_name={self.served_model_name!r} is not possible: it is empty, or has a colon, which "
                "stands between a model and a memory in requests."
            )

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.served_model_name or Path(str(self.model)).name.replace(":", "-") or "model"


def serve(options: ServeOptions, config: GenerationConfig, memory: MemoryConfig | None, display: Display) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain. Raises MachineError when the port is taken or an extra is missing."""
    check_installed()
    key = api_key(options)
    with listening(options) as opened:
        check_vocabulary(options, config)
        service = service_of(options, config, memory, display, key)
        running: Any = importlib.import_module("memdlm.serving.http.running")
        host, port = opened.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        display.say(f"{options.name}: {where}" + ("" if key is None else ", with an API key"))
        if not options.is_local:
            display.say("There is no encryption here: put a reverse proxy with TLS in front (docs/serving.md).")
        running.server_of(service).run(sockets=[opened])


def service_of(
    options: ServeOptions, config: GenerationConfig, memory: MemoryConfig | None, display: Display, key: Secret | None
) -> Any:
    """Load the model, and return the server's parts, not yet started."""
    service: Any = importlib.import_module("memdlm.serving.http.service")
    stores: Any = importlib.import_module("memdlm.serving.http.store")
    shelves: Any = importlib.import_module("memdlm.serving.http.shelf")
    store = None if options.memories is None else stores.FolderStore(options.memories)
    model, tokenizer = load_parts(options, display)
    written = ParametricMemory(model, memory, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
    engine = Engine(
        Decoder(model, tokenizer, config),
        slots=options.slots,
        memory_bytes=options.memory_mib * MIB,
        prefix_bytes=options.prefix_mib * MIB,
        queue_limit=options.queue,
        store=store,
    )
    if store is not None:
        display.say(f"{len(store.names())} memories in {store.folder}")
    return service.Service(
        engine=engine,
        options=options,
        base=options.name,
        root=str(options.model),
        key=key,
        shelf=None if store is None else shelves.Shelf(store, engine, options.name),
        memory=written.config,
    )


def check_installed(find: Callable[[str], Any] = importlib.util.find_spec) -> None:
    """Raise MachineError that says what to install if the extra `serve` is missing."""
    missing = [name for name in NEEDED if find(name) is None]
    if missing:
        raise MachineError(f"serving needs {', '.join(missing)}: pip install 'memdlm[serve]'.")


def listening(options: ServerOptions) -> socket.socket:
    """Return a socket that is bound to the address, before the model is loaded; MachineError if it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
        except BaseException:
            opened.close()
            raise
    except socket.gaierror as error:
        raise ConfigError(f"host={options.host!r} is no address of this machine: {error.strerror}.") from error
    except OSError as error:
        taken = " Another program listens there." if error.errno == errno.EADDRINUSE else ""
        why = os.strerror(error.errno or 0)
        raise MachineError(
            f"port {options.port} of {options.host} cannot be listened on: {why}.{taken} Choose another --port."
        ) from error
    return opened
