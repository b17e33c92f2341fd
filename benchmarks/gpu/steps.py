"""Training steps without and with memory, AdamW and gradient clipping included, at LLaDA-MoE's true layer shape.

    python benchmarks/gpu/steps.py

Weights, gradients and both moments are bfloat16 (8 bytes a parameter; an 80 GB card holds all layers); with gradient
checkpointing of the network on and off. The two kinds of step take turns, so their ratio is one of the same minute.
"""

from collections.abc import Callable
from functools import partial

import torch
from card import Card, Row, arguments, card_of, run_part, spread
from counting import flops
from shapes import MASK, Network, Shelf, ids_of
from torch import nn

from memdlm.diffusion import Corrupted, Linear, normalise
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.randomness import derive, uniform
from memdlm.training import Batch, score

BYTES = 10.0
"""Of a parameter: itself, its gradient, two moments, and some room for activations."""
ROWS, LENGTH = 2, 2048


def batch_of(model: nn.Module, rows: int, length: int) -> Batch:
    """Random tokens at the mean noise, t spread evenly over 0..1."""
    clean = ids_of(model, rows, length)
    t = (torch.arange(rows, device=clean.device) + 0.5) / rows
    is_masked = uniform(clean.shape, derive("noise"), clean.device) < t[:, None]
    return Batch(
        clean=clean,
        labels=clean,
        attention_mask=None,
        is_padding=None,
        is_maskable=torch.ones_like(is_masked),
        noised=Corrupted(clean.masked_fill(is_masked, MASK), is_masked, t),
    )


def steps_of(card: Card, model: nn.Module, *, has_update: bool) -> dict[str, Callable[[], None]]:
    """One step each, without and with the paper's memory of the batch."""
    batch = batch_of(model, ROWS, 64 if card.is_quick else LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=card.is_cuda)
    memory = ParametricMemory(
        model, MemoryConfig.paper(per_sample=False, loss_weight_type="scheduler"), mask_token_id=MASK
    )

    def finish(**options: object) -> None:
        lost = score(model, batch, schedule=Linear(), weighting="scheduler", **options)
        normalise(lost.sums, lost.counts, "token").squeeze().backward()
        if has_update:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()

    def memdlm() -> None:
        with memory.write(batch.clean, generator=derive("start"), anchor=batch.noised):
            finish(lower_layers=memory.lower_layers)

    return {"mdlm": finish, "memdlm": memdlm}


def measured(card: Card, shelf: Shelf, *, is_checkpointed: bool, has_update: bool) -> Row:
    found = shelf.of("lladamoe")
    prepare(found, is_checkpointed)
    steps = steps_of(card, found.model, has_update=has_update)
    seconds = card.in_turns(steps, 5)
    row: Row = {name: spread(seconds[name]) for name in steps}
    tokens = ROWS * (64 if card.is_quick else LENGTH)
    for name, step in steps.items():
        row[name] |= {
            "peak_bytes": card.peak_bytes(step),
            "flop": flops(step),
            "tokens_per_s": tokens / row[name]["median_s"],
        }
    ratios = {
        "time_over_mdlm": row["memdlm"]["median_s"] / row["mdlm"]["median_s"],
        "flop_over_mdlm": row["memdlm"]["flop"] / row["mdlm"]["flop"],
    }
    return {"rows": ROWS, "tokens": tokens, **found.about(), **row, **ratios}


def prepare(found: Network, is_checkpointed: bool) -> None:
    model = found.model.train()
    switch = model.gradient_checkpointing_enable if is_checkpointed else model.gradient_checkpointing_disable
    switch()


def main() -> int:
    options = arguments("steps", __doc__, budget=240)
    card = card_of(options)
    shelf = Shelf(card, {"bytes_per_parameter": BYTES})
    jobs = {
        f"{'with' if has_update else 'without'} AdamW, checkpointing {'on' if is_checkpointed else 'off'}": partial(
            measured, card, shelf, is_checkpointed=is_checkpointed, has_update=has_update
        )
        for is_checkpointed in (True, False)
        for has_update in (True, False)
    }
    return run_part("steps", jobs, options, {"rows": ROWS, "family": "lladamoe", "optimizer_states": "bfloat16"})


if __name__ == "__main__":
    raise SystemExit(main())
