"""Uploads become text, in a process of their own (`reader.py`) that this module starts, bounds and ends."""

import asyncio
import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import final

from memdlm.errors import DataError

INHERITED = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ")
"""What of the environment a reader gets; keys and tokens are not among it."""
MIB, CHARACTERS = 1024, 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """The text of an uploaded document."""

    name: str
    text: str
    sha256: str


@final
class UploadReader:
    """Reads uploads, at most `at_once` at a time, each within `seconds` of a processor."""

    def __init__(self, seconds: float, at_once: int = 2) -> None:
        self.seconds, self._turn = seconds, asyncio.Semaphore(at_once)

    async def read(self, data: bytes, name: str) -> Upload:
        """Return the text of a file called `name`; raises DataError for one that cannot be read, or not in time."""
        suffix = Path(name).suffix.lower()
        async with self._turn:
            with tempfile.TemporaryDirectory(prefix="memdlm-upload-") as folder:
                path = Path(folder) / f"upload{suffix}"
                await asyncio.to_thread(path.write_bytes, data)
                told = await self._parsed(path, name, folder)
        if "error" in told:
            raise DataError(str(told["error"]))
        return Upload(name=name, text=str(told["text"]), sha256=str(told["sha256"]))

    async def _parsed(self, path: Path, name: str, folder: str) -> dict[str, object]:
        numbers = (max(1, round(self.seconds)), MIB, CHARACTERS)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"{__package__}.reader", str(path), name, *map(str, numbers)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=folder,
            env={**{each: os.environ[each] for each in INHERITED if each in os.environ}, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            # The reader's imports take seconds, and other processes may take the processor.
            printed, _ = await asyncio.wait_for(process.communicate(), 3 * self.seconds + 30)
        except asyncio.TimeoutError as error:
            raise DataError(f"file: {name!r} could not be read in {self.seconds:g} seconds.") from error
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if process.returncode != 0:
            raise DataError(
                f"file: {name!r} could not be read within {self.seconds:g} seconds and {MIB} MiB; it may be damaged. "
                "Convert it to text, or split it."
            )
        found: dict[str, object] = json.loads(printed)
        return found
