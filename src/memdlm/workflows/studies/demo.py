"""The demo: train small models with and without memory, offline, measure them, and write a report.

The first part is recall from memory alone. In the second part attention reaches everything, and two models learn
key-value recall from scratch: standard MDLM, and MemDLM as published (memory written from the response in training,
from the prompt at inference). Each is measured without and with inference-time memory, at the training length and
beyond. All results are reported.
"""

import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from memdlm.data.collate import Collator
from memdlm.models.hub.devices import job_line, name_of
from memdlm.models.hub.loading import attention_of
from memdlm.outputs import MARKER, Kind, Output, output_folder
from memdlm.report.build import write_report
from memdlm.report.model import (
    Accuracy,
    Bias,
    Machine,
    Model,
    Recall,
    RecallCurve,
    RecallModel,
    Report,
    Seconds,
    Written,
)
from memdlm.report.records import plain
from memdlm.report.runs import curve_of
from memdlm.version import __version__
from memdlm.workflows.display import Display
from memdlm.workflows.studies.demo_plan import LEAK, DemoPlan, Panel, entropy_floor
from memdlm.workflows.studies.plans import OURS
from memdlm.workflows.studies.recall_study import (
    CURVES,
    ArmResult,
    RecallData,
    measure_arm,
    new_model,
    recall_data,
    written_losses,
)

NOTES = (
    "Memory on: before each conversation is answered, its prompt is written into fast weights with the published "
    "hyper-parameters. Memory off: the same model, with nothing written.",
    "In training, the published recipe writes memory from the labels that the loss then scores. Its training loss "
    "with memory is therefore not comparable with any loss without memory. Compare models by the loss without memory "
    "and by accuracy.",
    "These are toy models on synthetic text. They show that everything runs, and what it does here. They say nothing "
    "about models of a useful size.",
)


NOTE = "note.txt"
INTERRUPTED = "interrupted"
DEMO = Kind(name="demo", words="a demo", part=INTERRUPTED)


@dataclass(kw_only=True)
class Rows:
    """The results of a panel so far."""

    models: list[Any] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    exposure_bias: list[Bias] = field(default_factory=list)


