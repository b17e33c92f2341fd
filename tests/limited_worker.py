"""Commands in a process whose files end at a size, and that no permission is waived for: `limited_worker.py JSON`.

JSON is a list of (words, size or null); printed is a list of (exit status or exception, standard error).
"""

import contextlib
import ctypes
import io
import json
import resource
import sys
import traceback

import torch

from memdlm.cli.main import main


def give_up_privileges():
    """Drop root's capabilities, so that a folder without write permission is closed to root as well."""
    version_3 = 0x20080522
    if sys.platform == "linux":
        ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version_3, 0), (ctypes.c_uint32 * 6)())


def run(words, size):
    err = io.StringIO()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
            return main(words), err.getvalue()
    except Exception:
        return traceback.format_exc(), err.getvalue()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


if __name__ == "__main__":
    torch.set_num_threads(1)
    give_up_privileges()
    print(json.dumps([run(words, size) for words, size in json.loads(sys.argv[1])]))
