"""The main job, offline: train small models with and without memory, measure them, and write a report.

First, recall from memory alone (`demo_recall`). Then, with everything in attention's reach, two models learn key-value
recall from scratch: standard MDLM, and MemDLM as published (memory written from the response in training, from the
prompt at inference). Each is measured without and with inference-time memory, at the training length and beyond.
Whatever comes out is reported.
"""

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memdlm.data.chat import Encoded, encode_chat
from memdlm.data.collate import Collator
from memdlm.data.synthetic import Sample
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.evaluation.exposure_bias import exposure_bias
from memdlm.evaluation.prompts import pad_texts
from memdlm.evaluation.recall import encode_samples, recall
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.hub.devices import job_line, name_of
from memdlm.models.hub.loading import attention_of, build_model
from memdlm.models.networks.small import SmallDLMConfig
from memdlm.outputs import MARKER, Kind, Output, output_folder
from memdlm.report.build import write_report
from memdlm.report.records import plain
from memdlm.report.runs import curve_of
from memdlm.training.arguments import TrainingArguments
from memdlm.training.trainer import MemDLMTrainer
from memdlm.version import __version__
from memdlm.workflows.display import Display, show_steps
from memdlm.workflows.studies.demo_plan import DemoPlan
from memdlm.workflows.studies.demo_recall import empty_panel, fill_panel, panel_seconds, pass_seconds
from memdlm.workflows.studies.recall_study import new_model, on_one_device, recall_data

ARMS: dict[str, dict[str, Any]] = {"MDLM": {}, "MemDLM (published)": {"mem_enabled": True}}
"""Models of the demo, and the training options in which they differ."""

NOTES = (
    "Memory on: before each conversation is answered, its prompt is written into fast weights with the published "
    "hyper-parameters. Memory off: the same model, nothing written.",
    "The published recipe writes memory, in training, from the labels that the loss then scores; its training loss "
    "with memory is therefore not comparable with any loss without memory. Compare models by the loss without memory "
    "and by accuracy.",
    "These are toy models on synthetic text. They show that everything runs and what it does here; they say nothing "
    "about models of a useful size.",
)


INTERRUPTED = "interrupted"
DEMO = Kind(name="demo", words="a demo", part=INTERRUPTED)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoData:
    """What all models of a demo share."""

    tokenizer: PreTrainedTokenizerBase
    train: list[dict[str, list[int]]]
    validation: list[dict[str, list[int]]]
    by_length: dict[int, list[Sample]]