def run_demo(plan: DemoPlan, out: Path, display: Display, command: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Train, measure and report; returns the report that was written to `out`.

    Leaves `report.html`, `report.json`, five PNGs, `note.txt` (a text for the commands of `tries`) and
    `checkpoints/<model>-seed<n>/` (folders for `memdlm.load_model`), all at once at the end: an earlier demo stays
    until then. On Ctrl-C the finished results are written (into `out/interrupted` if there is an earlier demo), and
    KeyboardInterrupt is raised again. Raises DataError when `out` is a file or lies below one, ConfigError when it
    holds anything but a demo, or a demo while `overwrite` is off.
    """
    with output_folder(out, DEMO, overwrite=overwrite, option="out") as output:
        earlier = (output.place / "report.json").exists()
        report = None
        with output.replaced() as growing:
            try:
                report = _demo(plan, growing, display, command, out)
            except KeyboardInterrupt:
                if not (growing / "report.json").exists():
                    raise
                folder = out / INTERRUPTED if earlier else out
                display.say(f"Interrupted. The finished results are in {folder / 'report.html'}.")
                if earlier:
                    _keep(growing, output)
                    raise
        if report is None:
            raise KeyboardInterrupt
    return report


def _keep(growing: Path, output: Output) -> None:
    """Move the finished results into a folder of the earlier demo, which stays."""
    with Output(output.place / INTERRUPTED, DEMO).replaced() as folder:
        for path in [each for each in growing.iterdir() if each.name != MARKER]:
            os.replace(path, folder / path.name)


def _demo(plan: DemoPlan, out: Path, display: Display, command: str, place: Path) -> dict[str, Any]:
    """Do the job in the folder `out`, which becomes `place` at the end."""
    start, notes = time.perf_counter(), list(NOTES)
    tries: list[str] = []
    panels, rows = plan.panels(), (Rows(), Rows())

    def finish() -> dict[str, Any]:
        seconds = Seconds(total=time.perf_counter() - start, others=display.seconds)
        report: dict[str, Any] = plain(_report(plan, panels, rows, command, notes, seconds, tries))
        write_report(report, out)
        return report

    try:
        with _single_thread():
            first = recall_data(plan.recall)
            network = new_model(plan.recall, first, plan.seeds[0])
            display.say(job_line(plan.device, network.dtype, attention_of(network)))
            data = (first, _make_data(plan, display))
            estimate = sum(_seconds(panel, each, plan.device) for panel, each in zip(panels, data, strict=True))
            display.say(f"Estimated time: {_minutes(estimate)}, more if the machine is busy.")
            for panel, each, found in zip(panels, data, rows, strict=True):
                _fill(found, panel, each, out, display)
            tries += commands_to_try(panels[0], data[0], out, place)
    except KeyboardInterrupt:
        if rows[0].models:
            notes.append("Interrupted: only the results finished before are shown.")
            finish()
        raise
    return finish()


def commands_to_try(panel: Panel, data: RecallData, out: Path, place: Path) -> list[str]:
    """Write a text that no model has seen into `out`, and return commands that memorise it and ask for a fact of it."""
    sample = data.by_length[panel.plan.train_length][0]
    (out / NOTE).write_text(sample.context + "\n")
    # The memory goes beside the demo's folder: in it, it would keep the next demo from replacing the folder.
    model, note, memory = (
        shlex.quote(str(path))
        for path in (
            place / "checkpoints" / panel.checkpoint(OURS, panel.seeds[0]),
            place / NOTE,
            place.parent / "note.mem" if place.name else place.absolute().with_name("note.mem"),
        )
    )
    question = shlex.quote(sample.without_context()[0]["content"])
    return [
        f"memdlm memorize --model {model} --file {note} --output {memory} --overwrite",
        f"memdlm ask --model {model} --memory {memory} --max_new_tokens 2 {question}",
        f"memdlm info {memory}",
    ]


def _make_data(plan: DemoPlan, display: Display) -> RecallData:
    total = plan.open_book.num_train
    with display.bar("data", "making the training text", total) as advance:
        data = recall_data(plan.open_book)
        advance(total)
    return data


def _fill(rows: Rows, panel: Panel, data: RecallData, out: Path, display: Display) -> None:
    """Train and measure every model with every seed; a model's rows are added when all of them are measured."""
    for seed in panel.seeds:
        for name, arm in panel.arms.items():
            found = measure_arm(
                panel.plan,
                data,
                arm.memory,
                seed,
                name=f"{name}, seed {seed}",
                bar=display.bar,
                folder=out / "checkpoints" / panel.checkpoint(name, seed),
            )
            rows.models.append(_model(panel, data, found, name, seed))
            rows.accuracy += [Accuracy(model=name, seed=seed, **row) for row in found.accuracy]
            rows.exposure_bias += [
                Bias(model=name, seed=seed, memory=is_on, **asdict(bias)) for is_on, bias in found.bias.items()
            ]


def _model(panel: Panel, data: RecallData, found: ArmResult, name: str, seed: int) -> Model | RecallModel:
    plan, trained, memory = panel.plan, found.trained, panel.arms[name].memory
    options = {"learning_rate": plan.learning_rate, "batch_size": plan.batch_size, "training_rows": len(data.train)}
    about: dict[str, Any] = {
        "model": name,
        "seed": seed,
        "parameters": trained.model.num_parameters(),
        "steps": plan.steps,
        "seconds": trained.seconds,
        "config": {
            "network": trained.model.config.to_diff_dict(),
            "training": options,
            **({} if memory is None else {"memory": asdict(memory)}),
        },
    }
    if plan.num_evals:
        return Model(**about, curve=curve_of(trained.history))
    curve: dict[str, Any] = {each: trained.curve.get(each, ()) for each in CURVES}
    words = Written(**written_losses(plan, data, trained)) if name == OURS else None
    return RecallModel(**about, curve=RecallCurve(**curve), written=words, others={"rates": trained.rates})


def _report(
    plan: DemoPlan,
    panels: tuple[Panel, Panel],
    rows: tuple[Rows, Rows],
    command: str,
    notes: Sequence[str],
    seconds: Seconds,
    tries: Sequence[str],
) -> Report:
    first, second = [
        {
            "task": panel.task(),
            "seeds": panel.seeds,
            "about": {name: arm.about for name, arm in panel.arms.items()},
            **vars(found),
        }
        for panel, found in zip(panels, rows, strict=True)
    ]
    return Report(
        title="Small diffusion language models with and without parametric memory",
        version=__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        command=command,
        quick=plan.is_quick,
        notes=tuple(notes),
        machine=Machine(
            device=name_of(plan.device),
            cores=os.cpu_count() or 1,
            torch=torch.__version__,
            python=platform.python_version(),
            others={"system": f"{platform.system()} {platform.machine()}"},
        ),
        seconds=seconds,
        tries=tuple(tries) or None,
        recall=Recall(floor=entropy_floor(plan.recall), leak=LEAK, **first),
        **second,
    )


def _seconds(panel: Panel, data: RecallData, device: torch.device) -> float:
    """Estimate a panel's seconds: time one training pass, and multiply by the number of passes."""
    plan = panel.plan
    batch = Collator(data.tokenizer.pad_token_id)(data.train[: plan.batch_size])
    model, input_ids, spent = new_model(plan, data, seed=0).to(device), batch["input_ids"].to(device), []
    for _ in range(8):
        start = time.perf_counter()
        model(input_ids).logits.float().logsumexp(-1).mean().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        spent.append(time.perf_counter() - start)
    training = plan.steps * sum(arm.step_cost for arm in panel.arms.values())
    words = sum(times * plan.conversations(times) for times in plan.times)
    answering = len(panel.arms) * words * plan.answer_steps * panel.answer_cost
    return sorted(spent)[len(spent) // 2] * len(panel.seeds) * (training + answering)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} seconds"
    return f"about {seconds / 60:.0f} minutes"


@contextmanager
def _single_thread() -> Iterator[None]:
    """Compute on one thread: more threads slow such small models, and one thread always sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
