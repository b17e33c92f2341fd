"""What a memory costs: a training step with and without it, and writes of 512 to 8192 tokens.

    python benchmarks/memory.py [--quick] [--training] [--out benchmarks/results/memory.json]

Medium mixture of experts (107 M parameters, float32, random weights), one thread, seconds of process CPU time (the
machine may be shared), medians over interleaved repetitions. Each write is compared with its floor, the parts that the
mathematics asks for, each timed in the same run, and with a plain transcription of the method (`benchmarks/plain.py`),
whose losses must agree. Peak memory is the growth of a fresh process's resident set.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from counting import flops
from peak import resident_mb
from plain import forget, loop_experts
from plain import write as plain_write
from torch import Tensor

from memdlm.diffusion import Corrupted, Linear, normalise, positions_of
from memdlm.diffusion.losses import Nats
from memdlm.memory import MemoryConfig, ParametricMemory, TrajectoryStep, run_inner_loop, trajectory
from memdlm.memory.trajectory import Anchor
from memdlm.models import LLaDAMoEConfig, ModelDenoiser, build_model
from memdlm.models.blocks.chunked_loss import values_in_chunks
from memdlm.models.networks.requests import Request
from memdlm.training import Batch, MemDLMTrainer, TrainingArguments, score
from memdlm.training.trainer import BARE_EVERY

MASK, LENGTHS = 32767, (512, 1024, 2048, 4096, 8192)


def medium() -> torch.nn.Module:
    config = LLaDAMoEConfig(
        vocab_size=32768,
        hidden_size=512,
        expert_intermediate_size=256,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=16384,
    )
    return build_model(config, seed=0).eval()


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(0, 32000, (rows, length), generator=torch.Generator().manual_seed(length))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


# Training steps ------------------------------------------------------------------------------------------------


def training_batch(length: int = 512) -> Batch:
    """2 x 512 tokens (or `length`) at the mean noise, t = 0.25 and 0.75."""
    clean, t = ids_of(2, length), torch.tensor([0.25, 0.75])
    is_masked = torch.rand(clean.shape, generator=generator()) < t[:, None]
    return Batch(
        clean=clean,
        labels=clean,
        attention_mask=None,
        is_padding=None,
        is_maskable=torch.ones_like(is_masked),
        noised=Corrupted(clean.masked_fill(is_masked, MASK), is_masked, t),
    )


def backward(model: torch.nn.Module, batch: Batch, **options: Any) -> None:
    score(model, batch, schedule=Linear(), weighting="scheduler", norm="token", **options).loss.backward()


def backward_unchunked(model: torch.nn.Module, batch: Batch, **options: Any) -> None:
    """The same, with the logits of all positions at once."""
    lost = score(model, batch, schedule=Linear(), weighting="scheduler", **options)
    normalise(lost.sums, lost.counts, "token").squeeze().backward()


FRACTIONS = (0.5, 0.25)


def training_steps(
    model: torch.nn.Module, length: int = 512
) -> tuple[dict[str, Callable[[], None]], Callable[[], None]]:
    """Forward and backward pass of one step, without and with memory, and the update (clipping, AdamW) that all share.

    The update is one optimizer's, of the same parameters, and refuses to run unless every one of them has a gradient.
    """
    batch = training_batch(length)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)

    def update() -> None:
        if any(parameter.grad is None for parameter in parameters):
            raise RuntimeError("a parameter has no gradient: the updates of the two sides would not be the same.")
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def with_memory(differentiate: Callable[..., None] = backward, **options: Any) -> Callable[[], None]:
        config = MemoryConfig(per_sample=False, loss_weight_type="scheduler", **options)
        memory = ParametricMemory(model, config, mask_token_id=MASK)

        def step() -> None:
            with memory.write(batch.clean, generator=generator(), anchor=batch.noised):
                differentiate(model, batch, lower_layers=memory.lower_layers)

        return step

    return {
        "mdlm": lambda: backward(model, batch),
        "memdlm": with_memory(),
        **{f"memdlm_score_fraction_{each}": with_memory(inner_score_fraction=each) for each in FRACTIONS},
        "memdlm_no_checkpointing": with_memory(inner_gradient_checkpointing=False),
        "mdlm_unchunked": lambda: backward_unchunked(model, batch),
        "memdlm_unchunked": with_memory(backward_unchunked),
    }, update


def measure_training(results: dict[str, Any], repetitions: int) -> None:
    """Steps and updates in turn, each timed apart, so that the two sides' updates can be seen to be the same."""
    model = medium()
    passes, update = training_steps(model)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    for repetition in range(repetitions + 1):
        for name, call in passes.items():
            begin = time.process_time()
            call()
            middle = time.process_time()
            update()
            # The first round makes the optimizer's state and warms caches.
            if repetition:
                seconds[name].append((middle - begin, time.process_time() - middle))
    counted = {name: flops(call) for name, call in passes.items()}
    model.zero_grad()
    results["training_step"] = {
        "machine": machine(),
        "repetitions": repetitions,
        "rows": {name: training_row(name, seconds, counted) for name in passes},
    }
    print(json.dumps(results["training_step"], indent=1), flush=True)


