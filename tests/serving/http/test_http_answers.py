"""Answers over HTTP are those that the decoder gives offline, whole and as streams; what cannot be done is refused."""

import pytest
from http_serving import BASE, TEXTS, client_of, decoder_of, events_of, offline, service_of, written
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memdlm.serving.http.schemas import IGNORED, NEUTRAL, UNABLE
from memdlm.serving.http.streams import Unfolding

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "w1 w2"
MESSAGES = [{"role": "user", "content": "w3 w1"}]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A decoder, and memories of texts, in a folder and by name."""
    folder = tmp_path_factory.mktemp("served")
    decoder = decoder_of(folder)
    memories = {name: written(decoder, text) for name, text in TEXTS.items()}
    for name, saved in memories.items():
        saved.save(folder / "memories" / f"{name}.mem")
    return decoder, memories, folder / "memories"


@pytest.fixture(scope="module")
def client(kept):
    with client_of(service_of(kept[0], kept[2])) as found:
        yield found


def asked(client, path, status=200, **body):
    what = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    reply = client.post(path, json={"model": BASE, **what, **body})
    assert reply.status_code == status, reply.text
    return reply.json()


def texts_of(answer):
    return [each["message"]["content"] if "message" in each else each["text"] for each in answer["choices"]]


@pytest.mark.parametrize("memory", [None, *TEXTS])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_answer_is_the_offline_one_however_its_memory_is_named(client, kept, path, memory):
    decoder, memories, _ = kept
    expected = offline(decoder, MESSAGES if path == CHAT else PROMPT, memories.get(memory))
    ways = [{}, {"model": "models/tiny"}] if memory is None else [{"model": memory}, {"model": f"{BASE}:{memory}"}]
    ways += [] if memory is None else [{"memory": memory}, {"model": memory, "memory": memory}]
    for way in ways:
        answer = asked(client, path, **way)
        assert texts_of(answer) == [expected]
        assert answer["model"] == way.get("model", BASE)
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_memories_make_a_difference(client, kept):
    decoder, memories, _ = kept
    assert len({offline(decoder, PROMPT, saved) for saved in (None, *memories.values())}) > 1


SAMPLED = {"temperature": 0.8, "seed": 5, "max_tokens": 24}


@pytest.mark.parametrize(
    "options",
    [{}, {"model": "alpha", "max_tokens": 9}, {"n": 3, "temperature": 0.9, "seed": 3}, {"stop": ["w1"], **SAMPLED}],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_is_the_whole_answer_in_pieces(client, path, options):
    whole = asked(client, path, **options)
    what = {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
    body = {"model": BASE, **what, **options, "stream": True, "stream_options": {"include_usage": True}}
    reply = client.post(path, json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply.text)
    assert {each["id"] for each in events} == {events[0]["id"]}
    assert events[-1]["usage"] == whole["usage"]
    assert events[-1]["choices"] == []
    texts, ends = {}, {}
    for event in events[:-1]:
        (choice,) = event["choices"]
        assert event["usage"] is None
        piece = choice["delta"].get("content", "") if path == CHAT else choice["text"]
        texts[choice["index"]] = texts.get(choice["index"], "") + piece
        if choice["finish_reason"] is not None:
            ends[choice["index"]] = choice["finish_reason"]
    assert [texts[place] for place in sorted(texts)] == texts_of(whole)
    assert [ends[place] for place in sorted(ends)] == [each["finish_reason"] for each in whole["choices"]]


def test_the_first_of_several_answers_is_the_one_that_its_seed_gives_alone(client, kept):
    many = texts_of(asked(client, TEXT, n=3, **SAMPLED))
    again = texts_of(asked(client, TEXT, n=2, **SAMPLED))
    assert many[:2] == again
    changes = {"temperature": 0.8, "max_new_tokens": 24}
    assert many[0] == offline(kept[0], PROMPT, seed=5, **changes)
    assert len(set(many)) > 1


def test_several_prompts_are_answered_in_order(client, kept):
    decoder = kept[0]
    prompts = ["w1", "w2 w3", "w4"]
    assert texts_of(asked(client, TEXT, prompt=prompts)) == [offline(decoder, each) for each in prompts]
    ids = [decoder.tokenizer(each, add_special_tokens=False)["input_ids"] for each in prompts]
    assert texts_of(asked(client, TEXT, prompt=ids)) == texts_of(asked(client, TEXT, prompt=prompts))
    assert texts_of(asked(client, TEXT, prompt=ids[1])) == [offline(decoder, prompts[1])]


def test_the_steps_of_a_stream_lead_to_its_answer(client, kept):
    tokenizer = kept[0].tokenizer
    body = {"model": "alpha", "prompt": PROMPT, "stream": True, "stream_options": {"include_steps": True}}
    canvas, text, steps = {}, "", 0
    for event in events_of(client.post(TEXT, json=body).text):
        told = event.get("memdlm")
        if told is not None:
            steps += 1
            canvas |= dict(told["changes"])
        text += event["choices"][0]["text"]
    assert steps > 1
    ids = [tokenizer.convert_tokens_to_ids(canvas[place]) for place in sorted(canvas)]
    assert sorted(canvas) == list(range(len(canvas)))
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith(text)
    assert text


@pytest.mark.parametrize("field", UNABLE)
def test_what_cannot_be_done_is_refused_by_name(client, field):
    asks = {"logprobs": 0, "best_of": 2, "metadata": {"a": "b"}, "response_format": {"type": "json_object"}}
    for value in (asks.get(field, 1.5), "x"):
        error = asked(client, TEXT, 400, **{field: value})["error"]
        assert error["param"] == field
        assert UNABLE[field] in error["message"]
    for value in (None, *NEUTRAL.get(field, ())):
        asked(client, TEXT, max_tokens=1, **{field: value})


def test_what_never_changes_an_answer_is_taken(client):
    asked(client, TEXT, max_tokens=1, **dict.fromkeys(IGNORED, "x"))


BAD = {
    "not JSON": ("{", 400, None),
    "no model": ({"prompt": "w1"}, 400, "model"),
    "unknown model": ({"model": "nobody", "prompt": "w1"}, 404, "model"),
    "unknown memory": ({"memory": "nobody", "prompt": "w1"}, 404, "model"),
    "two memories": ({"model": "alpha", "memory": "beta", "prompt": "w1"}, 400, "memory"),
    "a path": ({"model": "../memories/alpha.mem", "prompt": "w1"}, 404, "model"),
    "a zero byte": ({"model": "alpha\0", "prompt": "w1"}, 404, "model"),
    "unknown field": ({"prompt": "w1", "tempature": 1}, 400, "tempature"),
    "half a character": ({"prompt": "\ud800"}, 400, None),
    "no prompt": ({"prompt": ""}, 400, None),
    "no prompts": ({"prompt": []}, 400, "prompt"),
    "no token": ({"prompt": [10**9]}, 400, None),
    "no number": ({"prompt": "w1", "temperature": float("nan")}, 400, None),
    "cold": ({"prompt": "w1", "temperature": -1}, 400, None),
    "a switch": ({"prompt": "w1", "max_tokens": True}, 400, "max_tokens"),
    "no tokens": ({"prompt": "w1", "max_tokens": 0}, 400, "max_tokens"),
    "many tokens": ({"prompt": "w1", "max_tokens": 10**6}, 400, "max_tokens"),
    "many answers": ({"prompt": "w1", "n": 9}, 400, "n"),
    "a long prompt": ({"prompt": "w1 " * 20000}, 400, None),
    "idle": ({"prompt": "w1", "max_post_steps": 3}, 400, None),
    "conflict": ({"prompt": "w1", "steps": 2, "steps_per_block": 2}, 400, None),
    "no stream": ({"prompt": "w1", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    "deep": ('{"model": ' + "[" * 100000, 400, None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_an_error_in_openais_form(client, name):
    body, status, param = BAD[name]
    import json

    sent = body if isinstance(body, str) else json.dumps({"model": BASE, **body} if name != "no model" else body)
    reply = client.post(TEXT, content=sent, headers={"Content-Type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    if param is not None:
        assert error["param"].split(".")[0] == param


def test_a_conversation_needs_a_template_and_texts(client):
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    error = asked(client, CHAT, 400, messages=[{"role": "user", "content": image}])["error"]
    assert error["param"].startswith("messages.0.content")
    parts = [{"type": "text", "text": "w3 "}, {"type": "text", "text": "w1"}]
    assert texts_of(asked(client, CHAT, messages=[{"role": "user", "content": parts}])) == texts_of(asked(client, CHAT))


def test_models_lists_the_model_first_then_the_memories(client):
    cards = client.get("/v1/models").json()["data"]
    assert [(each["id"], each["parent"]) for each in cards] == [(BASE, None), *((name, BASE) for name in sorted(TEXTS))]
    assert cards[0]["root"] == "models/tiny"
    assert client.get("/v1/models/beta").json() == cards[2]
    assert client.get("/v1/models/none").status_code == 404


def test_the_figures_have_the_names_that_dashboards_read(client):
    asked(client, TEXT, max_tokens=4)
    page = client.get("/metrics").text
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "time_to_first_token_seconds_count"),
        *("inter_token_latency_seconds_count", "e2e_request_latency_seconds_count", "prompt_tokens_total"),
        *("generation_tokens_total", "request_success_total"),
    ):
        assert f"\nvllm:{name}{{" in page
    for name in ("steps_per_block_count", "live_memories", "memory_bytes"):
        assert f"\nmemdlm:{name}{{" in page
    assert all(name not in page for name in TEXTS), "names of memories may be secrets"


# Texts that grow. ---------------------------------------------------------------------------------------------------


def bytes_tokenizer():
    """Every byte is a token, so characters are cut anywhere."""
    vocabulary = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    found = Tokenizer(models.BPE(vocabulary, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, clean_up_tokenization_spaces=False)


BYTES = bytes_tokenizer()


@given(
    text=st.text(alphabet="ab \u00e9\u20ac\U0001f600", max_size=20),
    stops=st.lists(st.text(alphabet="ab \u20ac", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_a_growing_text_is_never_taken_back(text, stops, data):
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    whole = text
    for end in range(len(text) + 1):  # as if one character came after the other
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            whole = text[: end - max(map(len, complete))]
            break
    unfolding, seen, start = Unfolding(BYTES, (999,), stops), "", 0
    while start < len(ids):
        size = data.draw(st.integers(1, 5))
        seen += unfolding.more(ids[start : start + size])
        assert whole.startswith(seen)
        start += size
    assert seen + unfolding.rest(whole) == whole


def test_nothing_follows_an_end_token():
    unfolding = Unfolding(BYTES, (999,), ())
    ids = BYTES("ab", add_special_tokens=False)["input_ids"]
    assert unfolding.more([ids[0], 999, ids[1]]) == "a"
    assert unfolding.more(ids) == ""
