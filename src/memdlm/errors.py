"""The errors that memdlm raises. They have one root, and each is also a standard error: `except ValueError` works.

A message names the field, the value, what was possible, and the next step. All classes take one string, so
they survive pickling between processes.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class MemDLMError(Exception):
    """Root of everything raised on purpose; the command line prints it as one line."""

    exit_status: ClassVar[int] = 2
    """Exit status of the command line: 2 if the input is at fault, 1 if the machine or the run is."""


class ConfigError(MemDLMError, ValueError):
    """An option, or a combination of options, that cannot be honoured."""


class DataError(MemDLMError, ValueError):
    """A dataset, row or file that cannot be used as asked."""


class CheckpointError(MemDLMError, ValueError):
    """A model or tokenizer folder that is missing, damaged, incomplete or of an unknown family."""


class MemoryFileError(MemDLMError, ValueError):
    """A saved memory that is damaged or was written for another model."""


class NotFiniteError(MemDLMError, ArithmeticError):
    """Weights, logits or a memory that hold NaN or infinity: every result of them would be wrong."""


class DivergedError(NotFiniteError):
    """A training run whose loss, gradient or weights stopped being finite."""

    exit_status = 1


class MachineError(MemDLMError, RuntimeError):
    """The machine cannot do what was asked: no disk space, no permission, no memory, or a missing device."""

    exit_status = 1


class EngineFullError(MachineError):
    """A serving engine whose queue takes no more jobs: wait until some are done, and submit again."""


class CancelledError(MemDLMError, RuntimeError):
    """A job that was given up before it was done, by its owner or because the engine was stopped."""

    exit_status = 1


def did_you_mean(value: str, possible: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `possible`, or an empty string."""
    close = difflib.get_close_matches(value, list(possible), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(what: str, value: object, possible: Iterable[str]) -> str:
    """Return a message that `value` is not a known `what`, with the possible names and the nearest of them."""
    names = list(possible)
    said = " ".join(repr(value).split())
    return f"{what} {said:.200} is not known. Possible: {', '.join(names)}.{did_you_mean(str(value), names)}"
