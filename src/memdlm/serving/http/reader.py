"""`python -m memdlm.serving.http.reader FILE NAME ...`: read one uploaded document, with limits, and print its text.

An upload comes from anybody, and parsers of PDF and HTML are large. So a process of its own reads it: bounded in
processor time and memory, with nothing in its environment, and without the model.
"""

import json
import resource
import sys
from pathlib import Path

from memdlm.data.documents import read_document
from memdlm.errors import DataError

PAGE = resource.getpagesize()


def limit(seconds: int, mib: int) -> None:
    """Bound what this process may use from here on: processor seconds and MiB of memory; no files, no core dump."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + seconds, spent + seconds + 1))
    try:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    except OSError:  # only Linux has it
        mapped = 2**30
    resource.setrlimit(resource.RLIMIT_AS, (mapped + mib * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(path: str, name: str, seconds: int, mib: int, characters: int) -> None:
    """Print the document's text and checksum, or what is wrong with it, as JSON."""
    limit(seconds, mib)
    try:
        found = read_document(path)
        if len(found.text) > characters:
            raise DataError(f"document: {path!r} has {len(found.text):,} characters; at most {characters:,} are read.")
        told = {"text": found.text, "sha256": found.sha256}
    except DataError as error:
        told = {"error": str(error).replace(repr(path), repr(name))}
    except (MemoryError, RecursionError):
        told = {"error": f"document: {name!r} needs more memory than this server gives to one upload."}
    sys.stdout.buffer.write(json.dumps(told).encode())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
