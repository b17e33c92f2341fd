"""PAPL in the Trainer: another loss and another gradient, the same honest bound."""

import pytest
from test_trainer import rows_of, trained

from memdlm.errors import ConfigError
from memdlm.training import TrainingArguments
from tiny import tiny


@pytest.mark.parametrize("memory", [False, True])
def test_the_planner_changes_the_loss_and_not_the_bound(memory, tmp_path):
    model, rows = tiny("small"), rows_of(8)
    plain = trained(tmp_path, model, rows, max_steps=1, mem_enabled=memory)
    planned = trained(tmp_path, model, rows, max_steps=1, mem_enabled=memory, planner_weight=2.0)
    first, second = plain.state.log_history[0], planned.state.log_history[0]
    # Computed in another way (without a planner, beside the gradient): the same up to float32's rounding.
    assert first["nll"] == pytest.approx(second["nll"], rel=1e-6)
    assert first["loss"] < second["loss"] < 3 * first["loss"]
    assert first["grad_norm"] != second["grad_norm"]


def test_a_temperature_without_a_planner_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"planner_temperature=0\.5 has no effect without planner_weight"):
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, planner_temperature=0.5)
