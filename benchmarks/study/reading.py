"""What the two studies of English share: networks by size, and training on a budget.

The network sees the questions of a page alone; its text is written into fast weights (`mem_write_source=context`). The
control is a network of the same size that has the text in sight.
"""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from exercises import HIDDEN_WHOLE, Exercises, ReadingOn
from page_measures import IN_SIGHT, MEMORY, measured_ways
from pages import Corpus, Reader, Stage
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from memdlm.data.collate import Collator
from memdlm.errors import ConfigError
from memdlm.memory.config import MemoryConfig
from memdlm.models.hub.loading import build_model
from memdlm.models.networks.small import SmallDLMConfig
from memdlm.training.arguments import TrainingArguments
from memdlm.training.trainer import MemDLMTrainer
from memdlm.workflows.studies.recall_study import on_one_device

ARMS = (MEMORY, IN_SIGHT)
CURVE_POINTS = 10
TRIAL_STEPS = 5
"""Steps that are timed for every stage, to learn how many the budget holds; their models are thrown away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A network, and how it is trained."""

    network: dict[str, Any]
    learning_rate: float
    """Of a network that begins with random weights; one that can read is trained on with a share of it."""
    batch: int
    rank: int


def _network(width: int, layers: int, heads: int, inner: int, spread: float) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "initializer_range": spread,
    }


SIZES = {
    "smoke": Size(network=_network(24, 2, 2, 32, 0.1), learning_rate=3e-3, batch=4, rank=4),
    "1M": Size(network=_network(128, 3, 4, 352, 0.06), learning_rate=3e-3, batch=16, rank=32),
    "5M": Size(network=_network(256, 5, 8, 704, 0.05), learning_rate=2e-3, batch=16, rank=32),
    "20M": Size(network=_network(448, 8, 8, 1216, 0.04), learning_rate=1e-3, batch=16, rank=48),
    "100M": Size(network=_network(768, 14, 12, 2048, 0.03), learning_rate=6e-4, batch=64, rank=64),
}
"""Parameters outside the vocabulary: 0.6, 4.0, 19.5 and 99 million."""


