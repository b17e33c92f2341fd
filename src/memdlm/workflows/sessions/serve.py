"""Load a model, and answer requests over HTTP until a signal comes."""

import errno
import importlib
import importlib.util
import os
import socket
from collections.abc import Callable
from typing import Any

from memdlm.errors import ConfigError, MachineError
from memdlm.inference import GenerationConfig
from memdlm.inference.loading import check_vocabulary
from memdlm.memory import MemoryConfig
from memdlm.serving.http.options import ServeOptions, ServerOptions, api_key
from memdlm.workflows.display import Display

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
"""What the extra `serve` installs."""


def serve(options: ServeOptions, config: GenerationConfig, memory: MemoryConfig | None, display: Display) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain. Raises MachineError when the port is taken or an extra is missing."""
    check_installed()
    key = api_key(options)
    with listening(options) as opened:
        check_vocabulary(options, config)
        building: Any = importlib.import_module("memdlm.serving.http.building")
        service = building.service_of(options, config, memory, display.say, key)
        running: Any = importlib.import_module("memdlm.serving.http.running")
        host, port = opened.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        display.say(f"{options.name}: {where}" + ("" if key is None else ", with an API key"))
        if not options.is_local:
            display.say("There is no encryption here: put a reverse proxy with TLS in front (docs/serving.md).")
        running.server_of(service).run(sockets=[opened])


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
