"""The suite's tasks: every answer follows from the facts, and the settings fit the task."""

import sys
from pathlib import Path

import pytest
import torch

from memdlm.workflows.studies.plans import OURS, arms
from memdlm.workflows.studies.recall_study import recall_data, run_arm

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "study"))

from recall_suite import many_facts, suite


def facts_of(words, marker, widths):
    """The words after every marker, `widths` of them."""
    return [words[place + 1 : place + 1 + widths] for place, word in enumerate(words) if word == marker]


@pytest.mark.parametrize("name", suite())
def test_answers_follow_from_the_facts(name):
    plan = suite()[name]
    samples = plan.task.records(4, plan.train_length, seed="suite")
    assert samples == plan.task.records(4, plan.train_length, seed="suite")
    for sample in samples:
        assert len(sample.answers) == plan.task.num_questions
        assert {len(answer.split()) for answer in sample.answers} == {plan.answer_words}
        asked = [message["content"] for message in sample.messages if message["role"] == "user"]
        words = asked[0].split()
        context, asked[0] = words[: plan.train_length], " ".join(words[plan.train_length :])
        for question, answer in zip(asked, sample.answers, strict=True):
            assert answer == solve(name, context, question.split()[1:])
        assert set(words) <= set(plan.task.words())


def solve(name, context, key):
    """Answer by reading the facts one after the other."""
    if name.startswith("two-word"):
        return next(" ".join(fact[2:]) for fact in facts_of(context, "fact", 4) if fact[:2] == key)
    if name.startswith("filler"):
        after = context[context.index(key[0]) + 1 :]
        return next(word for word in after if word[0] == "v" and word[1:].isdigit())
    if name.startswith("several"):
        values = [fact[1] for fact in facts_of(context, "fact", 2) if fact[0] == key[0]]
        return " ".join(sorted(values, key=lambda value: int(value[1:])))
    facts = dict(facts_of(context, "let" if name.startswith("chain") else "fact", 2))
    if not name.startswith("chain"):
        return facts[key[0]]
    path = [facts[key[0]], facts[facts[key[0]]]]
    return " ".join(path) if "path" in name else path[1]


@pytest.mark.slow
def test_thirty_two_facts_need_a_rank_of_thirty_two():
    """Three seeds: the mean is at least 97 %."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = many_facts(32, 32)
    data = recall_data(plan)
    rows = [run_arm(plan, data, arms(plan)[OURS], seed)["accuracy"] for seed in (0, 1, 2)]
    torch.set_num_threads(threads)
    found = [a["accuracy"] for row in rows for a in row if a["memory"] and a["length"] == plan.train_length]
    assert sum(found) / len(found) >= 0.97