@final
class Rows:
    """Training rows, made when they are asked for: no document is seen twice, and every seed has its own."""

    def __init__(self, reader: Reader, wanted: "Run", steps: int, stages: Sequence[Stage]) -> None:
        self.reader, self.in_sight, self.batch = reader, wanted.in_sight, wanted.rows
        self.first = wanted.seed * 10**8
        self.stages = [
            stage for stage, count in zip(stages, shared_out(steps, stages), strict=True) for _ in range(count)
        ]

    def __len__(self) -> int:
        return len(self.stages) * self.batch

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return one row as the collator takes it."""
        page = self.reader.corpus.page("train", self.first + index, self.stages[index // self.batch])
        asked = self.reader.ask(page, in_sight=self.in_sight)
        row = {"input_ids": asked.shown.input_ids, "labels": asked.shown.labels}
        return row if self.in_sight else row | {"context_ids": asked.context}


def shared_out(steps: int, stages: Sequence[Stage]) -> list[int]:
    """Return the steps of every stage."""
    ends = [round(sum(each.share for each in stages[: number + 1]) * steps) for number in range(len(stages))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def memory_config(corpus: Corpus, size: Size, targets: str | None = None) -> MemoryConfig:
    """Return a memory that learns to be written, of a text that is gone when questions come."""
    changes = {} if targets is None else {"inner_target_modules": targets}
    return MemoryConfig.recall(
        write_source="context", strides=corpus.strides, inner_rank=size.rank, inner_alpha=2.0 * size.rank, **changes
    )


# Training -----------------------------------------------------------------------------------------------------------


class Budget(TrainerCallback):
    """Notes when every step ended, measures now and then, and ends the training when its seconds are used up."""

    def __init__(self, clock: Callable[[], float], seconds: float | None, every: int, look: Callable[[int], None]):
        self.clock, self.seconds, self.every, self.look = clock, seconds, every, look
        self.start = clock()
        self.ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock, and look at the untrained model."""
        self.start = self.clock()
        self.look(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look every so many steps; stop when the time is over."""
        self.ends.append(self.clock() - self.start)
        if self.seconds is not None and self.ends[-1] >= self.seconds:
            control.should_training_stop = True
        elif state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.look(state.global_step)


@final
class ThenShares(TrainerCallback):
    """From step `start` on, any share of an answer is hidden, as the diffusion bound has it.

    A network whose answers were always hidden as a whole has never seen one that is filled in half, and decodes badly.
    """

    def __init__(self, trainer: MemDLMTrainer, start: int) -> None:
        self.trainer, self.start = trainer, start

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change what is drawn, once."""
        if state.global_step == self.start:
            objective = self.trainer.objective
            options = dataclasses.replace(objective.options, time_epsilon=Corpus.time_epsilon)
            self.trainer.objective = dataclasses.replace(objective, options=options)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One network to be trained: everything that its figures depend on."""

    corpus: Corpus
    size: str
    arm: str
    seed: int
    device: str = "cpu"
    pages: int = 128
    """Pages that are measured at the end; a quarter of them at every point of the curve."""
    part: str = "test"
    reader_steps: int = 0
    """Steps on reading exercises before, without text and without memory."""
    reads_on: bool = False
    """Exercises are in every step of the memory's training, too."""
    targets: str | None = None
    """Projections that get fast weights, instead of the preset's."""
    batch: int | None = None
    """Rows of a step, but for exercises before, instead of the size's."""
    whole_until: float | None = None
    """Share of the steps in which answers are hidden as the corpus says; then any share of them is. None: in all."""

    @property
    def rows(self) -> int:
        """Rows of a step, but for exercises before."""
        return self.batch or SIZES[self.size].batch

    @property
    def in_sight(self) -> bool:
        return self.arm == IN_SIGHT

    @property
    def share_of_rate(self) -> float:
        """Share of the learning rate, but for exercises."""
        return self.corpus.after_reading if self.reader_steps else 1.0

    @property
    def clock(self) -> Callable[[], float]:
        """What the budget is read from: on the CPU its own seconds, whoever else computes on the machine."""
        return time.perf_counter if self.device.startswith("cuda") else time.process_time

    def new_network(self) -> PreTrainedModel:
        """Build the network, with random weights."""
        tokenizer = self.corpus.tokenizer
        config = SmallDLMConfig(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **SIZES[self.size].network,
            **self.corpus.network,
        )
        return build_model(config, seed=self.seed)

    def reading_network(self, reader: Reader) -> tuple[PreTrainedModel, float]:
        """Build the network, and have it read; returns its last loss as well, in nats per token."""
        exercises = Exercises(reader, self.seed, self.reader_steps * SIZES[self.size].batch)
        trainer = self.trainer(self.new_network(), exercises, self.reader_steps)
        trainer.train()
        loss = trainer.state.log_history[-2]["loss"]
        print(f"  {self.arm}, exercises: {loss:.3f} nats per token", flush=True)
        return trainer.model, loss

    def trainer(self, network: PreTrainedModel, rows: Rows | Exercises, steps: int) -> MemDLMTrainer:
        """Return what trains a network: with memory, unless the text is in sight or there is none."""
        size, tokenizer = SIZES[self.size], self.corpus.tokenizer
        is_exercise = isinstance(rows, Exercises)
        has_memory = not (is_exercise or self.in_sight)
        memory: dict[str, Any] = {}
        if has_memory:
            config = memory_config(self.corpus, size, self.targets)
            memory = {f"mem_{name}": value for name, value in asdict(config).items()}
        on_gpu = self.device.startswith("cuda")
        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(),
            max_steps=steps,
            per_device_train_batch_size=size.batch if is_exercise else self.rows,
            learning_rate=size.learning_rate * (1.0 if is_exercise else self.share_of_rate),
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=min(200, steps // 10),
            weight_decay=0.05,
            adam_beta2=0.95,
            logging_steps=max(1, steps // 20),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            loss_weight_type="uniform",
            stratified_times=True,
            time_epsilon=HIDDEN_WHOLE if is_exercise else self.corpus.time_epsilon,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            dataloader_num_workers=8 if on_gpu else 0,
            dataloader_pin_memory=on_gpu,
            seed=self.seed,
            mem_enabled=has_memory,
            **memory,
        )
        parts: dict[str, Any] = {
            "args": on_one_device(arguments),
            "train_dataset": rows,
            "data_collator": Collator(tokenizer.pad_token_id, supervise_padding="none"),
            "processing_class": tokenizer,
        }
        if has_memory and self.reads_on:
            done = self.reader_steps * size.batch
            more = Exercises(rows.reader, self.seed, steps * self.rows, start=done)
            trainer: MemDLMTrainer = ReadingOn(network, exercises=more, **parts)
        else:
            trainer = MemDLMTrainer(network, **parts)
        trainer.remove_callback(PrinterCallback)
        if has_memory and self.whole_until is not None:
            if self.corpus.time_epsilon == Corpus.time_epsilon:
                raise ConfigError(f"whole_until={self.whole_until}: {self.corpus.name} never hides answers as a whole.")
            trainer.add_callback(ThenShares(trainer, round(self.whole_until * steps)))
        return trainer

    def steps_in(self, seconds: float) -> int:
        """Return how many steps fit into `seconds`, from a trial of every stage."""
        reader, per_step = Reader(self.corpus), 0.0
        for stage in self.corpus.stages:
            trial = dataclasses.replace(stage, share=1.0)
            rows = Rows(reader, self, TRIAL_STEPS, [trial])
            trainer = self.trainer(self.new_network(), rows, TRIAL_STEPS)
            budget = Budget(self.clock, None, TRIAL_STEPS, lambda step: None)
            trainer.add_callback(budget)
            trainer.train()
            ends = budget.ends
            # The first step warms up; the quickest of the others is the least disturbed one.
            per_step += stage.share * min(late - early for early, late in itertools.pairwise(ends))
        return max(CURVE_POINTS, int(seconds / per_step))


def run(wanted: Run, *, seconds: float | None = None, steps: int | None = None) -> dict[str, Any]:
    """Train one network within `seconds`, or for `steps`, and measure it; returns the row."""
    reader = Reader(wanted.corpus)
    begun = wanted.clock()
    network, reader_loss = wanted.reading_network(reader) if wanted.reader_steps else (wanted.new_network(), None)
    reader_seconds = wanted.clock() - begun
    planned = steps or wanted.steps_in(0.9 * (seconds or 0.0))
    validation = reader.pages("validation", max(1, wanted.pages // 4), in_sight=wanted.in_sight)
    rows = Rows(reader, wanted, planned, wanted.corpus.stages)
    trainer = wanted.trainer(network, rows, planned)
    model, curve = trainer.model, []

    def look(step: int) -> None:
        if step > 0:
            ways = measured_ways(reader, model, trainer.memory, validation, seed=wanted.seed, decodes=False)
            curve.append({"step": step, "ways": ways})
            shown = ", ".join(f"{name} {way['one_shot']:.3f} / {way['loss']:.2f}" for name, way in ways.items())
            print(f"  {wanted.arm}, step {step} of {planned}: {shown}", flush=True)

    budget = Budget(wanted.clock, seconds, max(1, planned // CURVE_POINTS), look)
    trainer.add_callback(budget)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    look(trainer.state.global_step)
    row = {
        "parameters": model.num_parameters(),
        "reader_seconds": reader_seconds,
        "reader_loss": reader_loss,
        "steps_planned": planned,
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "curve": curve,
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    asked = reader.pages(wanted.part, wanted.pages, in_sight=wanted.in_sight)
    row["measured"] = measured_ways(reader, model, trainer.memory, asked, seed=wanted.seed, decodes=True)
    if wanted.corpus.has_kinds:
        alike = reader.pages(wanted.part, wanted.pages, in_sight=wanted.in_sight, alike=1.0)
        row["alike"] = measured_ways(reader, model, trainer.memory, alike, seed=wanted.seed, decodes=True)
    row["settings"] = asdict(SIZES[wanted.size]) | {
        "learning_rate": trainer.args.learning_rate,
        "batch": wanted.rows,
        "time_epsilon": wanted.corpus.time_epsilon,
        "corpus_network": dict(wanted.corpus.network),
    }
    row["stages"] = [asdict(stage) for stage in wanted.corpus.stages]
    row["config"] = None if trainer.memory is None else asdict(trainer.memory.config)
    return row
