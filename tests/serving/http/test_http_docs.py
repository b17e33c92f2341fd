"""The requests of docs/serving.md, sent to a server: those of curl and those of the openai client."""

import contextlib
import dataclasses
import io
import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
from http_serving import decoder_of, running, service_of, until

from memdlm.serving.http.app import routed

pytest.importorskip("openai")
ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    service = service_of(decoder_of(folder), folder / "memories", port=0)
    service.base = "LLaDA2.1-mini"
    service.shelf.base = service.base
    with running(service) as port:
        yield service, port


def curl(words, port):
    """What curl sends, by the few flags that the page has."""
    kind, headers, body, form = None, {}, None, {}
    rest = iter(words[1:])
    for word in rest:
        if word == "-X":
            kind = next(rest)
        elif word == "-H":
            name, _, value = next(rest).partition(": ")
            headers[name] = value
        elif word == "-d":
            body = next(rest)
        elif word == "-F":
            name, _, value = next(rest).partition("=")
            form[name] = value
        elif word == "-o":
            next(rest)
        elif word.startswith("http"):
            address = word.replace(ADDRESS, f"http://127.0.0.1:{port}")
        else:
            assert word in ("-s", "-sN")
    files = {name: (value[1:], b"# k1 is v3") for name, value in form.items() if value.startswith("@")} or None
    data = {name: value for name, value in form.items() if not value.startswith("@")} if files else None
    method = kind or ("POST" if body or files else "GET")
    return httpx.request(method, address, headers=headers, content=body, data=data, files=files, timeout=60)


def test_the_requests_of_the_page_are_answered(served, monkeypatch):
    service, port = served
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, flags=re.S | re.M)
    sent = 0
    for language, text in blocks:
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(text.replace(ADDRESS, f"http://127.0.0.1:{port}"), {})
            first, second = printed.getvalue().split("\n", 1)
            assert first == second, "the stream is the answer"
            continue
        for line in text.splitlines():
            if not line.startswith("curl"):
                continue
            reply = curl(shlex.split(line), port)
            assert reply.status_code in (200, 202), (line, reply.text)
            until(lambda: not any(job.is_pending for job in service.jobs.all()), 90)
            sent += 1
    assert sent >= 8
    assert service.shelf.store.names() == ["note"]


def test_the_page_names_every_route(served):
    named = set(re.findall(r"`?(?:GET|POST|DELETE) (/[\w/.]*)", PAGE))
    paths = {each.replace("{name}", "NAME").replace("{number}", "ID") for each in routed(served[0]).openapi()["paths"]}
    assert paths - named == {"/v1/models/NAME"}
    assert named - paths == {"/openapi.json"}


def test_what_the_page_says_of_options_is_so(served):
    flags = set(re.findall(r"`--(\w+)", PAGE))
    from memdlm.memory.flags import DEFAULTS
    from memdlm.workflows.sessions.serve import ServeOptions

    known = {each.name for each in dataclasses.fields(ServeOptions)} | set(DEFAULTS) | {"help", "mem_"}
    assert flags <= known
    unit = (ROOT / "examples" / "serving" / "memdlm.service").read_text()
    container = (ROOT / "examples" / "serving" / "Containerfile").read_text()
    assert set(re.findall(r"--(\w+) ", unit.split("ExecStart=")[1].splitlines()[0])) <= known
    entry = json.loads("[" + re.search(r"ENTRYPOINT \[(.*?)\]", container, re.S)[1].replace("\\\n", "") + "]")
    assert {word[2:] for word in entry if word.startswith("--")} <= known
