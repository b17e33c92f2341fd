"""Saving and resuming: checkpoints are whole or absent; adapters and learned writes have files of their own."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from memdlm.files import writing
from memdlm.models.adapter_files import reload_outer_adapter
from memdlm.models.outer_adapters import adapter_config
from memdlm.training.checkpoints import SAVING, STATE, move_files, publish, rotate
from memdlm.training.learned import LearnedTraining


class SavingTrainer(Trainer):
    """`transformers.Trainer` with checkpoints that a crash cannot spoil."""

    _saving = False
    _learned: LearnedTraining | None = None

    def _get_output_dir(self, trial: Any) -> str:
        """Say where checkpoints go: while one is written, into a folder of its own."""
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / SAVING) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside and move it to its place when all ranks are done: it is whole or absent."""
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
        """Write weights (or the adapter) and tokenizer into `folder`, as safetensors; each file is whole or absent."""
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Resume: an outer adapter reads its own file, whose experts transformers does not know."""
        target = self.model if model is None else model
        if adapter_config(target) is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            reload_outer_adapter(target, resume_from_checkpoint)
        if self._learned is not None:
            self._learned.learned.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint (`load_best_model_at_end`), as when resuming."""
        if adapter_config(self.model) is None:
            super()._load_best_model()
        else:
            reload_outer_adapter(self.model, self.state.best_model_checkpoint)
        if self._learned is not None:
            self._learned.learned.load(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the model, and beside it what its memory has learned."""
        super()._save(output_dir, state_dict)
        if self._learned is not None and self.args.should_save:
            self._learned.learned.save(self.args.output_dir if output_dir is None else output_dir)
