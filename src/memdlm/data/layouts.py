"""The column layouts that are read as conversations or texts, and the treatment of all other columns.

A row is read as the first of these that it has: a list of turns, a question with its answer, a text. Columns that
change what a model is shown are used as their name says, or refused. Others (`id`, `source`, ...) are ignored.
"""

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from memdlm.data.turns import MARKS, is_empty
from memdlm.errors import ConfigError, DataError, did_you_mean

TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
"""Columns with a list of turns: role and content, or from and value."""
QUESTIONS = ("prompt", "instruction", "question", "query")
ANSWERS = ("response", "output", "completion", "answer")
"""Columns of one-turn conversations: any one question with any one answer."""
SYSTEMS = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "ai", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    "system": "system",
}
"""Names of speakers in datasets, and the roles they mean; `call`: the assistant calls a tool."""
REFUSED = {
    **dict.fromkeys(("chosen", "rejected"), "preferences are not learned here"),
    **dict.fromkeys(
        ("image", "images", "audio", "audios", "video", "videos"), "only text is learned, and the rest would be lost"
    ),
    **dict.fromkeys(("documents", "choices", "options", "files"), "it is not defined how they are shown"),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "chain_of_thought", "cot"),
        "it is not defined how reasoning is shown; put it into the assistant's message",
    ),
    **dict.fromkeys(("tool_calls", "function_call"), "calls belong into the assistant's message"),
    "chat_template_kwargs": "templates are rendered without arguments of their own",
}
"""Columns that would change what is learned and are not supported, with the reason."""
WEIGHTS = (*MARKS, "loss_weight", "sample_weight")
"""Columns that weigh a whole row: only the value 1, or no value, changes nothing."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The names of columns, and the column that is no part of the conversation."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """The data's name -> our name; an empty name leaves the column out."""
    context: str | None = None
    """Name of the column that is kept as it is (`context_column`)."""

    def apply(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row under our names. Raises DataError when two columns would have the same name."""
        if not self.renamed:
            return dict(row)
        found: dict[str, Any] = {}
        for name in sorted(row, key=lambda name: name not in self.renamed):
            ours = self.renamed.get(name, name)
            if ours in found and not is_empty(row[name]):
                raise DataError(
                    f"column_map: {ours!r} is a column already; leave it out with {ours}=, or choose another name."
                )
            if ours and ours not in found:
                found[ours] = row[name]
        return found


def parse_column_map(text: str | None) -> dict[str, str]:
    """Read `question=prompt,answer=response`. Raises ConfigError for anything else, and for names given twice."""
    renamed: dict[str, str] = {}
    for entry in (text or "").split(","):
        name, equals, ours = (part.strip() for part in entry.partition("="))
        if not name and not equals and not text:
            continue
        if not name or not equals or "=" in ours:
            raise ConfigError(
                f"column_map: {entry.strip()!r} is not NAME=OURS. Write question=prompt,answer=response; NAME= leaves "
                "a column out."
            )
        if name in renamed or (ours and ours in renamed.values()):
            raise ConfigError(f"column_map: {text!r} names {name if name in renamed else ours!r} twice.")
        renamed[name] = ours
    return renamed


def check_mapped(renamed: Mapping[str, str], found: set[str], where: str) -> None:
    """Raise DataError for a mapped column that no row has."""
    for name in renamed:
        if name not in found:
            raise DataError(
                f"column_map: {where} has no column {name!r}; it has {', '.join(sorted(found))}."
                f"{did_you_mean(name, found)}"
            )


def to_conversation(row: Any, where: str, columns: Columns | None = None) -> dict[str, Any]:
    """Return a row with `messages` (and perhaps `tools`), or with `text`, and its other columns as they are.

    Raises DataError, which says `where` the row is, for a row of no known layout or of several, and for a column that
    would change what is learned and is not supported.
    """
    return read_row(row, where, columns)[0]


def read_row(row: Any, where: str, columns: Columns | None = None) -> tuple[dict[str, Any], set[str]]:
    """Do what `to_conversation` does, and also return the names of the columns that were used."""
    columns = Columns() if columns is None else columns
    if not isinstance(row, Mapping):
        raise DataError(f"dataset: {where} is a {type(row).__name__}, not a row with columns.")
    try:
        named = columns.apply(row)
        context = {} if columns.context not in named else {str(columns.context): named.pop(str(columns.context))}
        _refuse(named)
        found = _turns(named) or _answered(named) or _text(named)
    except DataError as error:
        raise DataError(f"dataset: {where}: {error}") from error
    if found is None:
        whole = {**named, **context}
        if context and (_turns(whole) or _answered(whole) or _text(whole)):
            raise DataError(
                f"dataset: {where}: context_column={str(columns.context)!r} is a column of the conversation itself. "
                "Name the column with the text that the memory is written from."
            )
        raise DataError(f"dataset: {where} {_unknown(row)}")
    conversation, used = found
    rest = {name: value for name, value in named.items() if name not in used and name not in conversation}
    return {**rest, **context, **conversation}, used | set(context)


def _refuse(row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        if name in REFUSED and not is_empty(value):
            raise DataError(f"column {name!r} is not used: {REFUSED[name]}. {_leave_out(name)}")
        if name in WEIGHTS and value is not None and not _is_one(value):
            raise DataError(
                f"column {name!r} is {str(value)[:40]}, but rows are not weighed here; give turns a weight of 0 or 1 "
                f"in their messages. {_leave_out(name)}"
            )
    if isinstance(row.get("label"), bool):
        raise DataError(f"column 'label' is not used: preferences are not learned here. {_leave_out('label')}")


def _is_one(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) and value == 1


def _leave_out(name: str) -> str:
    return f"Leave it out with --column_map {name}=, if it does not matter."


# Layouts: each returns None for a row of another layout. -------------------------------------------------------------

Read = tuple[dict[str, Any], set[str]]


def _turns(row: Mapping[str, Any]) -> Read | None:
    name = _one_of(row, TURNS, "lists of turns", is_given=lambda value: isinstance(_loaded(value), list))
    if name is None:
        return None
    turns = [_turn(each, index) for index, each in enumerate(_loaded(row[name]))]
    if not is_empty(row.get("history")):
        raise DataError(f"columns {name!r} and 'history' are both given. {_leave_out('history')}")
    return _whole(row, turns, {name})


def _answered(row: Mapping[str, Any]) -> Read | None:
    questions = QUESTIONS if any(name in row for name in QUESTIONS) else ("input",)
    asked, answer = (_one_of(row, names, "columns") for names in (questions, ANSWERS))
    if asked is None or answer is None:
        return None
    question, reply, used = row[asked], row[answer], {asked, answer}
    for name, value in ((asked, question), (answer, reply)):
        if not isinstance(value, (str, list)):
            raise DataError(f"{name!r} must be text, got {value!r}.")
    # A 'prompt' is complete: a 'context' beside it is metadata, or meant for `context_column`.
    for name in {"input", "context"} - {asked} - ({"context"} if asked == "prompt" else set()):
        extra = row.get(name)
        used |= {name} & set(row)
        if is_empty(extra):
            continue
        if not isinstance(extra, str) or not isinstance(question, str):
            raise DataError(f"{name!r} must be text beside a text, got {extra!r}. {_leave_out(name)}")
        question = f"{question}\n\n{extra}" if name == "input" else f"{extra}\n\n{question}"
    if asked == "instruction" and isinstance(question, str) and isinstance(reply, str):
        question, reply = question.strip(), reply.strip()  # as published
    history = [*_history(row.get("history")), *_side(question, "user", asked)]
    used |= {"history"} & set(row)
    if not isinstance(question, str):
        # The prompt of a completion is shown, never learned.
        history = [turn | {"train": False} if turn.get("role") == "assistant" else turn for turn in history]
    return _whole(row, [*history, *_side(reply, "assistant", answer)], used)


def _text(row: Mapping[str, Any]) -> Read | None:
    if not isinstance(row.get("text"), str):
        return None
    for name in (*SYSTEMS, *TOOLS, "history"):
        if not is_empty(row.get(name)):
            raise DataError(f"column {name!r} has no place beside a plain 'text'. {_leave_out(name)}")
    if not row["text"].strip():
        raise DataError("'text' is empty.")
    return {"text": row["text"]}, {"text"}


def _whole(row: Mapping[str, Any], turns: list[dict[str, Any]], used: set[str]) -> Read:
    """Put the system prompt before the turns, and tools beside them."""
    said = {name: row[name] for name in SYSTEMS if not is_empty(row.get(name))}
    for name, value in said.items():
        if not isinstance(value, str):
            raise DataError(f"{name!r} must be text, got {value!r}.")
        has_own = bool(turns) and turns[0].get("role") == "system"
        if has_own and turns[0].get("content") != value:
            raise DataError(f"{name!r} is not the system message that the conversation has. {_leave_out(name)}")
        if not has_own:
            turns = [{"role": "system", "content": value}, *turns]
    conversation: dict[str, Any] = {"messages": turns}
    given = [name for name in TOOLS if not is_empty(row.get(name))]
    if len(given) > 1:
        raise DataError(f"columns 'tools' and 'functions' are both given. {_leave_out('functions')}")
    for name in given:
        tools = _loaded(row[name])
        if not isinstance(tools, list) or not all(isinstance(each, Mapping) for each in tools):
            raise DataError(f"{name!r} must be a list of descriptions, got {str(row[name])[:60]!r}.")
        if tools:
            tools = [each if "function" in each else {"type": "function", "function": each} for each in tools]
            conversation["tools"] = tools
    return conversation, used | {name for name in (*SYSTEMS, *TOOLS) if name in row}


# Parts of a row. -----------------------------------------------------------------------------------------------------


def _turn(turn: Any, index: int) -> dict[str, Any]:
    """Return a turn with `role` and `content`."""
    if not isinstance(turn, Mapping):
        raise DataError(f"message {index} needs 'role' and 'content', got {turn!r}.")
    named = dict(turn)
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in named and named.get(ours) is None:
            named[ours] = named.pop(theirs)
    speaker = SPEAKERS.get(str(named.get("role")).lower())
    if speaker == "call":
        call = _loaded(named.get("content"))
        calls = call if isinstance(call, list) else [call]
        if not calls or not all(isinstance(each, Mapping) and "name" in each for each in calls):
            raise DataError(f"message {index} ({named['role']}) must hold a call as JSON, with a 'name'.")
        calls = [{"type": "function", "function": each} for each in calls]
        return {**named, "role": "assistant", "content": "", "tool_calls": calls}
    return named if speaker is None else {**named, "role": speaker}


def _history(history: Any) -> list[dict[str, Any]]:
    """Return earlier turns, from pairs of question and answer or from messages."""
    if is_empty(history):
        return []
    turns: list[dict[str, Any]] = []
    history = _loaded(history)
    for index, each in enumerate(history if isinstance(history, list) else [history]):
        if isinstance(each, Mapping):
            turns.append(_turn(each, index))
        elif isinstance(each, (list, tuple)) and len(each) == 2 and all(isinstance(text, str) for text in each):
            turns += [{"role": "user", "content": each[0]}, {"role": "assistant", "content": each[1]}]
        else:
            raise DataError(f"'history' must hold pairs of question and answer, or messages, got {str(each)[:60]!r}.")
    return turns


def _side(value: Any, role: str, name: str) -> list[dict[str, Any]]:
    """Return the messages of a question or an answer."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not value:
        raise DataError(f"{name!r} has no messages.")
    return [_turn(each, index) for index, each in enumerate(value)]


def _loaded(value: Any) -> Any:
    """Return the value of a JSON text: tables cannot hold lists of different shapes, and keep them as text."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _one_of(
    row: Mapping[str, Any], names: tuple[str, ...], what: str, is_given: Callable[[Any], bool] | None = None
) -> str | None:
    """Return the one of `names` that a row has; raises DataError when several of them have a value."""
    has = [name for name in names if name in row and (is_given is None or is_given(row[name]))]
    full = [name for name in has if not is_empty(row[name])]
    if len(full) > 1:
        raise DataError(
            f"{', '.join(full)} are {what} and only one can be used; leave out the others with --column_map "
            f"{','.join(f'{name}=' for name in full[1:])}."
        )
    return next(iter(full or has), None)


def _unknown(row: Mapping[str, Any]) -> str:
    known = (*TURNS, *QUESTIONS, *ANSWERS, "text")
    close = [f"{name}={found[0]}" for name in map(str, row) if (found := difflib.get_close_matches(name, known, n=1))]
    hint = f" Perhaps --column_map {','.join(close)}?" if close else ""
    return (
        f"has neither a list of 'messages' ({', '.join(TURNS)}) nor a question "
        f"({', '.join(QUESTIONS)}) with an answer ({', '.join(ANSWERS)}), nor a 'text'; it has: "
        f"{', '.join(map(str, row)) or 'nothing'}. Name its columns with --column_map, as in "
        f"--column_map question=prompt,answer=response.{hint}"
    )
