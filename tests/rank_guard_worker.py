"""One rank of two: `rank_guard_worker.py FOLDER`. Trains, resumes, takes the best; then one rank diverges."""

import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist

from memdlm.errors import DivergedError
from run_kinds import is_same, new_model, state, trainer_of


def main(folder, rank):
    """Return what this rank saw, for JSON."""
    more = {"ddp_backend": "gloo", "per_device_train_batch_size": 2, "lr_scheduler_type": "constant"}
    whole = trainer_of(new_model(folder, "lladamoe", "full"), folder / "whole", "learned", **more)
    base = state(whole)
    whole.train()
    again = trainer_of(new_model(folder, "lladamoe", "full"), folder / "again", "learned", **more)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    bad = trainer_of(new_model(folder, "lladamoe", "full"), folder / "bad", logging_steps=50, save_steps=50, **more)
    real = bad.compute_loss

    def spoilt(*args, **kwargs):
        loss = real(*args, **kwargs)
        # A number is added: nothing of it reaches a gradient, and so the other rank.
        return loss + math.nan if rank == 1 and bad.state.global_step == 1 else loss

    bad.compute_loss = spoilt
    message, steps = "it went on", None
    try:
        bad.train()
    except DivergedError as error:
        message, steps = str(error), bad.state.global_step
    return {
        "resumed": is_same(state(again), state(whole)),
        "moved": not is_same(state(whole), base),
        "message": message,
        "steps": steps,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    if rank == 0:
        new_model(folder, "lladamoe", "full")
    dist.barrier()
    (folder / f"seen-{rank}.json").write_text(json.dumps(main(folder, rank)))
    dist.destroy_process_group()