def training_row(name: str, seconds: dict[str, list[tuple[float, float]]], counted: dict[str, int]) -> dict[str, Any]:
    """Medians over rounds; ratios are of the same round, so that what slows a round down meets both sides."""
    rounds = list(zip(seconds[name], seconds["mdlm"], strict=True))
    return {
        "forward_and_backward_cpu_s": round(statistics.median(own[0] for own in seconds[name]), 4),
        "update_cpu_s": round(statistics.median(own[1] for own in seconds[name]), 4),
        "gflop": round(counted[name] / 1e9, 1),
        "step_over_mdlm": round(statistics.median(sum(own) / sum(mdlm) for own, mdlm in rounds), 3),
        "forward_and_backward_over_mdlm": round(statistics.median(own[0] / mdlm[0] for own, mdlm in rounds), 3),
        "flop_over_mdlm": round(counted[name] / counted["mdlm"], 3),
    }


def measure_training_peaks(results: dict[str, Any]) -> None:
    """Growth of the resident set over one whole step, and how it compares with all logits at once."""
    results.pop("training_pass_peak_mb", None)
    results["training_step_peak_mb"] = {
        length: {name: peak_mb(name, length) for name in PEAKS} for length in (512, 2048)
    }
    print(json.dumps(results["training_step_peak_mb"]), flush=True)


PEAKS = ("mdlm", "mdlm_unchunked", "memdlm", "memdlm_unchunked")


# What is logged ------------------------------------------------------------------------------------------------


class Repeated(torch.utils.data.Dataset):
    """A text as rows of a dataset."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = ids_of(1, 512 + index % 2)[0, :512]
        return {"input_ids": ids, "labels": ids}


def measure_logging(results: dict[str, Any], repetitions: int) -> None:
    """CPU seconds of the trainer's steps with memory: nothing logged, and everything logged at every step."""
    seconds: dict[str, list[float]] = {"no": [], "steps": []}
    for _ in range(repetitions):
        for strategy, found in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                arguments = TrainingArguments(
                    output_dir=folder,
                    max_steps=BARE_EVERY,
                    per_device_train_batch_size=2,
                    logging_strategy=strategy,
                    logging_steps=1,
                    **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True},
                    dataloader_pin_memory=False,
                    mem_enabled=True,
                )
                trainer = MemDLMTrainer(medium(), arguments, mask_token_id=MASK, train_dataset=Repeated())
                begin = time.process_time()
                trainer.train()
                found.append(time.process_time() - begin)
    logged = [one / other for one, other in zip(seconds["steps"], seconds["no"], strict=True)]
    results["logging"] = {
        "steps": BARE_EVERY,
        "cpu_s": {name: [round(each, 3) for each in found] for name, found in seconds.items()},
        "logging_steps_1_over_no_log": round(statistics.median(logged), 3),
    }
    print(json.dumps(results["logging"]), flush=True)


# Writes --------------------------------------------------------------------------------------------------------


