"""A server on a tiny model, for tests: its parts, a client without a network, and a real one in a thread."""

import contextlib
import json
import threading
import time

from starlette.testclient import TestClient

import chat_folder
from memdlm import load_model, load_tokenizer
from memdlm.inference import Decoder, GenerationConfig
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.randomness import derive
from memdlm.serving import Engine
from memdlm.serving.http.app import build_app
from memdlm.serving.http.options import ServerOptions
from memdlm.serving.http.running import server_of
from memdlm.serving.http.service import Service
from memdlm.serving.http.shelf import Shelf
from memdlm.serving.http.url_store import store_at
from memdlm.workflows.sessions.serve import listening

TEXTS = {"alpha": "w1 w2 w3 w4 w5 w6", "beta": "w9 w8 w7 w6 w5 w4 w3"}
MEMORY = MemoryConfig(num_inner_steps=2, inner_rank=4, inner_layer_fraction=1.0, inner_lr=4.0)
CONFIG = GenerationConfig(max_new_tokens=16, block_size=8, steps_per_block=4)
BASE = "tiny"


def decoder_of(folder, family="llada", config=CONFIG):
    """A decoder of a tiny model, made in `folder`."""
    if not (folder / family).exists():
        chat_folder.make_model(folder / family, family)
    name = str(folder / family)
    return Decoder(load_model(name, dtype="float32", device="cpu"), load_tokenizer(name), config)


def written(decoder, text, seed=0):
    """The memory of a text, written alone and offline."""
    tokenizer = decoder.tokenizer
    memory = ParametricMemory(decoder.model, MEMORY, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
    import torch

    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with memory.write(ids, generator=[derive("memdlm.write", seed)]):
        return memory.export(0)


def offline(decoder, prompt, saved=None, seed=0, **changes):
    """What `generate` gives alone, outside of any server."""
    import dataclasses

    decoder = dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, **changes))
    opened = contextlib.nullcontext()
    if saved is not None:
        tokenizer = decoder.tokenizer
        memory = ParametricMemory(
            decoder.model, saved.reading_config, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer
        )
        opened = memory.recall(saved)
    with opened:
        found = decoder.generate([prompt], derive("memdlm.generate", seed))
    return found.texts[0]


def service_of(decoder, memories=None, *, slots=4, queue_limit=64, key=None, **options):
    """The parts of a server, not yet started."""
    store = None if memories is None else store_at(str(memories))
    engine = Engine(decoder, slots=slots, queue_limit=queue_limit, store=store)
    shelf = None if store is None else Shelf(store, engine, BASE)
    told = ServerOptions(**{"request_seconds": 60.0, "drain_seconds": 5.0, **options})
    return Service(engine=engine, options=told, base=BASE, root="models/tiny", key=key, shelf=shelf, memory=MEMORY)


def client_of(service):
    """A client that speaks with the application itself; the server runs while it is entered."""
    return TestClient(build_app(service), base_url="http://127.0.0.1", raise_server_exceptions=False)


@contextlib.contextmanager
def running(service):
    """Run a real server in a thread; yields its address."""
    with listening(service.options) as opened:
        server = server_of(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield opened.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def events_of(text):
    """The values of a body of server-sent events."""
    parts = [part for part in text.split("\n\n") if part and not part.startswith(":")]
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def until(is_true, seconds=60.0):
    """Wait for something that happens soon."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def finished(client, job):
    """Follow a job to its end."""
    while job["status"] in ("queued", "reading", "writing"):
        time.sleep(0.02)
        job = client.get(f"/v1/jobs/{job['id']}").json()
    return job
