"""One rank of distributed writes: `rank_worker.py RANK WORLD STORE OUT JSON-cases`; also imported for one process."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from memdlm.diffusion import Corrupted, Linear, maskable_positions, normalise
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.randomness import derive
from memdlm.training import Batch, score
from tiny import MASK, PAD, random_ids, rng, tiny

ROWS, WIDTH = 4, 14


def batch_of(rows: slice, *, is_trimmed: bool = False) -> Batch:
    """Rows of one fixed, ragged batch whose rows mask very different numbers of tokens.

    Trimmed, it is as wide as its longest row, as a collator leaves it.
    """
    clean = random_ids(ROWS, WIDTH, 5)
    keep = torch.arange(WIDTH) < torch.tensor([14, 9, 12, 6])[:, None]
    clean = clean.masked_fill(~keep, PAD)
    labels = clean.masked_fill(~keep, -100)
    t = torch.tensor([0.2, 0.4, 0.9, 0.6])
    is_masked = keep & (torch.rand(ROWS, WIDTH, generator=rng(2)) < t[:, None])
    clean, labels, keep, is_masked, t = (each[rows] for each in (clean, labels, keep, is_masked, t))
    if is_trimmed:
        longest = int(keep.sum(1).max())
        clean, labels, keep, is_masked = (each[:, :longest] for each in (clean, labels, keep, is_masked))
    return Batch(
        clean=clean,
        labels=labels,
        attention_mask=keep,
        is_padding=None,
        is_maskable=maskable_positions(labels, keep),
        noised=Corrupted(clean.masked_fill(is_masked, MASK), is_masked, t),
    )


def wrapped(model, kind: str):
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def run(options: dict, rows: slice, world: int = 1) -> dict[str, torch.Tensor]:
    """Write the rows, then one outer backward pass; returns fast weights, losses and the model's gradients."""
    model = tiny(options["family"], torch.float64).train()
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable()
    model = wrapped(model, options.get("wrapper", ""))
    config = MemoryConfig(
        inner_layer_fraction=0.5,
        inner_rank=4,
        inner_alpha=8.0,
        inner_lr=1.0,
        per_sample=False,
        sync_inner=options.get("sync", True),
        loss_norm_type=options.get("norm", "token"),
        loss_weight_type="scheduler",
        inner_loss_type=options.get("objective", "ce"),
        inner_score_fraction=options.get("fraction", 1.0),
        **options.get("memory", {}),
    )
    memory = ParametricMemory(model, config, mask_token_id=MASK)
    batch = batch_of(rows, is_trimmed=options.get("trimmed", False))
    generators = [derive("row", row) for row in range(ROWS)[rows]]
    with memory.write(batch.clean, batch.labels, batch.attention_mask, generators, anchor=batch.noised) as written:
        out = {f"fast/{name}": value.clone() for name, value in memory.fast.named().items()}
        lost = score(model, batch, schedule=Linear(), weighting="scheduler", lower_layers=memory.lower_layers)
        tokens = int(batch_of(slice(None)).is_maskable.sum())
        loss = normalise(lost.sums, lost.counts, "token", total_tokens=tokens, total_rows=ROWS) * world
        loss.squeeze().backward()
    out |= {"losses": written.losses, "grad_norms": written.grad_norms}
    for name, parameter in memory.model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            out[f"grad/{name}"] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return out


if __name__ == "__main__":
    rank, world, store, path, cases = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    share = ROWS // int(world)
    rows = slice(int(rank) * share, (int(rank) + 1) * share)
    torch.save([run(options, rows, int(world)) for options in json.loads(cases)], f"{path}.{rank}")
    dist.destroy_process_group()
