"""What of a write is learned: where fast weights start, how far each step goes (Meta-SGD), and how much of each token.

Owned by a `ParametricMemory`, trained by the trainer beside the model, saved beside it as `memory_init.safetensors`
with the memory's options in `memory_init.json`; never part of the model.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from memdlm.errors import CheckpointError, ConfigError
from memdlm.files import replace_files
from memdlm.finite import is_finite
from memdlm.memory.config import FastWeightsConfig, MemoryConfig, WriteConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.inner_loop import Gate
from memdlm.memory.write_gate import WriteGate
from memdlm.models.hub.loading import MEMORY_CONFIG_FILE, MEMORY_FILE
from memdlm.options import from_mapping
from memdlm.randomness import derive
from memdlm.strict_json import check_fields, is_object, is_whole, read_json
from memdlm.types import Ids, Positions

RATES = "log_rates"
GATE = "write_gate."
MOST_LOG_RATE = 50
"""Rates are exponentials: beyond it they are no learning rates."""


@final
class LearnedWrite(nn.Module):
    """Start [1 sample] of every fast weight, the logarithm of every step's learning-rate factor, and a gate.

    The factors are exponentials, so rates stay positive; all are 1 at the beginning, where the start is the adapter's
    own, and so are the gates. Which of them are trained is the configuration's choice; the others stay as they began.
    `width` is that of the states below the first adapted block, which the gate reads.
    """

    def __init__(
        self, config: MemoryConfig, fast: FastWeights, num_updates: int, *keys: int | str, width: int = 0
    ) -> None:
        super().__init__()
        self.config, self.names = config, fast.names()
        drawn = fast.drawn(1, derive("memory start", *keys))
        self.starts = nn.ParameterList([nn.Parameter(each) for each in drawn] if config.learn_start else [])
        rates = torch.zeros(num_updates, len(drawn), dtype=drawn[0].dtype, device=drawn[0].device)
        self.log_rates = nn.Parameter(rates) if config.learn_lr else None
        self.gate = WriteGate(width, like=drawn[0]) if config.write_gate == "learned" else None

    def with_config(self, config: MemoryConfig, fast: FastWeights) -> "LearnedWrite":
        """Return the same parameters for `fast` under `config`; ConfigError if they were learned for something else."""
        check_binding(config, self.config, "of this memory")
        if self.names != fast.names():
            raise ConfigError(
                f"learned belongs to another model: it has {', '.join(self.names[:2])}, ..., and this one's fast "
                f"weights are {', '.join(fast.names()[:2])}, ... Use what was learned for this model, or leave it out."
            )
        other = copy.copy(self)  # of the module alone: its parameters are shared
        other.config = config
        return other

    def start(self) -> list[Tensor] | None:
        """Return one sample's start, in the order of `FastWeights.tensors`; None: the adapter draws it."""
        return list(self.starts) if self.config.learn_start else None

    def rates(self, like: Sequence[Tensor]) -> list[list[Tensor]] | None:
        """Return the factors of the learning rate, for every update one per tensor of `like`; None: all are 1."""
        if self.log_rates is None:
            return None
        factors = self.log_rates.exp()
        return [[factor.to(each) for factor, each in zip(row, like, strict=True)] for row in factors.unbind()]

    def gated(self, below: Callable[[Ids, Positions], Tensor], is_tracked: bool) -> Gate | None:
        """Return what weighs the scored positions, given the states [N, D] `below`; None: all weigh the same."""
        gate = self.gate
        if gate is None:
            return None

        def gates(ids: Ids, positions: Positions) -> Tensor:
            with torch.set_grad_enabled(is_tracked):
                found: Tensor = gate(below(ids, positions))
                return found

        return gates

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters as optimizer groups, with their learning rates and without weight decay."""
        groups: list[dict[str, Any]] = []
        if self.config.learn_start:
            groups.append({"params": list(self.starts), "lr": self.config.learned_start_lr, "weight_decay": 0.0})
        if self.log_rates is not None:
            groups.append({"params": [self.log_rates], "lr": self.config.learned_rates_lr, "weight_decay": 0.0})
        if self.gate is not None:
            parameters = list(self.gate.parameters())
            groups.append({"params": parameters, "lr": self.config.write_gate_lr, "weight_decay": 0.0})
        return groups

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self._own().items()}

    def _own(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(zip(self.names, self.starts, strict=True)) if self.config.learn_start else {}
        if self.log_rates is not None:
            found[RATES] = self.log_rates
        if self.gate is not None:
            found |= {GATE + name: tensor for name, tensor in self.gate.named_parameters()}
        return found

    def save(self, folder: str | Path) -> None:
        """Write `memory_init.safetensors` and the memory's options into `folder`."""
        options = {"format": 1, "config": dataclasses.asdict(self.config)}
        replace_files(
            {
                Path(folder) / MEMORY_FILE: save(self.tensors()),
                Path(folder) / MEMORY_CONFIG_FILE: (json.dumps(options, indent=2) + "\n").encode(),
            }
        )

    @torch.no_grad()
    def load(self, folder: str | Path) -> None:
        """Take over what `save` wrote.

        Raises ConfigError when it was learned for a memory with other options, CheckpointError when the files are
        missing or do not fit the model.
        """
        check_binding(self.config, saved_config(folder), f"in {folder}")
        path = Path(folder) / MEMORY_FILE
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: could not be read: {error}") from error
        own = self._own()
        sizes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        read = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if sizes != read:
            wrong = sorted(name for name in {*sizes, *read} if sizes.get(name) != read.get(name))
            raise CheckpointError(
                f"{path} was learned for another model: {', '.join(wrong[:4])} are missing, unknown or of another size."
            )
        for name in own:
            if not found[name].is_floating_point() or not bool(is_finite(found[name])):
                raise CheckpointError(f"{path}: {name} holds something else than finite numbers; train the start anew.")
        if RATES in own and bool(found[RATES].abs().max() > MOST_LOG_RATE):
            raise CheckpointError(
                f"{path}: {RATES} goes beyond +-{MOST_LOG_RATE}, which no training leaves; it diverged."
            )
        for name, tensor in own.items():
            tensor.copy_(found[name])


def check_binding(config: MemoryConfig, learned_with: MemoryConfig, where: str) -> None:
    """Raise ConfigError if `config` would write in another way than a start that was learned with `learned_with`."""
    for name in _binding():
        if getattr(learned_with, name) != getattr(config, name):
            raise ConfigError(
                f"mem_{name}={getattr(config, name)!r}, but the start and rates {where} were learned with "
                f"{getattr(learned_with, name)!r}; a memory is read as it was trained to be written. Use the saved "
                "options (ParametricMemory without a configuration), or set mem_learn_start=False, "
                "mem_learn_lr=False and mem_write_gate=none."
            )


def _binding() -> list[str]:
    """Return the options that say how a prompt is written and read: a start is used with those it was trained with."""
    fields = (*dataclasses.fields(FastWeightsConfig), *dataclasses.fields(WriteConfig))
    return [field.name for field in fields if not field.metadata["adjustable"]]


def saved_config(folder: str | Path) -> MemoryConfig:
    """Return the options of the memory whose start or rates lie in `folder`; raises CheckpointError without them."""
    path = Path(folder) / MEMORY_CONFIG_FILE
    try:
        options = read_json(path)
        check_fields(options, {"format": lambda value: is_whole(value, 1, 1), "config": is_object}, "it")
        return from_mapping(MemoryConfig, options["config"], "memory")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: could not be read: {error}") from error
