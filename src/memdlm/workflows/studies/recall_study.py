"""Train and measure one model (an arm) of a plan, for the demo and for `benchmarks/study`."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memdlm.data.collate import Collator
from memdlm.data.documents import plain_ids
from memdlm.data.synthetic import Sample
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.evaluation.exposure_bias import ExposureBias, exposure_bias
from memdlm.evaluation.prompts import pad_texts
from memdlm.evaluation.recall import encode_samples, recall, written_texts
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.hub.loading import build_model
from memdlm.models.networks.small import SmallDLMConfig
from memdlm.randomness import derive
from memdlm.training.arguments import TrainingArguments
from memdlm.training.trainer import MemDLMTrainer
from memdlm.workflows.display import Advance, show_steps
from memdlm.workflows.studies.plans import RecallPlan

CURVES = ("step", "loss", "nll", "nll_memory")
Bar = Callable[[str, str, int], AbstractContextManager[Advance]]
"""Shows one phase of a job, as `Display.bar` does: (phase, description, total)."""


def no_bar(phase: str, description: str, total: int) -> AbstractContextManager[Advance]:
    """Show nothing."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallData:
    """The data that all arms and seeds share."""

    tokenizer: PreTrainedTokenizerBase
    train: list[dict[str, list[int]]]
    validation: list[dict[str, list[int]]] | None
    by_length: dict[int, list[Sample]]


