"""The content of `report.json`: the classes declare its fields and what they may hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memdlm.report.records import Record, checked, read


@dataclass(frozen=True, kw_only=True)
class Task(Record):
    """A task. `chance` and `train_length` are None only for results of other programs that do not give them."""

    name: str
    description: str
    chance: float | None = checked(least=0, most=1)
    train_length: int | None = checked(least=1)
    lengths: tuple[int, ...] = checked(least=1)
    num_questions: int


@dataclass(frozen=True, kw_only=True)
class Accuracy(Record):
    """The share of questions that one model answers correctly at one length."""

    model: str
    seed: int
    memory: bool
    length: int = checked(least=1)
    accuracy: float = checked(least=0, most=1)
    questions: int


@dataclass(frozen=True, kw_only=True)
class Bias(Record):
    """Exposure bias of one model: nats per token at every decoding step."""

    model: str
    seed: int
    memory: bool
    step: tuple[int, ...]
    static: tuple[float, ...] = checked(per="step")
    sequential: tuple[float, ...] = checked(per="step")
    matched: tuple[float, ...] = checked(per="step")


@dataclass(frozen=True, kw_only=True)
class Curve(Record):
    """Training and evaluation losses by optimizer step."""

    step: tuple[int, ...]
    loss: tuple[float, ...] = checked(per="step")
    eval_step: tuple[int, ...]
    eval_nll: tuple[float, ...] = checked(per="eval_step")
    eval_nll_memory: tuple[float, ...] = checked(per="eval_step", may_be_empty=True)


@dataclass(frozen=True, kw_only=True)
class RecallCurve(Record):
    """Training losses by optimizer step, without memory and with the memory that training writes."""

    step: tuple[int, ...]
    loss: tuple[float, ...] = checked(per="step")
    nll: tuple[float, ...] = checked(per="step")
    nll_memory: tuple[float, ...] = checked(per="step", may_be_empty=True)


@dataclass(frozen=True, kw_only=True)
class Written(Record):
    """One prompt, word by word: its loss before and after it was written."""

    words: tuple[str, ...]
    before: tuple[float, ...] = checked(per="words")
    after: tuple[float, ...] = checked(per="words")
    is_value: tuple[bool, ...] = checked(per="words")


@dataclass(frozen=True, kw_only=True)
class Trained(Record):
    """One model and its training."""

    model: str
    seed: int
    parameters: int
    steps: int
    seconds: float
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Model(Trained):
    """A model of the main part."""

    curve: Curve


@dataclass(frozen=True, kw_only=True)
class RecallModel(Trained):
    """A model of the part about recall."""

    curve: RecallCurve
    written: Written | None = None


@dataclass(frozen=True, kw_only=True)
class Part(Record):
    """What tables and figures read. Subclasses narrow the type of `models`."""

    task: Task
    seeds: tuple[int, ...]
    models: tuple[Any, ...]
    accuracy: tuple[Accuracy, ...] = checked(once=("model", "seed", "memory", "length"))
    exposure_bias: tuple[Bias, ...] = checked(once=("model", "seed", "memory"))
    about: Mapping[str, str] | None = None
    """By model, how it was trained, in one sentence; None in reports of earlier versions."""

    def model_names(self) -> list[str]:
        """Return every model, in the order in which it first appears."""
        return list(dict.fromkeys(row.model for row in (*self.models, *self.accuracy, *self.exposure_bias)))


@dataclass(frozen=True, kw_only=True)
class Recall(Part):
    """The part that `memdlm demo` measures first: recall from memory alone."""

    floor: float
    leak: tuple[str, ...]
    """The models whose training losses are drawn."""
    models: tuple[RecallModel, ...] = checked(once=("model", "seed"))


@dataclass(frozen=True, kw_only=True)
class Machine(Record):
    """The machine that measured."""

    cores: int
    torch: str
    python: str
    device: str | None = None
    """None in old reports, which were all measured on CPUs."""


@dataclass(frozen=True, kw_only=True)
class Seconds(Record):
    """Wall-clock time, in total and by phase."""

    total: float
    others: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Report(Part):
    """What `memdlm demo` measured."""

    title: str
    version: str
    date: str
    command: str
    quick: bool
    notes: tuple[str, ...]
    machine: Machine
    seconds: Seconds
    models: tuple[Model, ...] = checked(once=("model", "seed"))
    recall: Recall | None = None
    """None in reports of earlier versions."""
    tries: tuple[str, ...] | None = None
    """Commands to try with the models of this run; None if it was interrupted."""


def check_report(report: Mapping[str, Any]) -> Report:
    """Return `report`, given in JSON types, as a record; lists may be empty, and unknown fields are kept.

    Raises DataError, which names the field, for a value that is missing or of the wrong type.
    """
    return read(Report, report, "report")
