"""One rank of distributed training: `rank_train_worker.py OUT JSON-options`, ranks from the environment.

Also imported, for one process with the joined batch. The option `device` is "cpu" (gloo) unless it says "cuda" (NCCL).
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist

from memdlm.data.collate import Collator
from memdlm.diffusion import Linear
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.randomness import derive
from memdlm.training import MemDLMTrainer, TrainingArguments, memory_of, noise_batch, score
from memdlm.training.noise import TIMES, UNIFORM, WRITE, add_noise
from memdlm.training.rows import SAMPLE
from tiny import MASK, PAD, random_ids, tiny

LENGTHS = (14, 9, 12, 6, 11, 7, 13, 10) * 2
ROWS = [
    {"input_ids": row[:length].tolist(), "labels": [-100, -100, *row[2:length].tolist()]}
    for row, length in zip(random_ids(len(LENGTHS), 14, 3), LENGTHS, strict=True)
]
CONTEXTS = [ids.tolist() if row % 3 == 1 else [] for row, ids in enumerate(random_ids(len(LENGTHS), 9, 4))]
"""Texts for a memory alone; two rows of three have none."""
MEMORY = {"inner_layer_fraction": 0.5, "inner_rank": 4, "inner_alpha": 8.0, "inner_lr": 0.5}
STEP = 8
"""Rows of an optimizer step."""
# Padding that is neither seen nor learned: how far rows are padded depends on the batch they are in.
COLLATE = Collator(pad_token_id=PAD, supervise_padding="none")


def train(options, folder, *, world=1, accumulation=1):
    """Train four steps of 8 rows with the Trainer; returns its losses and the final weights."""
    dtype, is_cpu = getattr(torch, options.get("dtype", "float64")), device_of(options) == "cpu"
    model = tiny(options.get("family", "lladamoe"), dtype).train()
    memory = {f"mem_{name}": value for name, value in {**MEMORY, **options.get("memory", {})}.items()}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=STEP // world // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=is_cpu,
        ddp_backend=backend_of(options) if world > 1 else None,
        stratified_times=options.get("stratified", False),
        loss_norm_type=options.get("norm", "token"),
        block_size=options.get("block_size"),
        deepspeed=options.get("deepspeed"),
        **({"mem_enabled": True, **memory} if options.get("mem", True) else {}),
    )
    rows = ROWS
    if options.get("contexts"):
        rows = [row | {"context_ids": context} for row, context in zip(ROWS, CONTEXTS, strict=True)]
    # Several cards in one process would become torch's DataParallel.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = MemDLMTrainer(model, arguments, mask_token_id=MASK, train_dataset=rows, data_collator=COLLATE)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    figures = {
        name: torch.tensor([entry[name] for entry in history if name in entry])
        for name in ("loss", "nll", "grad_norm", *options.get("more", ()))
    }
    return {**figures, **{f"weight/{name}": value.detach().cpu() for name, value in model.state_dict().items()}}


def device_of(options):
    return options.get("device", "cpu")


def backend_of(options):
    return "gloo" if device_of(options) == "cpu" else "nccl"


def train_sharded(options, *, world=1, rank=0):
    """Train three steps with plain functions, on `fully_shard`ed blocks if there are several ranks."""
    model = tiny("lladamoe", torch.float64).train().to(device_of(options))
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device_of(options), (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    config = MemoryConfig(**MEMORY, per_sample=False, sync_inner=options.get("sync", True))
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        share = STEP // world
        samples = range(rank * share, (rank + 1) * share)
        inputs = {**COLLATE([ROWS[n] for n in samples]), SAMPLE: tuple(samples)}
        add_noise([inputs], seed=0, epoch=step, step=step, stratified=True, world_size=world)
        inputs = {
            name: each.to(model.device) if isinstance(each, torch.Tensor) else each for name, each in inputs.items()
        }
        batch = noise_batch(
            inputs,
            inputs[TIMES].double(),
            inputs[UNIFORM],
            schedule=Linear(),
            epsilon=1e-3,
            mask_token_id=MASK,
            spare_padding=False,
        )
        total = batch.is_maskable.sum()
        if world > 1:
            dist.all_reduce(total)
        rows = [derive(key) for key in inputs[WRITE]]
        with memory_of(memory, batch, pad_token_id=PAD, randomness=rows):
            totals = {"norm": "token", "total_tokens": total, "total_rows": STEP}
            lower = memory.lower_layers
            lost = score(model, batch, schedule=Linear(), weighting="scheduler", lower_layers=lower, **totals)
            loss = lost.loss * world
            loss.backward()
        mean = loss.detach() / world
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in model.named_parameters()}
    found = {"loss": torch.stack(losses), **{f"weight/{name}": value.detach() for name, value in weights.items()}}
    return {name: value.cpu() for name, value in found.items()}


if __name__ == "__main__":
    out, cases = sys.argv[1:]
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cases = json.loads(cases)
    if device_of(cases[0]) == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized() and "deepspeed" not in cases[0]:
        dist.init_process_group(backend_of(cases[0]))
    found = []
    for options in cases:
        if options.get("wrapper") == "fsdp":
            found.append(train_sharded(options, world=world, rank=rank))
        else:
            found.append(train(options, Path(out).parent / "run", world=world))
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()
