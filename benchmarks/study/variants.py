"""Variants of the learned memory for tasks that the recall preset does not solve: one change each."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from memdlm.memory import MemoryConfig
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms

PRESET = "recall preset"
CHUNK, OVERLAP = 12, 4
"""Tokens of a chunk, and how many of those before it shows: a fact is cut by no border."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is changed of the memory and of the network."""

    memory: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    rank: int = 1
    """By how much the rank is multiplied."""

    def applied(self, plan: RecallPlan) -> tuple[RecallPlan, MemoryConfig]:
        """Return the plan and the memory of the variant."""
        plan = dataclasses.replace(plan, network={**plan.network, **self.network}, rank=self.rank * plan.rank)
        config = arms(plan)[OURS]
        assert config is not None
        return plan, dataclasses.replace(config, **self.memory)


VARIANTS = {
    PRESET: Variant(),
    "two inner steps": Variant(memory={"num_inner_steps": 2}),
    # The gate reads the state below the first adapted block, so that one block has to stay below: the network gets a
    # third. The next one shows what that alone does, the one after it both blocks of the usual network without a gate.
    "three blocks, two adapted": Variant(memory={"inner_layer_fraction": 0.6}, network={"num_hidden_layers": 3}),
    "three blocks, one adapted": Variant(network={"num_hidden_layers": 3}),
    "both blocks adapted, no write gate": Variant(memory={"inner_layer_fraction": 1.0, "write_gate": "none"}),
    "attention adapted too": Variant(memory={"inner_target_modules": "q_proj,k_proj,v_proj,o_proj,down_proj"}),
    # A delta rule: a later chunk's error is what the fast weights do not predict yet.
    "small chunks, one after the other": Variant(
        memory={"chunk_length": CHUNK, "chunk_overlap": OVERLAP, "chunk_update": "sequential"}
    ),
    "rank doubled": Variant(rank=2),
}
