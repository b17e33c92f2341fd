"""Recall from memory alone: what the learned memory must reach, and what the others do not."""

import pytest
import torch

from memdlm.data.synthetic import KeyValueRecall
from memdlm.errors import ConfigError
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms, closed_book
from memdlm.workflows.studies.recall_study import recall_data, run_arm


@pytest.mark.parametrize("make", [RecallPlan, closed_book], ids=["kept", "dropped"])
def test_every_arm_runs_and_is_measured_with_memory_on_and_off(make):
    task = KeyValueRecall(wording="symbols", num_pairs=2, num_keys=4, num_values=4, num_questions=2, is_adjacent=True)
    plan = make(task=task, train_length=8, times=(1, 2), num_train=8, num_eval=2, steps=2, batch_size=4, rank=2)
    data = recall_data(plan)
    for name, config in arms(plan).items():
        row = run_arm(plan, data, config, seed=0)
        assert [(each["length"], each["memory"]) for each in row["accuracy"]] == [
            (8, True),
            (8, False),
            (16, True),
            (16, False),
        ]
        words, before, after, is_value = row["written"].values()
        assert len(words) == len(before) == len(after) == len(is_value) >= 8
        assert sum(is_value) >= 2
        if name == OURS:
            assert before != after


def test_a_schedule_says_how_long_the_contexts_of_each_step_are():
    task = KeyValueRecall(wording="symbols", num_pairs=2, num_keys=4, num_values=4, num_questions=2, is_adjacent=True)
    small = {"task": task, "train_length": 8, "times": (1,), "num_train": 8, "num_eval": 2, "batch_size": 4, "rank": 2}
    plan = closed_book(steps=10, schedule=((0.5, 1), (0.3, 2), (0.2, 4)), **small)
    assert plan.stages() == [(5, 8), (3, 16), (2, 32)]
    lengths = [len(row["context_ids"]) for row in recall_data(plan).train]
    assert lengths == [8] * 20 + [16] * 12 + [32] * 8
    assert RecallPlan().stages() == [(180, 36), (20, 144)]
    assert closed_book().stages() == [(350, 36), (40, 144), (10, 576)]
    assert closed_book(steps=3).stages() == [(3, 36), (0, 144), (0, 576)]
    for wrong in (((0.5, 1),), ((1.2, 1), (-0.2, 4)), ()):
        with pytest.raises(ConfigError, match="shares must be above 0 and sum to 1"):
            RecallPlan(schedule=wrong)


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_a_memory_that_learned_to_be_written_recalls_a_document_that_is_gone():
    """Context dropped, 400 steps, three seeds: the means."""
    plan = closed_book(times=(1, 4))
    data = recall_data(plan)
    rows = [a for seed in (0, 1, 2) for a in run_arm(plan, data, arms(plan)[OURS], seed)["accuracy"]]
    for length, least in ((36, 0.97), (144, 0.95)):
        found = [a["accuracy"] for a in rows if a["length"] == length and a["memory"]]
        assert sum(found) / 3 >= least
    assert all(a["accuracy"] < 0.1 for a in rows if not a["memory"])


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_a_memory_that_learned_to_be_written_recalls_what_attention_cannot_reach():
    """Sliding window 4, 200 steps, three seeds: the means; standard MDLM stays at chance."""
    plan = RecallPlan()
    data = recall_data(plan)
    rows = [run_arm(plan, data, arms(plan)[OURS], seed) for seed in (0, 1, 2)]
    baseline = run_arm(plan, data, None, 0)

    def mean(length, is_on):
        found = [a["accuracy"] for r in rows for a in r["accuracy"] if (a["length"], a["memory"]) == (length, is_on)]
        return sum(found) / len(found)

    assert mean(36, True) >= 0.97
    assert mean(144, True) >= 0.95
    assert mean(576, True) >= 0.80
    assert all(mean(length, False) < 0.1 for length in data.by_length)
    assert all(each["accuracy"] < 0.1 for each in baseline["accuracy"] if not each["memory"])
