"""Can a model recall, from its memory alone, what attention cannot reach? Training and measuring one arm at a time.

Facts lie in a context that a sliding window keeps out of the questions' reach, so fast weights are the only channel
between the two. Used by the demo, by `benchmarks/study` and by the slow test.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memdlm.data.collate import Collator
from memdlm.data.documents import plain_ids
from memdlm.data.synthetic import KeyValueRecall, Sample, Task
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.evaluation.prompts import pad_texts
from memdlm.evaluation.recall import encode_samples, recall, written_texts
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.hub.loading import build_model
from memdlm.models.networks.small import SmallDLMConfig
from memdlm.training.arguments import TrainingArguments
from memdlm.training.trainer import MemDLMTrainer
from memdlm.workflows.display import show_steps

OURS = "learned to be written"
MAIN = ("MDLM", "published", "first order", OURS)
"""The arms of the main comparison."""
UNWEIGHTED: dict[str, Any] = {"loss_weight_type": "uniform"}
CURVES = ("step", "loss", "nll", "nll_memory")


@dataclass(frozen=True, kw_only=True)
class RecallPlan:
    """Task, model and budget, the same for all arms."""

    task: Task = field(default_factory=lambda: KeyValueRecall(num_keys=24, is_adjacent=True))
    train_length: int = 36
    """Words of context in training."""
    times: tuple[int, ...] = (1, 4, 16)
    """Context lengths of the evaluation, as multiples of the training length."""
    num_train: int = 3200
    num_eval: int = 64
    """Conversations per length."""
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 5e-3
    rank: int = 16
    strides: int = 2
    """Enough where a value stands next to its key."""
    window: int | None = 4
    context: str = "kept"
    """`dropped`: the network sees questions alone, in training too; the context is written as a text of its own."""
    network: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the network's configuration."""
    answer_words: int = 1
    training: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the training arguments, such as `use_cpu` and `bf16`."""


def closed_book(**changes: Any) -> RecallPlan:
    """Return the plan with the context dropped after the write, and attention without limits: `memorize`, then `ask`.

    Harder to begin with than a window: models stay longer where they know which values occurred, but not whose they
    are. Every masked token counts alike in its loss, which gets them out sooner than the bound's weight 1/t.
    """
    options: dict[str, Any] = {"context": "dropped", "window": None, "training": UNWEIGHTED, "steps": 400}
    options["num_train"] = 16 * int(changes.get("steps", options["steps"]))
    return RecallPlan(**(options | changes))


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallData:
    """What all arms and seeds share."""

    tokenizer: PreTrainedTokenizerBase
    train: list[dict[str, list[int]]]
    by_length: dict[int, list[Sample]]


def arms(plan: RecallPlan) -> dict[str, MemoryConfig | None]:
    """Return the main comparison and its ablations: the memory that each is trained with."""
    shape: dict[str, Any] = {"inner_rank": plan.rank, "inner_alpha": 2.0 * plan.rank}
    source = "prompt" if plan.context == "kept" else "context"
    ours = MemoryConfig.recall(strides=plan.strides, write_source=source, **shape)
    nested: dict[str, Any] = {"masking_strategy": "pmc", "strides": 2, "num_inner_steps": 2}
    return {
        "MDLM": None,
        # Published batches are small; with as many texts as here one memory for all of them holds next to nothing.
        "published": MemoryConfig.paper(per_sample=True, **shape),
        "first order": dataclasses.replace(ours, outer_gradient="first_order"),
        OURS: ours,
        "lower blocks detached": dataclasses.replace(ours, outer_gradient="exact_top"),
        "fixed start": dataclasses.replace(ours, learn_start=False),
        "fixed rates": MemoryConfig.recall(strides=plan.strides, write_source=source, learn_lr=False, **shape),
        "one memory per batch": dataclasses.replace(ours, per_sample=False),
        "published masks": dataclasses.replace(ours, **nested),
        "response written": dataclasses.replace(ours, write_source="response"),
    }


def recall_data(plan: RecallPlan) -> RecallData:
    """Draw the conversations of training and of every evaluated length."""
    tokenizer = build_word_tokenizer(plan.task.words())
    samples = plan.task.records(plan.num_train, plan.train_length, seed="recall train")
    train = [
        {"input_ids": each.input_ids, "labels": each.labels}
        for each in encode_samples(tokenizer, samples, plan.context)
    ]
    if plan.context == "dropped":
        for row, sample in zip(train, samples, strict=True):
            row["context_ids"] = plain_ids(tokenizer, sample.context)
    lengths = [plan.train_length * times for times in plan.times]
    return RecallData(
        tokenizer=tokenizer,
        train=train,
        by_length={length: plan.task.records(plan.num_eval, length, seed="recall held out") for length in lengths},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One model after its training."""

    model: PreTrainedModel
    memory: ParametricMemory
    """What a user of the model would write with."""
    rates: dict[str, list[float]]
    """Learned inner learning rates: per tensor, one per step."""
    curve: dict[str, list[float]]
    """`step`, `loss`, `nll` and, where it was trained with memory, `nll_memory`: nats per maskable token."""
    seconds: float
    cpu_seconds: float


