"""The border between a command and the shell: streams, Ctrl-C, and errors as one line with an exit status."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from memdlm.cli.faults import MACHINE, known_fault, save_traceback
from memdlm.cli.output import note
from memdlm.errors import ConfigError
from memdlm.terminal import one_line, printable

INTERRUPTED, UNREAD = 130, 141
"""Exit statuses as shells have them: 128 plus the number of the signal."""
_TRAINER_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
"""Values that transformers' own --debug takes."""


def guarded(program: str, argv: list[str], run: Callable[[list[str]], int]) -> int:
    """Run a command on `argv`; turn what it raises into one line on standard error and an exit status."""
    _open_streams()
    _quiet_libraries()
    arguments, is_debug = _without_debug(argv)
    name = " ".join([program, *arguments[:1]]) if program == "memdlm" else program
    try:
        with _plain_logs():
            _check_text(arguments)
            status = _flushed(run, arguments)
        return status
    except KeyboardInterrupt:
        note(f"{name}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return UNREAD
    except Exception as error:
        if is_debug:
            traceback.print_exception(error)
        _drop_output()
        return _told(error, name, [program, *arguments], is_debug=is_debug)


def _flushed(run: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command and flush its output. The flush may fail: the disk may be full, or the reader gone."""
    try:
        status = run(arguments)
    except SystemExit:
        # argparse exits after --help.
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def _told(error: Exception, name: str, command: Sequence[str], *, is_debug: bool) -> int:
    fault = known_fault(error)
    if fault is not None:
        note(f"{name}: error: {one_line(fault.message)}")
        return fault.status
    what = f"{type(error).__name__}: {one_line(str(error))[:300]}"
    rest = "" if is_debug else f" --debug shows where; so does {save_traceback(error, command)}."
    note(f"{name}: error: memdlm did not expect this, please report it: {what}.{rest}")
    return MACHINE


def _without_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Take --debug out, wherever it stands, unless a value of transformers' own --debug follows."""
    ends = argv.index("--") if "--" in argv else len(argv)
    places = [
        place
        for place, word in enumerate(argv[:ends])
        if word == "--debug" and not (place + 1 < ends and argv[place + 1] in _TRAINER_DEBUG)
    ]
    is_debug = bool(places) or os.environ.get("MEMDLM_DEBUG", "").lower() not in ("", "0", "false", "no")
    return [word for place, word in enumerate(argv) if place not in places], is_debug


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not valid text; names of existing files may be any bytes."""
    for place, word in enumerate(arguments, start=1):
        try:
            word.encode()
        except UnicodeEncodeError:
            if not os.path.lexists(word):
                raise ConfigError(
                    f"argument {place}, '{printable(word)}', is not valid UTF-8 text; write it in UTF-8."
                ) from None


def _open_streams() -> None:
    """Put the null device in place of closed standard streams, so that no later file gets their numbers."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(_null_at(number), mode, encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if mode == "w" and isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks is shown as its number.
            stream.reconfigure(errors="backslashreplace")


def _quiet_libraries() -> None:
    """Silence what is not about the user's run, before any of these libraries is imported."""
    # bitsandbytes warns on import about a kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers.trainer_utils").addFilter(_is_news)
    if not sys.stderr.isatty():
        # A bar in a file or a pipe is noise. tqdm draws those of transformers, datasets and lm-eval.
        os.environ.setdefault("TQDM_DISABLE", "1")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record says something: the Trainer gives a model its own tokenizer's ids, and warns that it did."""
    return not str(record.msg).startswith("The tokenizer has new PAD/BOS/EOS tokens")


def _null_at(number: int) -> int:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    return number


def _drop_output() -> None:
    """Flush the buffers. Drop what cannot be written: Python would complain about it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(null, stream.fileno())
    os.close(null)


class _PlainRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802
        """Return the message with control characters made visible: libraries quote files and models."""
        return printable(super().getMessage())


@contextmanager
def _plain_logs() -> Iterator[None]:
    earlier = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_PlainRecord)
    try:
        yield
    finally:
        logging.setLogRecordFactory(earlier)