def recall_data(plan: RecallPlan) -> RecallData:
    """Draw the conversations of training and of every evaluated length."""
    tokenizer = build_word_tokenizer(plan.task.words(), **plan.tokenizer)

    def drawn(count: int, length: int, name: str) -> list[Sample]:
        return plan.task.records(count, length, seed=plan.draws[name])

    def encoded(samples: Sequence[Sample]) -> list[dict[str, list[int]]]:
        texts = encode_samples(tokenizer, samples, plan.context)
        return [{"input_ids": text.input_ids, "labels": text.labels} for text in texts]

    def trained_on(count: int, length: int) -> list[dict[str, list[int]]]:
        samples = drawn(count, length, "train")
        rows = encoded(samples)
        if plan.context == "dropped":
            for row, sample in zip(rows, samples, strict=True):
                row["context_ids"] = plain_ids(tokenizer, sample.context)
        return rows

    (steps, length), *later = plan.stages()
    train = trained_on(plan.num_train, length)
    if later:
        order = torch.randperm(steps * plan.batch_size, generator=derive("recall order")).tolist()
        train = [train[index % plan.num_train] for index in order]
        for steps, length in later:
            train += trained_on(steps * plan.batch_size, length)
    return RecallData(
        tokenizer=tokenizer,
        train=train,
        validation=encoded(drawn(plan.num_eval, plan.train_length, "validation")) if plan.num_evals else None,
        by_length={
            times * plan.train_length: drawn(plan.conversations(times), times * plan.train_length, "held out")
            for times in plan.times
        },
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One model after its training."""

    model: PreTrainedModel
    memory: ParametricMemory
    """The memory that a user of the model would write with."""
    rates: dict[str, list[float]]
    """Learned inner learning rates: per tensor, one per step."""
    history: Sequence[Mapping[str, float]]
    """The Trainer's log."""
    seconds: float
    cpu_seconds: float

    @property
    def curve(self) -> dict[str, list[float]]:
        """Return `step`, `loss`, `nll` and, if trained with memory, `nll_memory`, in nats per maskable token."""
        # With memory on, a short run logs the loss without memory only on some of its logged steps.
        entries = [entry for entry in self.history if "nll" in entry]
        found = {name: [entry[name] for entry in entries if name in entry] for name in CURVES}
        return {name: values for name, values in found.items() if values}


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmResult:
    """One model, trained and measured."""

    trained: Trained
    accuracy: list[dict[str, Any]]
    """By `length` and `memory` (on or off): `accuracy` and the number of `questions`."""
    bias: dict[bool, ExposureBias]
    """Exposure bias by memory, off and on; empty if the plan does not measure it."""


def run_arm(plan: RecallPlan, data: RecallData, config: MemoryConfig | None, seed: int) -> dict[str, Any]:
    """Train one model and measure it: accuracy per length with memory on and off, training curves, and costs.

    `config` is the memory it is trained with; None trains without, and measures with the published memory.
    """
    found = measure_arm(plan, data, config, seed)
    trained = found.trained
    return {
        "seed": seed,
        "steps": plan.steps,
        "seconds": trained.seconds,
        "cpu_seconds": trained.cpu_seconds,
        "parameters": trained.model.num_parameters(),
        "accuracy": found.accuracy,
        "curve": trained.curve,
        "rates": trained.rates,
        "written": written_losses(plan, data, trained),
        "config": None if config is None else asdict(config),
    }


def measure_arm(
    plan: RecallPlan,
    data: RecallData,
    config: MemoryConfig | None,
    seed: int,
    *,
    name: str = "",
    bar: Bar = no_bar,
    folder: Path | None = None,
) -> ArmResult:
    """Train one model, save it in `folder` if given, and take the plan's measures with memory on and off."""
    with bar("train", f"{name}: training", plan.steps) as advance:
        trained = train_arm(plan, data, config, seed, advance)
    if folder is not None:
        trained.model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
        if trained.memory.learned is not None:
            trained.memory.learned.save(folder)
    with bar("evaluate", f"{name}: answering", 2 * sum(map(len, data.by_length.values()))) as advance:
        accuracy = accuracies(plan, data, trained, seed, advance)
    bias: dict[bool, ExposureBias] = {}
    if plan.measures_bias:
        with bar("exposure bias", f"{name}: exposure bias", 2) as advance:
            bias = _biases(plan, data, trained, seed, advance)
    return ArmResult(trained=trained, accuracy=accuracy, bias=bias)


def train_arm(
    plan: RecallPlan,
    data: RecallData,
    config: MemoryConfig | None,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
    model: PreTrainedModel | None = None,
) -> Trained:
    """Train `model`, or a new model, with the memory `config` (None: without).

    `on_step` is called with the number of steps done.
    """
    start, cpu = time.perf_counter(), time.process_time()
    trainer = trained(plan, data, config, seed, on_step, model)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    model = trainer.model.eval()
    return Trained(
        model=model,
        memory=inference_memory(model, data.tokenizer, trainer.memory, plan.inference),
        rates=_rates(trainer.memory),
        history=trainer.state.log_history,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def accuracies(
    plan: RecallPlan,
    data: RecallData,
    trained: Trained,
    seed: int,
    on_samples: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """Measure a model at every length, memory on and off; `on_samples` gets the number of conversations done."""
    rows, done = [], 0
    for length, samples in data.by_length.items():
        for is_on in (True, False):
            found = recall(
                trained.model,
                data.tokenizer,
                samples,
                steps=plan.answer_steps,
                seed=seed,
                memory=trained.memory if is_on else None,
                context=plan.context,
            )
            rows.append({"length": length, "memory": is_on, "accuracy": found.accuracy, "questions": found.questions})
            done += len(samples)
            on_samples(done)
    return rows


def _biases(
    plan: RecallPlan, data: RecallData, trained: Trained, seed: int, advance: Advance
) -> dict[bool, ExposureBias]:
    tokenizer, found = data.tokenizer, {}
    texts = encode_samples(tokenizer, data.by_length[plan.lengths[-1]][: plan.num_eval // 2], plan.context)
    batch = pad_texts(texts, tokenizer.pad_token_id, trained.model.device)
    for is_on in (False, True):
        found[is_on] = exposure_bias(
            trained.model,
            [batch],
            mask_token_id=tokenizer.mask_token_id,
            steps=2 * plan.answer_steps,
            seed=seed,
            memory=trained.memory if is_on else None,
        )
        advance(len(found))
    return found


def trained(
    plan: RecallPlan,
    data: RecallData,
    config: MemoryConfig | None,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
    model: PreTrainedModel | None = None,
) -> MemDLMTrainer:
    """Train `model`, or a new model; `save_final(folder)` of the result saves the model and its memory.

    A `model` loaded from such a folder continues with the learned start and rates saved there.
    """
    memory: dict[str, Any] = {}
    if config is not None:
        memory = {f"mem_{field.name}": getattr(config, field.name) for field in dataclasses.fields(config)}
    options: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.batch_size,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": plan.steps // 4,
        "weight_decay": 0.05,
        "adam_beta2": 0.95,
        "logging_steps": max(1, plan.steps // 20),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": seed,
        "mem_enabled": config is not None,
    }
    if len(plan.schedule) > 1:
        options["train_sampling_strategy"] = "sequential"
    if plan.num_evals:
        options |= {"eval_strategy": "steps", "eval_steps": plan.steps // plan.num_evals, "eval_on_start": True}
        options["per_device_eval_batch_size"] = plan.num_eval
    arguments = on_one_device(TrainingArguments(**(options | memory | dict(plan.training))))
    trainer = MemDLMTrainer(
        new_model(plan, data, seed) if model is None else model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=Collator(data.tokenizer.pad_token_id),
        processing_class=data.tokenizer,
    )
    show_steps(trainer, on_step)
    trainer.train()
    return trainer


def inference_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trained: ParametricMemory | None,
    config: MemoryConfig | None = None,
) -> ParametricMemory:
    """Return the memory that a user of the trained model would write with: the learned or the published one, per row.

    A `config` overrides this, whatever was trained.
    """
    if config is not None:
        return ParametricMemory(model, config, mask_token_id=tokenizer.mask_token_id)
    if trained is not None and trained.config.write_source != "response" and trained.config.per_sample is not False:
        return trained
    if trained is not None:
        return trained.with_options(per_sample=True, sync_inner=None)
    return ParametricMemory(model, MemoryConfig.paper(), mask_token_id=tokenizer.mask_token_id)


@torch.no_grad()
def written_losses(plan: RecallPlan, data: RecallData, trained: Trained) -> dict[str, Any]:
    """Return the loss of every written word of one conversation, before and after the write.

    `is_value` marks the words that the questions ask for. Each word is masked alone, with its neighbours visible, so
    the two losses differ by what the memory holds.
    """
    tokenizer, model = data.tokenizer, trained.model
    sample = data.by_length[plan.train_length][:1]
    shown = encode_samples(tokenizer, sample, plan.context)
    texts = written_texts(tokenizer, sample, plan.context, shown)
    ids, labels, is_prompt = pad_texts(texts, tokenizer.pad_token_id, model.device).prompt()
    places = torch.arange(ids.shape[1], device=model.device)
    views = ids.repeat(len(places), 1)
    views[places, places] = tokenizer.mask_token_id

    def losses() -> list[float]:
        logits = model(input_ids=views).logits[places, places]
        return torch.nn.functional.cross_entropy(logits, ids[0], reduction="none").tolist()

    before = losses()
    with trained.memory.write(ids, labels, is_prompt):
        after = losses()
    words = [tokenizer.decode([token]) for token in ids[0].tolist()]
    asked = {word for answer in sample[0].answers for word in answer.split()}
    is_value = [word in asked for word in words]
    return {"words": words, "before": before, "after": after, "is_value": is_value}


def _rates(memory: ParametricMemory | None) -> dict[str, list[float]]:
    if memory is None or memory.learned is None or memory.learned.log_rates is None:
        return {}
    rates = memory.config.inner_lr * memory.learned.log_rates.detach().exp()
    return dict(zip(memory.learned.names, rates.T.tolist(), strict=True))


def new_model(plan: RecallPlan, data: RecallData, seed: int) -> PreTrainedModel:
    """Return the untrained network."""
    tokenizer = data.tokenizer
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 128,
        "num_attention_heads": 3,
        "sliding_window": plan.window,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return build_model(SmallDLMConfig(**(options | dict(plan.network))), seed=seed)


def on_one_device(arguments: TrainingArguments) -> TrainingArguments:
    """Let a small job use only the first card if a process sees several; returns `arguments`."""
    # transformers would split every batch between all cards, and has no public switch for it.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
