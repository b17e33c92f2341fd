"""What routing by memory is worth: how many requests meet a replica that holds their memory already, with and without.

    python benchmarks/serving_ray.py [--seconds 25] [--clients 16] [--replicas 2] [--memories 8] [--quick] [--out FILE]

Two ways take turns in one process, each with a fresh application: Ray Serve's model multiplexing, and Serve's plain
choice among replicas. A replica has room for its share of the memories (as many as there are, through the replicas).
The replica says of every request where its memory was when it came; the answers must be those of the model alone, or
the run stops. A small model with random weights: what counts are the shares. Needs the extra `ray`.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import secrets
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A token of this run's own: Ray would write one into the home folder.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import httpx
import ray
import torch
from ray import serve

from memdlm import load_model, load_tokenizer
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.inference import Decoder, GenerationConfig
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models import SmallDLMConfig, build_model
from memdlm.randomness import derive
from memdlm.serving.ray_app import app

WORDS, PORT = 64, 8123
PROMPTS = ("w01 w02", "w03", "w05 w06 w07 w08", "w09 w10 w11")
DECODING: Mapping[str, Any] = {"max_new_tokens": 16, "block_size": 8, "steps_per_block": 4}
MEMORY = MemoryConfig(num_inner_steps=2, inner_rank=4, inner_layer_fraction=1.0, inner_lr=4.0)
Answers = Mapping[tuple[str, str], str]


def prepared(folder: Path, count: int) -> dict[tuple[str, str], str]:
    """Write a model and `count` memories; return what every memory's model answers alone, offline."""
    tokenizer = build_word_tokenizer(f"w{each:02}" for each in range(WORDS))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    build_model(SmallDLMConfig(vocab_size=len(tokenizer), **sizes), seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model, tokenizer = (
        load_model(str(folder / "model"), dtype="float32", device="cpu"),
        load_tokenizer(folder / "model"),
    )
    decoder = Decoder(model, tokenizer, GenerationConfig(**DECODING))
    found = {}
    for number in range(count):
        memory = ParametricMemory(model, MEMORY, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
        ids = torch.randint(5, len(tokenizer), (1, 24), generator=derive("serving ray", number))
        with memory.write(ids):
            memory.export(0).save(folder / "memories" / f"m{number}.mem")
            for prompt in PROMPTS:
                decoded = decoder.generate([prompt], derive("memdlm.generate", 0))
                found[f"m{number}", prompt] = decoded.texts[0]
    return found


@contextlib.contextmanager
def machine(cpus: int) -> Iterator[str]:
    """Start Ray and Serve on this machine alone; yields the address."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        ray.init(
            num_cpus=cpus,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": PORT})
            yield f"http://127.0.0.1:{PORT}"
        finally:
            serve.shutdown()
            ray.shutdown()


def load(address: str, expected: Answers, clients: int, seconds: float) -> dict[str, Any]:
    """Ask from many clients, whole answers and streams by turns; return counts, and what was wrong."""
    wrong: list[Any] = []
    times: list[float] = []
    where: Counter[tuple[str, str]] = Counter()
    lock, end = threading.Lock(), time.monotonic() + seconds

    def ask(client: httpx.Client, memory: str, prompt: str, is_stream: bool) -> tuple[str, tuple[str, str]]:
        body = {"model": "model", "memory": memory, "prompt": prompt, "stream": is_stream}
        reply = client.post("/v1/completions", json=body)
        if reply.status_code != 200:
            raise ValueError(f"{reply.status_code}: {reply.text}")
        met = (reply.headers["x-memdlm-replica"], reply.headers["x-memdlm-memory"])
        if not is_stream:
            return reply.json()["choices"][0]["text"], met
        events = [each.removeprefix("data: ") for each in reply.text.strip().split("\n\n") if each[0] != ":"]
        if events[-1] != "[DONE]":
            raise ValueError(events[-1])
        return "".join(json.loads(each)["choices"][0]["text"] for each in events[:-1]), met

    def work(seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(base_url=address, timeout=60) as client:
            while time.monotonic() < end:
                key, start = draw.choice(list(expected)), time.monotonic()
                try:
                    text, met = ask(client, *key, draw.random() < 0.5)
                except (ValueError, KeyError, httpx.HTTPError) as error:
                    text, met = repr(error), ("", "")
                with lock:
                    times.append(time.monotonic() - start)
                    where[met] += 1
                    if text != expected[key]:
                        wrong.append((key, text, expected[key]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(clients)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    here = sum(count for (_, memory), count in where.items() if memory == "here")
    return {
        "answers": len(times),
        "wrong": wrong,
        "share_here": here / len(times),
        "by_replica": {f"{replica} {memory}": count for (replica, memory), count in sorted(where.items())},
        "median_s": statistics.median(times),
        "worst_s": max(times),
    }


def served(address: str, folder: Path, expected: Answers, args: argparse.Namespace, by_memory: bool) -> dict[str, Any]:
    """Run one application, and the load on it."""
    given = {
        "model": str(folder / "model"),
        "memories": f"file://{folder}/memories",
        "dtype": "float32",
        "device": "cpu",
        "replicas": args.replicas,
        "routed_by_memory": by_memory,
        "memories_per_replica": -(-args.memories // args.replicas),
        **DECODING,
    }
    serve.run(app(given))
    found = load(address, expected, args.clients, args.seconds)
    figures = httpx.get(f"{address}/metrics").text
    serve.delete("default")
    return {
        **found,
        "metrics": [each for each in figures.splitlines() if each.startswith("memdlm:routed_requests_total")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=25)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--memories", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round of 3 seconds")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "serving_ray.json"))
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 3
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, machine(args.replicas) as address:
        expected = prepared(Path(name), args.memories)
        for number in range(args.rounds):
            ways = (True, False) if number % 2 == 0 else (False, True)
            for by_memory in ways:
                found = served(address, Path(name), expected, args, by_memory)
                if found["wrong"]:
                    raise SystemExit(f"wrong answers: {found['wrong'][:3]}")
                rounds.append({"round": number, "routed_by_memory": by_memory, **found})
                print(json.dumps(rounds[-1]))
    told = {
        "what": "share of requests that met a replica which held their memory already",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {"torch": torch.__version__, "ray": ray.__version__},
        **{each: getattr(args, each) for each in ("seconds", "clients", "replicas", "memories")},
        "share_here": {
            name: statistics.mean(each["share_here"] for each in rounds if each["routed_by_memory"] is by_memory)
            for name, by_memory in (("by_memory", True), ("plain", False))
        },
        "rounds": rounds,
    }
    Path(args.out).write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
