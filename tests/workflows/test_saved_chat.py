"""/save writes a conversation, again where this one was saved, and over nothing else."""

import json
from types import SimpleNamespace

import pytest

from memdlm.data.records import read_records
from memdlm.errors import ConfigError, MemDLMError
from memdlm.workflows.sessions.chat import COMMANDS, ChatOptions


@pytest.fixture
def chat():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    return SimpleNamespace(options=ChatOptions(), turns=turns, saved=set())


def test_a_conversation_is_saved_again_and_another_only_when_that_is_asked_for(chat, tmp_path):
    path = tmp_path / "talk.jsonl"
    assert COMMANDS["/save"](chat, str(path)) == f"saved to {path}"
    chat.turns.append({"role": "user", "content": "more"})
    COMMANDS["/save"](chat, str(path))
    assert read_records(path)[0]["messages"] == chat.turns
    other = SimpleNamespace(options=ChatOptions(), turns=[], saved=set())
    with pytest.raises(ConfigError, match="add --overwrite in front of the name"):
        COMMANDS["/save"](other, str(path))
    assert read_records(path)[0]["messages"] == chat.turns
    COMMANDS["/save"](other, f"--overwrite {path}")
    assert json.loads(path.read_text())["messages"] == []


@pytest.mark.parametrize("text", ["thesis", '{"messages": []}', "[]", '{"messages": [], "saved_by": "me"}', "\x00"])
def test_nobodys_conversation_is_replaced(text, chat, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text)
    for flag in ("", "--overwrite "):
        with pytest.raises(ConfigError, match="it replaces only what it made itself"):
            COMMANDS["/save"](chat, f"{flag}{path}")
    assert path.read_text() == text
    with pytest.raises(MemDLMError, match="takes a file name"):
        COMMANDS["/save"](chat, "--overwrite")
