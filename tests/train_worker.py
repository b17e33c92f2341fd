"""One process of `memdlm train`: `train_worker.py JSON-options argv...`, which may kill itself on the way.

Options: kill, one of the places below, and at, the optimizer step at which it happens.
"""

import json
import os
import signal
import sys

import torch
from transformers import Trainer

import memdlm.training.trainer as ours
from memdlm.cli.main import main


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place, at):
    """Replace a function by one that kills the process at optimizer step `at`."""
    owner, name = {
        "in a step": (ours.MemDLMTrainer, "compute_loss"),
        "before the optimizer is saved": (Trainer, "_save_optimizer_and_scheduler"),
        "before the state is saved": (Trainer, "_save_rng_state"),
    }.get(place, (None, None))
    if owner is None:
        original = ours.publish
        ours.publish = lambda finished, target: die() if target.name.endswith(f"-{at}") else original(finished, target)
        return
    real = getattr(owner, name)

    def killing(self, *args, **kwargs):
        if self.state.global_step == at:
            die()
        return real(self, *args, **kwargs)

    setattr(owner, name, killing)


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    if "kill" in options:
        arm(options["kill"], options["at"])
    sys.exit(main(["train", *sys.argv[2:]]))
