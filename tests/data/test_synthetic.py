"""Laws of every synthetic task in every wording: seeded, any length, answerable from the context, chance as stated."""

import dataclasses
import hashlib
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memdlm.data import TASKS, build_word_tokenizer, encode_chat, exact_match
from memdlm.data.wording import ENDS, GOODS, PEOPLE, PLACES, SENTENCES, THINGS, WORDINGS
from memdlm.errors import DataError

MADE = {f"{name} in {wording}": task(wording=wording) for name, task in TASKS.items() for wording in WORDINGS}
tasks = pytest.mark.parametrize("name", sorted(MADE))
LENGTH = 80


def read(text):
    """The words of a text as a tokenizer with `sentences` reads them; names keep their capitals."""
    known = set().union(*(task.words() for task in MADE.values()))
    words = [word.rstrip(".?") for word in text.split()]
    return [word if word in known else word.lower() for word in words]


def context_and_questions(sample):
    users = [read(message["content"]) for message in sample.messages if message["role"] == "user"]
    return users[0][:LENGTH], [users[0][LENGTH:], *users[1:]]


@tasks
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 40))
def test_a_sample_has_the_length_asked_for_and_answers_of_the_vocabulary(name, seed, extra):
    task = MADE[name]
    sample = task.records(1, LENGTH + extra, seed)[0]
    first, *rest = sample.messages[0]["content"].split()
    words = {word for message in sample.messages for word in read(message["content"])}
    assert len(sample.context.split()) == LENGTH + extra
    assert len([first, *rest]) > LENGTH + extra
    assert words <= set(task.words())
    answers = [message["content"] for message in sample.messages if message["role"] == "assistant"]
    assert tuple(answers) == sample.answers
    assert len(answers) == len(sample.messages) / 2


@tasks
def test_the_same_seed_gives_the_same_samples_and_each_depends_on_its_index_alone(name):
    task = MADE[name]
    assert task.records(5, LENGTH, 3) == task.records(5, LENGTH, 3)
    assert task.records(5, LENGTH, 3)[:2] == task.records(2, LENGTH, 3)
    assert task.records(5, LENGTH, 3) != task.records(5, LENGTH, 4)


@tasks
def test_facts_that_do_not_fit_are_refused(name):
    with pytest.raises(DataError, match=rf"{MADE[name].name}: the facts need \d+ words, the context has 3"):
        MADE[name].records(1, 3, 0)


def solve(name, context, question):
    """Answer from the text alone, by the rule that the task states."""
    task, english = MADE[name], name.endswith("english")
    if task.name == "kv":
        return context[context.index(question[0]) + 2]
    if task.name == "multi_value":
        return " ".join(b for a, b in itertools.pairwise(context) if a == question[-1])
    if task.name == "variable_tracking":
        wanted, given = question[0 if english else -1], {}
        for at, word in enumerate(context):
            if english and word == "has" and context[at - 2 : at - 1] != ["what"]:
                given[context[at - 1]] = context[at + 2 if context[at + 1] == "what" else at + 1]
            elif word == "let":
                given[context[at + 1]] = context[at + 2]
        while wanted in given:
            wanted = given[wanted]
        return wanted
    if task.name == "common_words":
        listed = [word for word in context if word in task.said.names("listed", task.num_words)]
        top = sorted(set(listed), key=listed.count)[-2:]
        return " ".join(sorted(top) if english else sorted(top, key=lambda word: int(word[1:])))
    who, gap = question[-1], 2 if english else 1
    if task.name == "two_facts":
        who = context[context.index(who) - 1 - gap]
    went = [i for i, pair in enumerate(itertools.pairwise(context)) if pair == (who, "went")]
    return context[went[-1] + 2 + gap]


@tasks
def test_the_context_holds_the_answer(name):
    for sample in MADE[name].records(40, LENGTH, seed=11):
        context, questions = context_and_questions(sample)
        for question, answer in zip(questions, sample.answers, strict=True):
            assert exact_match(answer, solve(name, context, question)), (question, context)


@tasks
def test_guessing_scores_the_stated_chance(name):
    """Guess the answer of another sample: the same form, without information."""
    task = MADE[name]
    if task.chance < 1 / 100:
        # Too rare to measure by guessing: count the possible answers instead.
        small = {"multi_value": {"num_values": 4, "values_per_key": 2}, "common_words": {"num_words": 10}}[task.name]
        task = dataclasses.replace(task, **small)
    answers = [sample.answers[0] for sample in task.records(1500, LENGTH, seed=5)]
    generator = torch.Generator().manual_seed(0)
    others = [answers[i] for i in torch.randperm(len(answers), generator=generator).tolist()]
    hits = sum(map(exact_match, answers, others)) / len(answers)
    error = (task.chance * (1 - task.chance) / len(answers)) ** 0.5
    assert abs(hits - task.chance) < 5 * error + 0.2 * task.chance


@tasks
def test_the_word_tokenizer_takes_one_token_per_word_and_back(name):
    task = MADE[name]
    sample = task.records(1, LENGTH, 0)[0]
    text = sample.messages[0]["content"]
    tokenizer = build_word_tokenizer(task.words(), sentences=task.wording == "english")
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.split())
    assert tokenizer.decode(ids).split() == read(text)
    assert task.wording == "english" or tokenizer.decode(ids) == text
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


def test_symbols_are_those_of_the_recorded_studies():
    """Task by task: the conversations from which the recorded figures were measured."""
    told = repr([(name, task(wording="symbols").records(3, LENGTH, 0)) for name, task in sorted(TASKS.items())])
    assert hashlib.sha256(told.encode()).hexdigest().startswith("9038d645c1b7f527")


def test_a_wording_that_does_not_exist_is_refused():
    with pytest.raises(DataError, match=r"wording 'englisch' is not known.*Did you mean 'english'"):
        TASKS["kv"](wording="englisch")


@pytest.mark.parametrize("name", sorted(TASKS))
def test_english_is_made_of_whole_sentences(name):
    task = TASKS[name]()
    for sample in task.records(20, LENGTH, seed=3):
        assert re.fullmatch(r"([A-Z][A-Za-z ]*\. )*[A-Z][A-Za-z ]*\.", sample.context)
        assert all(re.match(r"[A-Z]", message["content"]) for message in sample.messages[::2])


def test_every_name_of_english_means_one_thing():
    names = {word.lower() for words in (PEOPLE, PLACES, THINGS, GOODS) for word in words}
    assert len(names) == len(PEOPLE) + len(PLACES) + len(THINGS) + len(GOODS)
    filler = {word for sentence in (*SENTENCES, *ENDS) for word in sentence}
    assert not names & filler
    assert [len(sentence) for sentence in ENDS] == list(range(len(ENDS)))
    assert max(map(len, SENTENCES)) <= len(ENDS)
    many = WORDINGS["english"].names("key", 200)
    assert len(set(many)) == 200
