"""Laws of every synthetic task: seeded, any length, answerable from the context, chance as stated."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memdlm.data import TASKS, build_word_tokenizer, encode_chat, exact_match
from memdlm.errors import DataError

tasks = pytest.mark.parametrize("name", sorted(TASKS))
LENGTH = 80


def context_and_questions(sample):
    users = [message["content"].split() for message in sample.messages if message["role"] == "user"]
    return users[0][:LENGTH], [users[0][LENGTH:], *users[1:]]


@tasks
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 40))
def test_a_sample_has_the_length_asked_for_and_answers_of_the_vocabulary(name, seed, extra):
    task = TASKS[name]()
    sample = task.records(1, LENGTH + extra, seed)[0]
    first, *rest = sample.messages[0]["content"].split()
    words = {word for message in sample.messages for word in message["content"].split()}
    assert len([first, *rest]) > LENGTH + extra
    assert words <= set(task.words())
    answers = [message["content"] for message in sample.messages if message["role"] == "assistant"]
    assert tuple(answers) == sample.answers
    assert len(answers) == len(sample.messages) / 2


@tasks
def test_the_same_seed_gives_the_same_samples_and_each_depends_on_its_index_alone(name):
    task = TASKS[name]()
    assert task.records(5, LENGTH, 3) == task.records(5, LENGTH, 3)
    assert task.records(5, LENGTH, 3)[:2] == task.records(2, LENGTH, 3)
    assert task.records(5, LENGTH, 3) != task.records(5, LENGTH, 4)


@tasks
def test_facts_that_do_not_fit_are_refused(name):
    with pytest.raises(DataError, match=rf"{name}: the facts need \d+ words, the context has 3"):
        TASKS[name]().records(1, 3, 0)


def solve(name, context, question):
    """Answer from the text alone, by the rule that the task states."""
    if name == "kv":
        return context[context.index(question[0]) + 2]
    if name == "multi_value":
        return " ".join(context[i + 1] for i, word in enumerate(context[:-1]) if word == question[-1])
    if name == "variable_tracking":
        wanted = question[-1]
        while not wanted.startswith("v"):
            wanted = next(context[i + 2] for i, w in enumerate(context[:-2]) if w == "let" and context[i + 1] == wanted)
        return wanted
    if name == "common_words":
        listed = [word for word in context if word.startswith("w") and word[1:].isdigit()]
        top = sorted(set(listed), key=listed.count)[-2:]
        return " ".join(sorted(top, key=lambda word: int(word[1:])))
    who = question[-1]
    if name == "two_facts":
        who = context[context.index(who) - 2]
    return [context[i + 3] for i, word in enumerate(context[:-3]) if word == who and context[i + 1] == "went"][-1]


@tasks
def test_the_context_holds_the_answer(name):
    for sample in TASKS[name]().records(40, LENGTH, seed=11):
        context, questions = context_and_questions(sample)
        for question, answer in zip(questions, sample.answers, strict=True):
            assert exact_match(answer, solve(name, context, question)), (question, context)


@tasks
def test_guessing_scores_the_stated_chance(name):
    """Guess the answer of another sample: the same form, without information."""
    task = TASKS[name]()
    if task.chance < 1 / 100:
        # Too rare to measure by guessing: count the possible answers instead.
        small = {"multi_value": {"num_values": 4, "values_per_key": 2}, "common_words": {"num_words": 10}}[name]
        task = dataclasses.replace(task, **small)
    answers = [sample.answers[0] for sample in task.records(1500, LENGTH, seed=5)]
    generator = torch.Generator().manual_seed(0)
    others = [answers[i] for i in torch.randperm(len(answers), generator=generator).tolist()]
    hits = sum(map(exact_match, answers, others)) / len(answers)
    error = (task.chance * (1 - task.chance) / len(answers)) ** 0.5
    assert abs(hits - task.chance) < 5 * error + 0.2 * task.chance


@tasks
def test_the_word_tokenizer_takes_one_token_per_word_and_back(name):
    task = TASKS[name]()
    tokenizer = build_word_tokenizer(task.words())
    sample = task.records(1, LENGTH, 0)[0]
    text = sample.messages[0]["content"]
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.split())
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in encode_chat(tokenizer, sample.messages, train_turns="all").input_ids


def test_the_word_tokenizer_survives_a_folder(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = build_word_tokenizer(["a", "b"])
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b"}]
    assert encode_chat(again, messages) == encode_chat(tokenizer, messages)
    assert (again.mask_token, again.pad_token, again.eos_token) == ("<|mask|>", "<|endoftext|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("answer", "predicted", "hit"), [("a b", " a  b ", True), ("a b", "a", False), ("a", "b", False), ("", "", True)]
)
def test_exact_match_ignores_spacing_only(answer, predicted, hit):
    assert exact_match(answer, predicted) is hit
