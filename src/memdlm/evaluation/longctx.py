"""The offline long-context suite as lm-eval documents: synthetic tasks at any length, counted in the model's tokens.

One document is one question about one context. `--metadata` chooses what is asked:

    max_seq_lengths   lengths of the context in tokens, e.g. [1024, 4096] or "4k"; default [1024]
    num_samples       contexts per length; each has `num_questions` documents of its own; default 100
    data_seed         a number or a text; contexts of equal seeds are equal
    task_options      per task the fields of its class, e.g. {"kv": {"num_pairs": 8, "num_keys": 24}};
                      "wording": "symbols" gives words without meaning (fact k3 v17) in place of English
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import datasets

from memdlm.data.synthetic import TASKS, Task, exact_match
from memdlm.errors import ConfigError, DataError, unknown
from memdlm.models.hub.tokenizers import load_tokenizer
from memdlm.options import from_mapping
from memdlm.randomness import derive

DEFAULT_LENGTHS = (1024,)
UNITS = {"": 1, "k": 2**10, "m": 2**20}
LONGEST, MOST_SAMPLES = 2**24, 10**6
"""Most tokens of a context, and most contexts per length; more is taken for a typing error."""
Document: TypeAlias = dict[str, Any]
CountTokens: TypeAlias = Callable[[str], int]


def dataset(
    *,
    synthetic_task: str,
    max_seq_lengths: int | str | Sequence[int | str] = DEFAULT_LENGTHS,
    num_samples: int = 100,
    data_seed: int | str = 0,
    task_options: Mapping[str, Mapping[str, Any]] | None = None,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **_others: Any,
) -> dict[str, datasets.Dataset]:
    """Return the documents of one task under "test"; lengths alternate, so that `--limit` keeps some of each.

    lm-eval merges the model's arguments into the metadata: `pretrained` (or `tokenizer`) names the tokenizer, and
    the rest goes to `_others`, unused. Raises ConfigError for unknown tasks, options and lengths, DataError
    when a context is too short for its facts.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or not 1 <= num_samples <= MOST_SAMPLES:
        raise ConfigError(f"num_samples={num_samples!r} must be a whole number from 1 to {MOST_SAMPLES}.")
    if not isinstance(data_seed, int | str):
        raise ConfigError(f"data_seed={data_seed!r} must be a number or a text.")
    if not isinstance(task_options or {}, Mapping) or not all(
        isinstance(e, Mapping) for e in (task_options or {}).values()
    ):
        raise ConfigError(
            f'task_options={task_options!r} must map tasks to options, such as {{"kv": {{"num_pairs": 8}}}}.'
        )
    name = tokenizer or pretrained
    if not name:
        raise ConfigError('no tokenizer to count with; name one: --metadata \'{"tokenizer": "NAME_OR_PATH"}\'.')
    task = make_task(synthetic_task, task_options or {})
    loaded = load_tokenizer(name)

    def count(text: str) -> int:
        return len(loaded(text, add_special_tokens=False)["input_ids"])

    lengths = parse_lengths(max_seq_lengths)
    documents = [
        document
        for index in range(num_samples)
        for length in lengths
        for document in documents_of(task, length, (data_seed, task.name, length, index), count)
    ]
    return {"test": datasets.Dataset.from_list(documents, split=datasets.Split.TEST)}


def make_task(name: str, task_options: Mapping[str, Mapping[str, Any]]) -> Task:
    """Build the task called `name` with its own part of `task_options`."""
    for key in (name, *task_options):
        if key not in TASKS:
            raise ConfigError(unknown("synthetic task", key, TASKS))
    return from_mapping(TASKS[name], task_options.get(name, {}), f"task_options[{name!r}]")


def parse_lengths(given: Any, *, zero: bool = False) -> list[int]:
    """Return lengths in tokens. `given` is one or a list of numbers, or of texts that may end in k or M (1024, 1024^2).

    Raises ConfigError for anything else, for a length below 1 (0 with `zero`) or above `LONGEST`, and for one that is
    named twice.
    """
    items = given if isinstance(given, list | tuple) else str(given).strip("[]").split(",")
    found = [re.fullmatch(r"\s*['\"]?(\d{1,9})(|[kKmM])['\"]?\s*", str(each)) for each in items]
    lengths = [int(each[1]) * UNITS[each[2].lower()] for each in found if each is not None]
    if len(lengths) < len(found) or not lengths:
        raise ConfigError(f"max_seq_lengths={given!r} is no list of lengths; write [1024, 4096] or 4k.")
    if not (0 if zero else 1) <= min(lengths) <= max(lengths) <= LONGEST:
        raise ConfigError(f"max_seq_lengths={given!r}: name at least one length, each from 1 to {LONGEST}.")
    if len(set(lengths)) < len(lengths):
        raise ConfigError(f"max_seq_lengths={given!r} names a length twice; leave one out.")
    return lengths


def documents_of(task: Task, length: int, key: tuple[int | str, ...], count: CountTokens) -> list[Document]:
    """Return one document per question of the sample that `key` draws, with a context of up to `length` tokens.

    If what white space separates is one token, context and questions are those of `task.sample(derive(*key), length)`.
    """
    words = length
    low, high = 0, length  # numbers of words: known to fit, and the most that can fit (a word has at least one token)
    best: list[Document] | None = None
    while low < high or best is None:
        generator = derive(*key)
        facts, questions = task.draw(generator, length)
        needed = sum(map(len, facts))
        if high < needed:
            break
        words = max(words, needed)
        context = " ".join(task.said.place(facts, words, generator, task.name))
        used = count(context)
        if used <= length:
            best, low = [_document(task, length, context, *each) for each in questions], words
        else:
            high = words - 1
        # Guess from the mean tokens per word, within the interval that is left.
        words = min(high, max(low + 1, words * length // max(used, 1)))
    if best is None:
        raise DataError(f"{task.name}: the facts need more than {length} tokens; ask for a longer context.")
    return best


def _document(task: Task, length: int, context: str, question: str, answer: str) -> Document:
    return {"context": context, "question": question, "answer": answer, "length": length, "chance": task.chance}


def process_results(document: Document, results: Sequence[str]) -> dict[str, float]:
    """Return the exact match, as such and under the name of the length, and the chance level."""
    hit = float(exact_match(document["answer"], results[0]))
    return {"exact_match": hit, str(document["length"]): hit, "chance": document["chance"]}
