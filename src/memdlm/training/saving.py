"""Saving: a checkpoint is complete or absent; a memory's learned parameters have files of their own."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memdlm.files import writing
from memdlm.training.checkpoints import SAVING, STATE, move_files, publish, rotate
from memdlm.training.resuming import ResumingTrainer


class SavingTrainer(ResumingTrainer):
    """A trainer whose checkpoints a crash cannot damage."""

    _saving = False

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder of checkpoints; while one is being written, a folder of its own."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / SAVING) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, and move it to its place when all ranks are done."""
        folder = Path(self._get_output_dir(trial))
        growing, name = folder / SAVING, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(growing, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            with writing(folder / name):
                super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == growing:
            self.state.best_model_checkpoint = str(folder / Path(best).name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(growing / name / STATE))
            publish(growing / name, folder / name)
            growing.rmdir()
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def save_final(self, folder: str | Path) -> None:
        """Write weights (or the adapter) and tokenizer into `folder`; each file is complete or absent.

        Weights are saved as safetensors.
        """
        growing = Path(folder) / f"{SAVING}-final"
        if self.args.should_save:
            shutil.rmtree(growing, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with writing(folder):
            self.save_model(str(growing))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            move_files(growing, Path(folder))
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the model, and with it the memory's learned parameters."""
        super()._save(output_dir, state_dict)
        if self._learned is not None and self.args.should_save:
            self._learned.learned.save(self.args.output_dir if output_dir is None else output_dir)
