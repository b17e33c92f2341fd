"""Recall from memory alone: what the learned memory must reach, and what the others do not."""

import pytest
import torch

from memdlm.data.synthetic import KeyValueRecall
from memdlm.workflows.recall_study import OURS, RecallPlan, arms, recall_data, run_arm


def test_every_arm_runs_and_is_measured_with_memory_on_and_off():
    task = KeyValueRecall(num_pairs=2, num_keys=4, num_values=4, num_questions=2, is_adjacent=True)
    plan = RecallPlan(task=task, train_length=8, times=(1, 2), num_train=8, num_eval=2, steps=2, batch_size=4, rank=2)
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


@pytest.mark.slow
def test_a_memory_that_learned_to_be_written_recalls_what_attention_cannot_reach():
    """Sliding window 4, 200 steps, three seeds: the means; standard MDLM stays at chance."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = RecallPlan()
    data = recall_data(plan)
    rows = [run_arm(plan, data, arms(plan)[OURS], seed) for seed in (0, 1, 2)]
    baseline = run_arm(plan, data, None, 0)
    torch.set_num_threads(threads)

    def mean(length, is_on):
        found = [a["accuracy"] for r in rows for a in r["accuracy"] if (a["length"], a["memory"]) == (length, is_on)]
        return sum(found) / len(found)

    assert mean(36, True) >= 0.97
    assert mean(144, True) >= 0.95
    assert mean(576, True) >= 0.80
    assert all(mean(length, False) < 0.1 for length in data.by_length)
    assert all(each["accuracy"] < 0.1 for each in baseline["accuracy"] if not each["memory"])
