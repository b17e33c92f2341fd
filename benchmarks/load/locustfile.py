"""Load for `memdlm serve`, with locust: users that ask all memories of a server, half of them in streams.

    memdlm serve --model MODEL --memories memories
    locust -f benchmarks/load/locustfile.py --headless -u 32 -r 8 -t 60s --host http://127.0.0.1:8000

MEMDLM_PROMPT is what is asked, MEMDLM_TOKENS how long answers may become, MEMDLM_API_KEY the server's key. Besides the
whole answers, the time to the first text of a stream is shown.
"""

import json
import os
import random
import time
from collections.abc import Iterable

from locust import HttpUser, between, task

PROMPT = os.environ.get("MEMDLM_PROMPT", "k1 is")
TOKENS = int(os.environ.get("MEMDLM_TOKENS", "32"))
KEY = os.environ.get("MEMDLM_API_KEY", "none")


class Asking(HttpUser):
    """Asks, waits a moment, and asks again."""

    wait_time = between(0.0, 0.2)

    def on_start(self):
        self.client.headers["Authorization"] = f"Bearer {KEY}"
        found = self.client.get("/v1/models").json()["data"]
        self.models = [each["id"] for each in found]

    @task
    def whole(self):
        body = {"model": random.choice(self.models), "prompt": PROMPT, "max_tokens": TOKENS}
        self.client.post("/v1/completions", json=body, name="whole answer")

    @task
    def stream(self):
        body = {"model": random.choice(self.models), "prompt": PROMPT, "max_tokens": TOKENS, "stream": True}
        start, first, size = time.perf_counter(), None, 0
        with self.client.post("/v1/completions", json=body, stream=True, name="stream", catch_response=True) as reply:
            for event in events(reply.iter_lines()):
                if "error" in event:
                    reply.failure(event["error"]["message"])
                    return
                text = event["choices"][0]["text"]
                size += len(text)
                first = time.perf_counter() - start if first is None and text else first
        whole = time.perf_counter() - start
        for name, seconds in (("time to the first text", first), ("time to the last", whole)):
            if seconds is not None:
                self.environment.events.request.fire(
                    request_type="stream", name=name, response_time=seconds * 1000, response_length=size, exception=None
                )


def events(lines: Iterable[bytes]) -> Iterable[dict]:
    """The values of server-sent events."""
    for line in lines:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