def run_arm(plan: RecallPlan, data: RecallData, config: MemoryConfig | None, seed: int) -> dict[str, Any]:
    """Train one model and measure it: accuracy per length with memory on and off, and how it was reached.

    `config` is the memory it is trained with; None trains without, and measures with the published memory.
    """
    trained = train_arm(plan, data, config, seed)
    return {
        "seed": seed,
        "steps": plan.steps,
        "seconds": trained.seconds,
        "cpu_seconds": trained.cpu_seconds,
        "parameters": trained.model.num_parameters(),
        "accuracy": accuracies(plan, data, trained, seed),
        "curve": trained.curve,
        "rates": trained.rates,
        "written": written_losses(plan, data, trained),
        "config": None if config is None else dataclasses.asdict(config),
    }


def train_arm(
    plan: RecallPlan,
    data: RecallData,
    config: MemoryConfig | None,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train one model with the memory `config` (None: without); `on_step` is told how many steps are done."""
    start, cpu = time.perf_counter(), time.process_time()
    trainer = trained(plan, data, config, seed, on_step)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    model = trainer.model.eval()
    # With memory, a short run logs the loss without it on some of its logged steps only.
    history = [entry for entry in trainer.state.log_history if "nll" in entry]
    found = {name: [entry[name] for entry in history if name in entry] for name in CURVES}
    return Trained(
        model=model,
        memory=inference_memory(model, data.tokenizer, trainer.memory),
        rates=_rates(trainer.memory),
        curve={name: values for name, values in found.items() if values},
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
    """Measure a model at every length with memory on and off; `on_samples` is told how many conversations are done."""
    rows, done = [], 0
    for length, samples in data.by_length.items():
        for is_on in (True, False):
            found = recall(
                trained.model,
                data.tokenizer,
                samples,
                steps=plan.task.num_questions * plan.answer_words,
                seed=seed,
                memory=trained.memory if is_on else None,
                context=plan.context,
            )
            rows.append({"length": length, "memory": is_on, "accuracy": found.accuracy, "questions": found.questions})
            done += len(samples)
            on_samples(done)
    return rows


def trained(
    plan: RecallPlan,
    data: RecallData,
    config: MemoryConfig | None,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
    model: PreTrainedModel | None = None,
) -> MemDLMTrainer:
    """Train one model, a new one unless it is given; `save_final(folder)` of the result keeps it and its memory.

    A `model` that was loaded from such a folder goes on with the start and the rates that lie there.
    """
    trainer = _trainer(plan, data, config, new_model(plan, data, seed) if model is None else model, seed)
    show_steps(trainer, on_step)
    trainer.train()
    return trainer


def inference_memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained: ParametricMemory | None
) -> ParametricMemory:
    """Return what a user of the trained model would write with: a learned memory, or the published one, per row."""
    if trained is not None and trained.config.write_source != "response" and trained.config.per_sample is not False:
        return trained
    config = (
        MemoryConfig.paper()
        if trained is None
        else dataclasses.replace(trained.config, per_sample=True, sync_inner=None)
    )
    memory = ParametricMemory(model, config, mask_token_id=tokenizer.mask_token_id)
    if trained is not None:
        memory.learned = trained.learned
    return memory


@torch.no_grad()
def written_losses(plan: RecallPlan, data: RecallData, trained: Trained) -> dict[str, list[Any]]:
    """Return, for what is written of one conversation, every word's loss before and after.

    `is_value` marks what the questions ask for. Each word is masked alone, its neighbours in sight, so the two differ
    by what the memory holds.
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
    words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
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
    """Let a small job use the first card alone where a process sees several; returns `arguments`."""
    # transformers would split every batch between all of them. There is no public switch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _trainer(
    plan: RecallPlan, data: RecallData, config: MemoryConfig | None, model: PreTrainedModel, seed: int
) -> MemDLMTrainer:
    tokenizer = data.tokenizer
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
    arguments = on_one_device(TrainingArguments(**(options | memory | dict(plan.training))))
    return MemDLMTrainer(
        model,
        arguments,
        train_dataset=data.train,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
