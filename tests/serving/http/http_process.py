"""`memdlm serve` in a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
from http_serving import BASE

FLAGS = (
    *("--served_model_name", BASE, "--dtype", "float32", "--device", "cpu", "--max_new_tokens", "16"),
    *("--block_size", "8", "--steps_per_block", "4", "--mem_num_inner_steps", "2", "--mem_inner_rank", "4"),
    *("--mem_inner_layer_fraction", "1.0", "--mem_inner_lr", "4.0"),
)
"""What `http_serving` has, as flags."""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def served(model, memories, *flags, log, wait=400):
    """Start a server; yields (process, address) when it is ready. It is killed at the end unless it has ended."""
    port = free_port()
    command = [sys.executable, "-m", "memdlm", "serve", "--model", str(model), "--memories", str(memories)]
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), *FLAGS, *flags],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + wait
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/ready").status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        yield process, address
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def ended(process, seconds=60):
    """Ask a server to end; returns its exit status."""
    process.send_signal(signal.SIGTERM)
    return process.wait(seconds)


def resident(process):
    """Bytes of memory that a process has."""
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