def run_demo(plan: DemoPlan, out: Path, display: Display, command: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Train, measure and report; returns the report that was written to `out`.

    Leaves `report.html`, `report.json`, five PNGs and `checkpoints/<model>-seed<n>/` (folders for
    `memdlm.load_model`), all at once in the end: an earlier demo stays until then. On Ctrl-C what is finished is
    written (beside an earlier demo, into `out/interrupted`), then KeyboardInterrupt goes on. Raises DataError when
    `out` is, or lies under, a file, ConfigError when it holds anything but a demo, or a demo and `overwrite` is off.
    """
    with output_folder(out, DEMO, overwrite=overwrite, option="out") as output:
        earlier = (output.place / "report.json").exists()
        report = None
        with output.replaced() as growing:
            try:
                report = _demo(plan, growing, display, command)
            except KeyboardInterrupt:
                if not (growing / "report.json").exists():
                    raise
                folder = out / INTERRUPTED if earlier else out
                display.say(f"Interrupted. What was finished is in {folder / 'report.html'}.")
                if earlier:
                    _keep(growing, output)
                    raise
        if report is None:
            raise KeyboardInterrupt
    return report


def _keep(growing: Path, output: Output) -> None:
    """Move what was finished into the earlier demo, which stays."""
    with Output(output.place / INTERRUPTED, DEMO).replaced() as folder:
        for path in [each for each in growing.iterdir() if each.name != MARKER]:
            os.replace(path, folder / path.name)


def _demo(plan: DemoPlan, out: Path, display: Display, command: str) -> dict[str, Any]:
    start = time.perf_counter()
    report = _empty_report(plan, command)
    try:
        with _single_thread():
            panel_data = recall_data(plan.recall)
            network = new_model(plan.recall, panel_data, plan.seeds[0])
            display.say(job_line(plan.device, network.dtype, attention_of(network)))
            data = _make_data(plan, display)
            estimate = _estimate(plan, data)
            estimate += panel_seconds(plan.recall, panel_data, plan.num_recall_seeds, plan.device)
            display.say(f"Estimated time: {_minutes(estimate)}, more if the machine is busy.")
            fill_panel(report["recall"], plan.recall, panel_data, out, display)
            for seed in plan.seeds:
                for arm in ARMS:
                    _one_model(plan, data, arm, seed, out, display, report)
    except KeyboardInterrupt:
        if report["recall"]["models"]:
            report["notes"].append("Interrupted: what was finished until then is shown.")
            _finish(report, out, display, start)
        raise
    _finish(report, out, display, start)
    return report


def _finish(report: dict[str, Any], folder: Path, display: Display, start: float) -> None:
    report["seconds"] = {**display.seconds, "total": time.perf_counter() - start}
    write_report(report, folder)


def _empty_report(plan: DemoPlan, command: str) -> dict[str, Any]:
    task = plan.task
    return {
        "title": "Small diffusion language models with and without parametric memory",
        "version": __version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command,
        "seeds": list(plan.seeds),
        "quick": plan.is_quick,
        "notes": list(NOTES),
        "machine": {
            "device": name_of(plan.device),
            "cores": os.cpu_count() or 1,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "seconds": {"total": 0.0},
        "task": {
            "name": "key-value recall",
            "description": f"{task.num_pairs} facts of the form 'k3 is v17' lie scattered in filler words; "
            f"{task.num_questions} questions name a key, and the answer is its value, one of {task.num_values}.",
            "chance": task.chance,
            "train_length": plan.train_length,
            "lengths": plan.lengths,
            "num_questions": plan.num_eval * task.num_questions,
        },
        "models": [],
        "accuracy": [],
        "exposure_bias": [],
        "recall": empty_panel(plan.recall, plan.seeds[: plan.num_recall_seeds]),
    }


def _make_data(plan: DemoPlan, display: Display) -> DemoData:
    tokenizer = build_word_tokenizer(plan.task.words())
    samples = plan.task.records(plan.num_train, plan.train_length, seed="demo train")
    train = []
    with display.bar("data", "making the training text", len(samples)) as advance:
        for index, sample in enumerate(samples):
            train.append(_row(encode_chat(tokenizer, sample.messages, train_turns="all")))
            advance(index + 1)
    held_out = plan.task.records(plan.num_eval, plan.train_length, seed="demo validation")
    return DemoData(
        tokenizer=tokenizer,
        train=train,
        validation=[_row(encode_chat(tokenizer, sample.messages, train_turns="all")) for sample in held_out],
        by_length={length: plan.task.records(plan.num_eval, length, seed="demo test") for length in plan.lengths},
    )


def _row(encoded: Encoded) -> dict[str, list[int]]:
    return {"input_ids": encoded.input_ids, "labels": encoded.labels}


def _new_model(data: DemoData, seed: int) -> PreTrainedModel:
    config = SmallDLMConfig(
        vocab_size=len(data.tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=data.tokenizer.pad_token_id,
        eos_token_id=data.tokenizer.eos_token_id,
    )
    return build_model(config, seed=seed)


def _one_model(
    plan: DemoPlan, data: DemoData, arm: str, seed: int, out: Path, display: Display, report: dict[str, Any]
) -> None:
    """Train, save and measure one model; its rows reach the report only when all of them are there."""
    name = f"{arm}, seed {seed}"
    model, row = _train(plan, data, arm, seed, out, display)
    accuracy, bias = [], []
    memories = {False: None, True: ParametricMemory(model, MemoryConfig(), mask_token_id=data.tokenizer.mask_token_id)}
    with display.bar("evaluate", f"{name}: answering", 2 * len(plan.lengths) * plan.num_eval) as advance:
        done = 0
        for is_on, memory in memories.items():
            for length, samples in data.by_length.items():
                result = recall(model, data.tokenizer, samples, steps=plan.answer_steps, seed=seed, memory=memory)
                done += len(samples)
                advance(done)
                accuracy.append(
                    {
                        "model": arm,
                        "seed": seed,
                        "memory": is_on,
                        "length": length,
                        "accuracy": result.accuracy,
                        "questions": result.questions,
                    }
                )
    with display.bar("exposure bias", f"{name}: exposure bias", 2) as advance:
        texts = encode_samples(data.tokenizer, data.by_length[plan.lengths[-1]][: plan.num_eval // 2])
        batch = pad_texts(texts, data.tokenizer.pad_token_id, model.device)
        for index, (is_on, memory) in enumerate(memories.items()):
            measured = exposure_bias(
                model,
                [batch],
                mask_token_id=data.tokenizer.mask_token_id,
                steps=2 * plan.answer_steps,
                seed=seed,
                memory=memory,
            )
            bias.append({"model": arm, "seed": seed, "memory": is_on, **asdict(measured)})
            advance(index + 1)
    report["models"].append(row)
    report["accuracy"] += accuracy
    report["exposure_bias"] += bias


def _train(
    plan: DemoPlan, data: DemoData, arm: str, seed: int, out: Path, display: Display
) -> tuple[PreTrainedModel, dict[str, Any]]:
    model = _new_model(data, seed)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=plan.num_eval,
        learning_rate=plan.learning_rate,
        warmup_steps=plan.steps // 12,
        weight_decay=0.05,
        stratified_times=True,
        adam_beta2=0.95,
        logging_steps=max(1, plan.steps // 30),
        eval_strategy="steps",
        eval_steps=plan.steps // plan.num_evals,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=plan.device.type == "cpu",
        dataloader_pin_memory=False,
        seed=seed,
        **ARMS[arm],
    )
    trainer = MemDLMTrainer(
        model,
        on_one_device(arguments),
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=Collator(data.tokenizer.pad_token_id),
        processing_class=data.tokenizer,
    )
    start = time.perf_counter()
    with display.bar("train", f"{arm}, seed {seed}: training", plan.steps) as advance:
        show_steps(trainer, advance)
        trainer.train()
    seconds = time.perf_counter() - start
    model.eval()
    folder = out / "checkpoints" / checkpoint_name(arm, seed)
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    options = {"learning_rate": plan.learning_rate, "batch_size": plan.batch_size, "training_rows": len(data.train)}
    memory = {} if arguments.memory is None else {"memory": asdict(arguments.memory)}
    row = {
        "model": arm,
        "seed": seed,
        "parameters": model.num_parameters(),
        "steps": plan.steps,
        "seconds": seconds,
        "config": {"network": model.config.to_diff_dict(), "training": options, **memory},
        "curve": plain(curve_of(trainer.state.log_history)),
    }
    return model, row


def checkpoint_name(arm: str, seed: int) -> str:
    """Return the folder name of a model: `mdlm-seed0`."""
    return f"{arm.split()[0].lower()}-seed{seed}"


def _estimate(plan: DemoPlan, data: DemoData) -> float:
    """Time one training pass, and count how many of them the whole demo costs: seconds."""
    batch = Collator(data.tokenizer.pad_token_id)(data.train[: plan.batch_size])
    one = pass_seconds(_new_model(data, plan.seeds[0]), batch["input_ids"], plan.device)
    # In passes, measured: a step of each arm (network, optimizer and Trainer), and the evaluations of one model.
    training = plan.steps * (STEP_COST["MDLM"] + STEP_COST["MemDLM (published)"])
    evaluation = len(ARMS) * plan.num_eval / plan.batch_size * plan.answer_steps * EVALUATION_COST
    return one * len(plan.seeds) * (training + evaluation)


STEP_COST = {"MDLM": 1.6, "MemDLM (published)": 4.0}
EVALUATION_COST = 22.0


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} seconds"
    return f"about {seconds / 60:.0f} minutes"


@contextmanager
def _single_thread() -> Iterator[None]:
    """Compute on one thread: models this small lose time on more, and one thread always adds in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
