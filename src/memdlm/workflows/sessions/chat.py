"""A conversation in the terminal: history with a length guard, commands, live denoising, an optional memory."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from rich.console import Console

from memdlm.errors import ConfigError, DataError, MemDLMError, did_you_mean
from memdlm.files import resolved
from memdlm.inference import Decoder, encode_prompts
from memdlm.memory.files.library import find_memory, sources_of
from memdlm.models.networks.sizes import trained_positions
from memdlm.options import option, validate
from memdlm.outputs import output_file
from memdlm.randomness import derive
from memdlm.terminal import printable
from memdlm.workflows.sessions.decoding import OwnWords, Tally, decode
from memdlm.workflows.sessions.reading import Reader, opened, readers_of, saved_memories

Message = dict[str, str]
SAVED_BY, SAVER = "saved_by", "memdlm chat"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a conversation is held."""

    system: str | None = option(None, "System prompt, kept at the start of the conversation.")
    max_context: int | None = option(
        None, "Maximum tokens of history and answer together; unset: the positions the model was trained on.", minimum=2
    )

    def __post_init__(self) -> None:
        validate(self)


@final
@dataclass(slots=True)
class Chat:
    """One conversation, and the cost of its answers so far."""

    decoder: Decoder
    options: ChatOptions
    console: Console
    remembers: bool = False
    """Whether the templated history is written into memory before each answer."""
    seed: int = 0
    trace: str | None = None
    turns: list[Message] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    answers: int = 0
    saved: set[Path] = field(default_factory=set)
    """Files that this conversation was saved to; saving may overwrite these."""
    reader: Reader | None = None
    """The saved memory that every answer reads; None: none."""
    words: OwnWords = field(init=False)

    def __post_init__(self) -> None:
        self.words = OwnWords(self.decoder.tokenizer, lambda line: self._say(f"({line})"))
        self.read(self.reader)

    def read(self, reader: Reader | None) -> None:
        """Let the answers from now on read a saved memory, or none; it takes the place of what the history writes."""
        self.reader = reader
        self.remembers = self.remembers and reader is None
        # What the cache holds is valid below the first block that its memory changes.
        memory = self.decoder.memory if reader is None else reader.memory
        self.decoder = dataclasses.replace(self.decoder, prompt_cache=None).caching(memory)

    def hold(self, lines: Iterator[str]) -> None:
        """Answer `lines` until they end or one of them is /exit, then print the cost."""
        for line in lines:
            text = line.strip()
            if not text:
                continue
            if text.startswith("/"):
                if not self._command(text):
                    break
                continue
            try:
                self.answer(text)
            except KeyboardInterrupt:
                self.turns.pop()
                self._say("(interrupted; the question was removed)")
            except MemDLMError as error:
                self.turns.pop()
                self._say(f"(error: {error})")
        self._say(f"{self.answers} answers: {self.tally.line()}")

    def answer(self, text: str) -> str:
        """Answer one message; both become part of the history."""
        self.words.check([text], "message")
        self.turns.append({"role": "user", "content": text})
        messages = self._fitting()
        decoder = self.decoder if self.remembers else dataclasses.replace(self.decoder, memory=None)
        job = decoder.prepare([messages], [derive("memdlm chat", self.seed, self.answers)])
        with opened([] if self.reader is None else [self.reader]):
            result = decode(job, self.tally, console=self.console, trace=self.trace)
        reply = result.texts[0].strip()
        self.turns.append({"role": "assistant", "content": reply})
        self.answers += 1
        # Not wrapped: wrapping would break lines and code.
        self._say(reply or "(empty)")
        return reply

    def _fitting(self) -> list[Message]:
        """Return the history, with its oldest exchanges dropped until answer and history fit."""
        system = [] if self.options.system is None else [{"role": "system", "content": self.options.system}]
        room, new = self._room(), self.decoder.config.max_new_tokens or 0
        dropped = 0
        while True:
            messages = [*system, *self.turns]
            length = encode_prompts(self.decoder.tokenizer, [messages])[0].numel()
            if room is None or length + new <= room:
                break
            if len(self.turns) <= 1:
                raise DataError(
                    f"the message takes {length} tokens and its answer up to {new}, but there is room for {room}. "
                    "Shorten it, or lower --max_new_tokens."
                )
            del self.turns[:2]
            dropped += 1
        if dropped:
            self._say(f"(the oldest {dropped} exchanges no longer fit and were dropped)")
        return messages

    def _room(self) -> int | None:
        given = self.options.max_context
        return trained_positions(self.decoder.model) if given is None else given

    def _command(self, text: str) -> bool:
        """Run a command; return whether the conversation continues."""
        name, _, argument = text.partition(" ")
        if name not in COMMANDS:
            self._say(f"(unknown command {name}.{did_you_mean(name, COMMANDS)} Possible: {', '.join(COMMANDS)})")
            return True
        try:
            said = COMMANDS[name](self, argument.strip())
        except (MemDLMError, OSError) as error:
            said = f"error: {error}"
        if said is not None:
            self._say(f"({said})")
        return name != "/exit"

    def _say(self, text: str) -> None:
        self.console.print(printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def _new(chat: Chat, argument: str) -> str:
    chat.turns.clear()
    return "new conversation"


def _memory(chat: Chat, argument: str) -> str:
    if argument == "on":
        chat.read(None)
        chat.remembers = True
        return "memory is on: the history is written before each answer"
    if argument == "off":
        chat.read(None)
        chat.remembers = False
        return "memory is off"
    if argument:
        memories = saved_memories([str(find_memory(argument))])
        (reader,) = readers_of(memories, chat.decoder.model, chat.decoder.tokenizer)
        chat.read(reader)
    if chat.reader is not None:
        return f"reading {told(chat.reader)}; /memory off unloads it"
    state = "on: the history is written before each answer" if chat.remembers else "off"
    return f"memory is {state}; /memory FOLDER reads a saved one"


def told(reader: Reader) -> str:
    """Describe a saved memory in a few words."""
    sources = [Path(source["source"]).name for source in sources_of(reader.saved) if "source" in source]
    written = f", written from {', '.join(sources)}" if sources else ""
    return f"{reader.path}: {reader.saved.provenance.get('tokens', 0)} tokens{written}"


def _steps(chat: Chat, argument: str) -> str:
    if not argument.isdigit():
        raise ConfigError(f"/steps takes a number, got {argument!r}.")
    config = dataclasses.replace(chat.decoder.config, steps=int(argument), steps_per_block=None)
    chat.decoder = dataclasses.replace(chat.decoder, config=config)
    return f"{argument} denoising steps per answer"


def _save(chat: Chat, argument: str) -> str:
    flag, _, rest = argument.partition(" ")
    overwrite = flag == "--overwrite"
    name = rest.strip() if overwrite else argument
    if not name:
        raise ConfigError("/save takes a file name.")
    system = [] if chat.options.system is None else [{"role": "system", "content": chat.options.system}]
    # The mark distinguishes the file from the user's own files, which are never replaced.
    text = json.dumps({"messages": [*system, *chat.turns], SAVED_BY: SAVER}, ensure_ascii=False)
    place = resolved(name)
    with output_file(
        place,
        is_saved,
        "conversation",
        overwrite=overwrite or place in chat.saved,
        option="/save",
        flag="--overwrite in front of the name",
    ) as write:
        write((text + "\n").encode())
    chat.saved.add(place)
    return f"saved to {name}"


def is_saved(path: Path) -> bool:
    """Whether a file is what /save writes."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == {"messages", SAVED_BY} and found[SAVED_BY] == SAVER


def _exit(chat: Chat, argument: str) -> None:
    return None


COMMANDS: dict[str, Callable[[Chat, str], str | None]] = {
    "/new": _new,
    "/memory": _memory,
    "/steps": _steps,
    "/save": _save,
    "/exit": _exit,
}
"""Commands, lines that start with a slash; each returns a message for the user."""


def typed(prompt: str) -> Iterator[str]:
    """Yield lines from standard input until it ends or Ctrl-C is pressed at the prompt."""
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            return
