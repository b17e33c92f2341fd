"""What a server is told: where it listens, who may ask, and how much anybody may ask for."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final

from memdlm.errors import ConfigError
from memdlm.inference.loading import ModelOptions
from memdlm.options import option, validate

KEY_VARIABLE = "MEMDLM_API_KEY"
SHORTEST_KEY = 16
"""Characters: a key that is shorter can be guessed."""
LOCAL_NAMES = ("localhost",)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Addresses, secrets and limits of a server."""

    memories: str | None = option(
        None, "Folder, or URL (s3://...), of the memories that are served and added to; unset: the model alone."
    )
    host: str = option("127.0.0.1", "Address to listen on. Any but this machine's own needs an API key.")
    port: int = option(8000, "Port to listen on; 0: a free one.", minimum=0, maximum=65535)
    api_key_file: str | None = option(
        None, f"File whose first line is the key that clients send; unset: the environment's {KEY_VARIABLE}, if any."
    )
    served_model_name: str | None = option(None, "Name of the model in requests; unset: the last part of --model.")
    read_only: bool = option(False, "Serve memories, but let no client create, load, unload or delete one.")
    max_tokens: int = option(4096, "Most tokens of one answer that a request may ask for.", minimum=1, maximum=2**20)
    max_prompt_tokens: int = option(16384, "Most tokens of a prompt.", minimum=1, maximum=2**24)
    max_text_tokens: int = option(65536, "Most tokens of a text that becomes a memory.", minimum=1, maximum=2**24)
    max_choices: int = option(8, "Most answers that one request may ask for (n, times its prompts).", minimum=1)
    max_stored: int = option(1000, "Most memories in the folder; a client that would add one more is refused.")
    max_body_mib: int = option(2, "Most MiB of a request's body, uploads excepted.", minimum=1, maximum=2**10)
    max_upload_mib: int = option(32, "Most MiB of an upload.", minimum=1, maximum=2**10)
    max_connections: int = option(512, "Most connections at a time; more are answered with status 503.", minimum=1)
    request_seconds: float = option(600.0, "Most seconds that a request may take, waiting included.", above=0)
    body_seconds: float = option(30.0, "Most seconds for a client to send its headers, and its body.", above=0)
    upload_seconds: float = option(60.0, "Most seconds of a processor for reading one uploaded file.", above=0)
    drain_seconds: float = option(
        30.0, "After SIGTERM: most seconds for answers and memories that are being written to become ready.", minimum=0
    )
    access_log: bool = option(True, "Print a line per request: address, path and status, never texts or keys.")

    def __post_init__(self) -> None:
        validate(self)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host in LOCAL_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


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


@final
@dataclass(frozen=True, slots=True)
class Secret:
    """A key that no message, log or traceback shows."""

    value: str

    def __repr__(self) -> str:
        return "Secret(...)"


def api_key(options: ServerOptions) -> Secret | None:
    """Return the key that clients must send; None: none is needed.

    It is taken out of the environment, so that no other process inherits it. Raises ConfigError for a key that is
    missing where one is needed, unreadable, or too short.
    """
    inherited = os.environ.pop(KEY_VARIABLE, "").strip()
    if options.api_key_file is not None:
        try:
            lines = Path(options.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"api_key_file: {options.api_key_file!r} cannot be read: {_why(error)}.") from error
        key = lines[0].strip() if lines else ""
        where = f"api_key_file: the first line of {options.api_key_file!r}"
    else:
        key, where = inherited, f"the environment's {KEY_VARIABLE}"
    if not key and options.api_key_file is None:
        if not options.is_local:
            raise ConfigError(
                f"host={options.host!r} can be reached from other machines, so clients need a key: put one into a file "
                f"and name it with --api_key_file, or into {KEY_VARIABLE}. Or listen on 127.0.0.1."
            )
        return None
    if len(key) < SHORTEST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"{where} must be a key of at least {SHORTEST_KEY} ASCII characters without spaces, such as the output of "
            "`openssl rand -hex 32`."
        )
    return Secret(key)


def _why(error: Exception) -> str:
    return (error.strerror or "the system refuses") if isinstance(error, OSError) else "it is no UTF-8 text"
