"""What takes a minute: load from many clients, kills in the middle, the page in a browser, random requests."""

import asyncio
import hashlib
import itertools
import os
import random
import shutil
import statistics
import subprocess
import threading
import time
from pathlib import Path

import browser
import httpx
import pytest
from http_process import ended, resident, served
from http_serving import BASE, decoder_of, events_of, offline, written

from memdlm.memory import read_memory
from memdlm.serving.http.url_store import store_at

pytestmark = pytest.mark.slow

CLIENTS, MEMORIES, SECONDS = 32, 8, 60
PROMPTS = ("w1 w2", "w3", "w5 w6 w7 w8", "w9 w10 w11")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    decoder = decoder_of(folder)
    return folder / "llada", decoder


def ask(client, memory, prompt, is_stream):
    body = {"model": BASE, "prompt": prompt, "stream": is_stream, **({"memory": memory} if memory else {})}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    if not is_stream:
        return reply.json()["choices"][0]["text"]
    return "".join(event["choices"][0]["text"] for event in events_of(reply.text))


def test_many_clients_get_the_offline_answers_and_the_process_does_not_grow(model, tmp_path):
    place, decoder = model
    expected = {(None, prompt): offline(decoder, prompt) for prompt in PROMPTS}
    for number in range(MEMORIES):
        saved = written(decoder, " ".join(f"w{(number * 5 + each * 3) % 24}" for each in range(10)))
        saved.save(tmp_path / "memories" / f"m{number}.mem")
        expected |= {(f"m{number}", prompt): offline(decoder, prompt, saved) for prompt in PROMPTS}
    assert len(set(expected.values())) > MEMORIES
    wrong, times, sizes = [], [], []

    def work(seed, end, address):
        draw = random.Random(seed)
        with httpx.Client(base_url=address, timeout=60) as client:
            while time.monotonic() < end:
                key, start = draw.choice(list(expected)), time.monotonic()
                try:
                    found = ask(client, *key, draw.random() < 0.5)
                except (AssertionError, httpx.HTTPError) as error:
                    found = error
                times.append(time.monotonic() - start)
                if found != expected[key]:
                    wrong.append((key, found, expected[key]))

    with served(place, tmp_path / "memories", log=tmp_path / "log") as (process, address):
        end = time.monotonic() + SECONDS
        threads = [threading.Thread(target=work, args=(seed, end, address)) for seed in range(CLIENTS)]
        for each in threads:
            each.start()
        while time.monotonic() < end:
            time.sleep(1)
            sizes.append(resident(process))
        for each in threads:
            each.join()
        assert ended(process) == 0
    assert wrong == []
    half = len(sizes) // 2
    print(
        f"{len(times)} answers in {SECONDS} s from {CLIENTS} clients; seconds: median {statistics.median(times):.2f}, "
        f"worst {max(times):.2f}; MiB: {sizes[half // 2] >> 20} after a quarter, {sizes[-1] >> 20} at the end"
    )
    assert max(sizes[half:]) < 1.05 * max(sizes[half // 2 : half]), "what the first half took is enough for the second"


@pytest.mark.parametrize("kind", ["", "file://"])
def test_a_kill_while_memories_are_written_leaves_whole_ones(model, tmp_path, kind):
    place, _ = model
    memories, draw, known = f"{kind}{tmp_path}/memories", random.Random(0), {}
    sizes = itertools.count(5)
    for round_ in range(5):
        with served(place, memories, log=tmp_path / "log") as (process, address):
            listed = httpx.get(f"{address}/v1/memories").json()["data"]
            assert [each["problem"] for each in listed] == [None] * len(listed)
            for each in listed:
                saved = store_at(memories).read(each["id"])
                assert saved.provenance["source_sha256"] in known[each["id"]]
                reply = httpx.post(f"{address}/v1/completions", json={"model": each["id"], "prompt": "w1"}, timeout=60)
                assert reply.status_code == 200
            assert not [each for each in (tmp_path / "memories").glob("*") if each.suffix in (".tmp", ".old")]
            assert round_ == 0 or listed
            if round_ == 4:
                break
            stop = time.monotonic() + 2 + 2 * draw.random()
            while time.monotonic() < stop:
                name = f"m{draw.randrange(6)}"
                text = " ".join(f"w{draw.randrange(24)}" for _ in range(next(sizes) % 40 + 2))
                known.setdefault(name, set()).add(hashlib.sha256(text.encode()).hexdigest())
                httpx.post(f"{address}/v1/memories", json={"name": name, "text": text, "overwrite": True})
            process.kill()
    assert sum(map(len, known.values())) > 20


def test_sigterm_lets_answers_and_memories_end(model, tmp_path):
    place, _ = model
    long = {"model": BASE, "prompt": "w1", "max_tokens": 300, "block_size": 300, "steps": 300, "stream": True}
    with served(place, tmp_path / "memories", log=tmp_path / "log") as (process, address):
        with httpx.stream("POST", f"{address}/v1/completions", json=long, timeout=60) as reply:
            assert reply.status_code == 200
            job = httpx.post(f"{address}/v1/memories", json={"name": "last", "text": "w1 w2 w3"}).json()
            process.terminate()
            events = events_of("".join(reply.iter_text()))
        assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert process.wait(60) == 0
    assert job["status"] == "queued"
    assert read_memory(tmp_path / "memories" / "last.mem").provenance["tokens"] == 3
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/ready")


def test_a_key_of_the_environment_is_needed_and_in_no_log(model, tmp_path, monkeypatch):
    place, _ = model
    key = "the-key-of-the-environment-42"
    monkeypatch.setenv("MEMDLM_API_KEY", key)
    with served(place, tmp_path / "memories", log=tmp_path / "log") as (process, address):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert ended(process) == 0
    assert key not in (tmp_path / "log").read_text()


HOOKS = f"""
import schemathesis

@schemathesis.hook
def map_body(context, body):
    # Random names name nothing: most requests are to get beyond that.
    if isinstance(body, dict):
        for field, value in (("model", "{BASE}"), ("memory", "kept"), ("lora_path", "kept.mem")):
            if isinstance(body.get(field), str) and len(body[field]) % 4:
                body[field] = value
    return body

@schemathesis.hook
def map_path_parameters(context, parameters):
    if parameters and len(str(parameters.get("name", ""))) % 4:
        parameters["name"] = "kept"
    return parameters
"""


@pytest.mark.skipif(shutil.which("schemathesis") is None, reason="needs schemathesis: pip install 'memdlm[load]'")
def test_random_requests_by_the_schema_find_no_fault_of_the_server(model, tmp_path):
    place, decoder = model
    written(decoder, "w1 w2 w3").save(tmp_path / "memories" / "kept.mem")
    (tmp_path / "hooks.py").write_text(HOOKS)
    flags = ["--max_tokens", "64", "--request_seconds", "20"]
    with served(place, tmp_path / "memories", *flags, log=tmp_path / "log") as (process, address):
        command = ["schemathesis", "run", f"{address}/openapi.json", "--checks", "not_a_server_error"]
        command += ["--max-examples", os.environ.get("MEMDLM_EXAMPLES", "40"), "--seed", "1", "--no-color"]
        inherited = {**os.environ, "SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500, env=inherited)
        print(done.stdout[-3000:])
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert httpx.get(f"{address}/health").status_code == 200
        assert ended(process) == 0
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    answered = {path: log.count(f'POST {path} HTTP/1.1" 200') for path in ("/v1/completions", "/v1/chat/completions")}
    print(answered)
    assert all(answered.values()), "some requests got through"


# The page. ----------------------------------------------------------------------------------------------------------

LOOKS = {
    "desktop-light": (1200, 900, False, False),
    "desktop-dark": (1200, 900, True, False),
    "phone-light": (390, 844, False, True),
    "phone-dark": (390, 844, True, True),
}


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium")
def test_the_page_memorises_asks_and_shows_in_a_browser(model, tmp_path):
    place, decoder = model
    pictures = Path(os.environ.get("MEMDLM_PICTURES", tmp_path))
    text, question = "w1 w2 w3 w4 w5 w6", "w1 w2 w3"

    async def visit(address):
        async with browser.tab(tmp_path, address) as tab:
            await tab.look(1200, 900)
            await tab.until("document.getElementById('main') && !document.getElementById('main').hidden")
            # By keyboard alone: type into the text, go on with Tab, and send the form with Enter.
            await tab.run("document.getElementById('text').focus()")
            await tab.type(text)
            for _ in range(2):
                await tab.press("Tab", windowsVirtualKeyCode=9)
            assert await tab.run("document.activeElement.id") == "name"
            await tab.type("from-the-page")
            await tab.press("Enter", windowsVirtualKeyCode=13, text="\r")
            await tab.until("document.getElementById('job-state').textContent.includes('done')")
            await tab.until("document.getElementById('memory').value === 'from-the-page'")
            await tab.run("document.getElementById('question').focus()")
            await tab.type(question)
            await tab.run("document.getElementById('length').value = 16")
            await tab.press("Enter", windowsVirtualKeyCode=13, modifiers=2)
            await tab.until(
                "[0, 1].every(each => /tokens in/.test(document.getElementById('cost-' + each).textContent))"
            )
            answers = await tab.run("[0, 1].map(each => document.getElementById('answer-' + each).textContent)")
            cells = await tab.run("document.querySelectorAll('#canvas-0 .token').length")
            for name, (width, height, is_dark, is_phone) in LOOKS.items():
                await tab.look(width, height, dark=is_dark, phone=is_phone)
                await asyncio.sleep(0.6)
                assert await tab.run("document.documentElement.scrollWidth <= innerWidth"), name
                await tab.picture(pictures / f"{name}.png")
            # An answer that is stopped by the keyboard frees its slots.
            await tab.run("document.getElementById('length').value = 600")
            await tab.run("document.getElementById('pace').value = 600")
            await tab.run("document.getElementById('question').focus()")
            await tab.press("Enter", windowsVirtualKeyCode=13, modifiers=2)
            await tab.until("document.querySelectorAll('.token.new').length > 0")
            await tab.press("Escape", windowsVirtualKeyCode=27)
            await tab.until("document.getElementById('answer-0').textContent === 'Stopped.'")
            return answers, cells, tab.problems

    with served(place, tmp_path / "memories", log=tmp_path / "log") as (process, address):
        answers, cells, problems = asyncio.run(visit(f"{address}/"))
        end = time.monotonic() + 30
        while httpx.get(f"{address}/v1/server").json()["now"]["running"]:
            assert time.monotonic() < end
            time.sleep(0.1)
        ended(process)
    saved = read_memory(tmp_path / "memories" / "from-the-page.mem")
    ask_of = lambda content: [{"role": "user", "content": content}]
    with_memory = offline(decoder, ask_of(question), saved)
    with_text = offline(decoder, ask_of(f"{text}\n\n{question}"))
    assert answers == [with_memory or "(an empty answer)", with_text or "(an empty answer)"]
    assert 0 < cells <= 16
    assert problems == []