def states_of(memory: ParametricMemory, clean: Tensor) -> list[TrajectoryStep]:
    g = generator()
    draw = lambda: torch.rand(clean.shape, generator=g)
    is_maskable = torch.ones_like(clean, dtype=torch.bool)
    is_masked = draw() < memory.config.prompt_mask_ratio
    anchor = Anchor(clean=clean, is_maskable=is_maskable, is_masked=is_masked, t=torch.full((1,), 0.2))
    return trajectory(memory.strategy.path(anchor, draw), anchor, mask_token_id=MASK, scored="student_masked")


def writes(
    model: torch.nn.Module, looped: torch.nn.Module, loops: list[Any], length: int
) -> dict[str, Callable[[], Any]]:
    clean = ids_of(1, length)
    memory = ParametricMemory(model, MemoryConfig(), mask_token_id=MASK)
    steps = states_of(memory, clean)
    memory.fast.reset(1, generator())
    start = {
        name.split(".")[-2]: value[:, 0].detach() for name, value in memory.fast.named().items() if "lora_A" in name
    }

    def library() -> list[float]:
        with memory.write(clean, generator=generator()) as written:
            return written.losses[:, 0].tolist()

    def plain() -> list[float]:
        losses = plain_write(looped, loops, clean, [step.is_masked for step in steps], start, MASK)
        forget(loops)
        return losses

    return {"library": library, "plain": plain}


def same_losses(model: torch.nn.Module, looped: torch.nn.Module, loops: list[Any]) -> float:
    """Largest relative difference of the two writes' losses on the same states from the same start."""
    clean = ids_of(1, 256)
    memory = ParametricMemory(model, MemoryConfig(), mask_token_id=MASK)
    steps = states_of(memory, clean)
    memory.fast.reset(1, generator())
    start = {
        name.split(".")[-2]: value[:, 0].detach() for name, value in memory.fast.named().items() if "lora_A" in name
    }
    theirs = plain_write(looped, loops, clean, [step.is_masked for step in steps], start, MASK)
    forget(loops)
    with memory.fast.attached():
        ours = run_inner_loop(
            steps, fast=memory.fast, loss=memory.loss, update=memory.update, denoise=ModelDenoiser(model)
        )
    memory.fast.erase()
    return max(abs(a - b) / b for a, b in zip(ours.losses[:, 0].tolist(), theirs, strict=True))


def floor_parts(model: torch.nn.Module, length: int) -> dict[str, Callable[[], Any]]:
    """What a write must compute: frozen blocks of each state, adapted block there and back, scored logits and dX."""
    clean = ids_of(1, length)
    memory = ParametricMemory(model, MemoryConfig(), mask_token_id=MASK)
    steps = states_of(memory, clean)
    memory.fast.reset(1, generator())
    first = len(model.model.layers) - 1
    with torch.no_grad():
        hidden = model(steps[0].ids, request=Request(stop_layer=first)).hidden

    def frozen() -> None:
        with torch.no_grad():
            for step in steps:
                model(step.ids, request=Request(stop_layer=first))

    def adapted() -> None:
        with memory.fast.attached():
            for _ in steps:
                out = model.model(inputs_embeds=hidden, request=Request(start_layer=first)).last_hidden_state
                torch.autograd.grad(out.sum(), memory.fast.tensors())

    def scored() -> None:
        for step in steps:
            positions = positions_of(step.is_scored)
            rows = hidden.flatten(0, 1)[positions].requires_grad_().clone()
            per_token = Nats(clean.flatten()[positions])
            values = values_in_chunks(per_token, rows, model.lm_head, model.lm_head.weight.shape[0], is_constant=True)
            torch.autograd.grad(values.sum(), rows)

    return {"frozen": frozen, "adapted": adapted, "scored": scored}


# Measuring -----------------------------------------------------------------------------------------------------


def interleaved(calls: dict[str, Callable[[], Any]], repetitions: int, *, warm: bool = True) -> dict[str, float]:
    """Median seconds of process CPU time of each call; the calls take turns, so that noise meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values() if warm else ():
        call()
    for _ in range(repetitions):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            seconds[name].append(time.process_time() - begin)
    return {name: round(statistics.median(each), 4) for name, each in seconds.items()}


def child(job: str, length: int) -> None:
    """Print the growth of this fresh process's peak resident set, in MB, over one call."""
    if job in ("library", "plain"):
        model = medium()
        loops = loop_experts(model) if job == "plain" else []
        model.requires_grad_(False)
        if job == "plain":
            call = plain_call(model, loops, length)
        else:
            memory = ParametricMemory(model, MemoryConfig(), mask_token_id=MASK)

            def call() -> None:
                with memory.write(ids_of(1, length), generator=generator()):
                    pass

        with torch.no_grad():
            model(ids_of(1, 16))
    else:
        model = medium()
        passes, update = training_steps(model, length)

        def call() -> None:
            passes[job]()
            update()

        # The first step makes the optimizer's state: a step like all others is measured.
        backward(model, training_batch(16))
        update()
    before = resident_mb("VmRSS", reset=True)
    call()
    print(resident_mb("VmHWM") - before)


def plain_call(model: torch.nn.Module, loops: list[Any], length: int) -> Callable[[], Any]:
    """The plain write, in a process that never ran the library's."""
    clean, g = ids_of(1, length), generator()
    experts = loops[-1].experts
    start = {
        name: torch.rand(16, 32, experts.sizes(name)[0], generator=g) * 0.08 - 0.04
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    u = torch.rand(clean.shape, generator=g)
    return lambda: plain_write(model, loops, clean, [u < 0.3, u < 0.2], start, MASK)


def peak_mb(job: str, length: int = 512, runs: int = 3) -> float:
    """Median over fresh processes."""
    command = [sys.executable, __file__, "--child", job, "--length", str(length)]
    grown = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(runs)]
    return round(statistics.median(grown), 1)


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "load_average": os.getloadavg(),
    }


def measure(lengths: tuple[int, ...], repetitions: int, out: Path, *, is_training_only: bool) -> None:
    """Measure everything; what is known so far is in `out` at any time."""
    results: dict[str, Any] = json.loads(out.read_text()) if is_training_only else {}
    results |= {} if is_training_only else {"machine": machine(), "repetitions": repetitions}
    measure_training(results, repetitions)
    out.write_text(json.dumps(results, indent=1) + "\n")
    measure_training_peaks(results)
    out.write_text(json.dumps(results, indent=1) + "\n")
    measure_logging(results, max(1, repetitions // 2))
    out.write_text(json.dumps(results, indent=1) + "\n")
    if is_training_only:
        return
    model = medium()
    model.requires_grad_(False)
    looped = medium().requires_grad_(False)
    loops = loop_experts(looped)
    results["largest_relative_loss_difference"] = same_losses(model, looped, loops)
    results["write"] = {}
    for length in lengths:
        parts = floor_parts(model, length)
        calls = {**writes(model, looped, loops, length), **parts}
        is_short = length <= 1024
        seconds = interleaved(calls, repetitions if is_short else 1, warm=is_short)
        floor = sum(seconds[name] for name in parts)
        counted = {name: flops(call) for name, call in calls.items()} if is_short else {}
        peak = {name: peak_mb(name, length, runs=3 if is_short else 1) for name in ("library", "plain")}
        results["write"][length] = {
            "cpu_s": seconds,
            "floor_cpu_s": round(floor, 4),
            "over_floor": round(seconds["library"] / floor, 3),
            "over_plain": round(seconds["library"] / seconds["plain"], 3),
            "gflop": {name: round(each / 1e9, 1) for name, each in counted.items()},
            "peak_mb": peak,
            "peak_over_plain": round(peak["library"] / peak["plain"], 3),
        }
        print(length, json.dumps(results["write"][length]), flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512 and 1024 tokens, one repetition")
    parser.add_argument("--training", action="store_true", help="measure training steps alone, anew")
    parser.add_argument("--peaks", action="store_true", help="measure the memory of training steps alone, anew")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=512, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        child(options.child, options.length)
        return
    lengths, repetitions = ((512, 1024), 1) if options.quick else (LENGTHS, options.repetitions)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.peaks:
        results = json.loads(options.out.read_text())
        measure_training_peaks(results)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        return
    measure(lengths, repetitions, options.out, is_training_only=options.training)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
