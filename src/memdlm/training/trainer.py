"""`transformers.Trainer` for masked diffusion with parametric memory: its flags, its resume, its launchers."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState

from memdlm.diffusion.losses import MaskedLoss, normalise
from memdlm.diffusion.schedules import make_schedule
from memdlm.errors import ConfigError
from memdlm.memory.batch_mix import writes_chunks
from memdlm.memory.inner_loop import Written
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern, SlidingWindow
from memdlm.models.border.block_diffusion import prepare_block_diffusion
from memdlm.randomness import Randomness, derive
from memdlm.training.arguments import TrainingArguments
from memdlm.training.guarding import GuardedTrainer
from memdlm.training.learned import LearnedTraining
from memdlm.training.noise import SOFT, TIMES, UNIFORM, WRITE, add_noise, host_group
from memdlm.training.objective import OuterObjective
from memdlm.training.outer import Batch, memory_of, reading_rows, rows_with_context
from memdlm.training.rows import SAMPLE, EpochSampler, Numbered, NumberedCollator, lengths_of, require_context
from memdlm.training.tracking import NO_CONTEXT, NO_MEMORY, Means, Speed, row_columns, row_metrics, safe_exp

logger = logging.getLogger(__name__)

MODES = ALONE, TEXT, BOTH, OTHER = "memory alone", "text alone", "both", "another row's memory"
"""What an optimizer step trains with, in the order of `BatchShares`."""
_NAMES = {ALONE: "nll_memory_alone", BOTH: "nll_memory", OTHER: "nll_memory_other"}
BARE_EVERY = 8
"""At most one in this many optimizer steps makes a pass without memory for the log alone, a fifth more work."""
TOKENS, ROWS = "step_tokens", "step_rows"
"""Batch entries, scalars: the denominators of the loss, counted over the whole optimizer step on all ranks."""


class MemDLMTrainer(GuardedTrainer):
    """Train a masked diffusion language model, with memory if `args.mem_enabled`.

    It logs, besides transformers' own metrics and all per maskable token: `nll` and `ppl`, the bound without memory;
    `nll_memory`, the bound with the memory that training writes (`nll_memory_alone` on the steps of `mem_batch_mix`
    that see no further than `mem_batch_reach`, `nll_memory_other` on those that read the memory of the next row). With
    `mem_write_source=context`, rows whose context is empty are trained without memory: `nll` and `nll_memory` are those
    of the other rows, `nll_no_context` is theirs (in training, on the steps that write).
    With the published `mem_write_source=response` the memory has seen the labels it is scored on: compare models by
    `nll`, never by `nll_memory`. While memory is on, training measures `nll` only on logged steps, and at most once
    in `BARE_EVERY` steps, over all rows of the step; with more frequent logging some logs lack it. Evaluation noise
    is the same at every evaluation, and independent of training noise. `nll_t0.2`, `nll_t0.4`, ... are `nll` by
    time. With memory: `inner_loss_1`, ... and `inner_grad_norm_1`, ... (before each inner update), and `fast_norm`.
    `grad_norm` is that of the outer gradient alone. With soft-masking, training logs `nll_soft` instead of `nll`:
    rows that see a first pass's predictions give no bound. Evaluation shows no predictions and logs `nll`, a bound.

    `processing_class` is the tokenizer; `mask_token_id` overrides its mask token. Raises ConfigError when both are
    missing.
    """

    args: TrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        tokenizer = kwargs.get("processing_class")
        found = mask_token_id if mask_token_id is not None else getattr(tokenizer, "mask_token_id", None)
        if found is None:
            raise ConfigError(
                "mask_token_id: the tokenizer has no mask token and none was given. Load it with "
                "memdlm.load_tokenizer, or pass mask_token_id."
            )
        if kwargs.get("compute_metrics") is not None:
            raise ConfigError(
                "compute_metrics: the trainer computes its own metrics (nll, ppl); use a callback for others."
            )
        super().__init__(model=model, args=args, compute_metrics=_row_metrics, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError("nn.DataParallel is not supported; launch one process per GPU (accelerate launch).")
        # The loss of compute_loss is already divided by the totals of the whole optimizer step.
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = True, True
        self._loss_shifts_labels = False
        self.mask_token_id: int = int(found)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_token_id: int = int(found if pad is None else pad)
        self.schedule = make_schedule(args.schedule)
        if args.block_size is not None:
            prepare_block_diffusion(model, args.block_size)
        self.memory = None if args.memory is None else self._new_memory(model)
        self._learned = self._new_learned()
        if args.memory is not None and args.memory.write_source == "response":
            logger.info(
                "mem_write_source=response: memory is written from the labels that the loss then scores, as published; "
                "compare models by nll, never by nll_memory."
            )
        self.objective = OuterObjective(
            options=args.diffusion,
            schedule=self.schedule,
            mask_token_id=self.mask_token_id,
            spare_padding=args.memory is not None and args.memory.pad_unmask_mode == "both",
        )
        self._hosts = host_group() if args.stratified_times and self.args.world_size > 1 else None
        self._open = ExitStack()
        self._means, self._speed = Means(), Speed(self.model)
        self.data_collator = NumberedCollator(self.data_collator)  # type: ignore[has-type]
        self._epoch = 0
        self._sampler: EpochSampler | None = None
        self.add_callback(_RunCallback(self))

    def _new_memory(self, model: nn.Module) -> ParametricMemory:
        return ParametricMemory(
            model,
            self.args.memory,
            mask_token_id=self.mask_token_id,
            schedule=self.schedule,
            right_shift_logits=self.args.right_shift_logits,
        )

    def _new_learned(self) -> LearnedTraining | None:
        """Draw the learned start from this run's seed, unless the model came with one."""
        if self.memory is None or self.memory.learned is None:
            return None
        if self.memory.folder is None:
            self.memory.learn_from(self.args.seed)
        callback = LearnedTraining(self.memory.learned, self.accelerator, self.args.max_grad_norm)
        self.add_callback(callback)
        return callback

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; the memory's learned parameters get groups of their own."""
        optimizer = super().create_optimizer(model)
        if self._learned is not None:
            self._learned.add_to(optimizer)
        return optimizer

    # Data -----------------------------------------------------------------------------------------------------

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Number the rows: their noise depends on their numbers."""
        if isinstance(dataset, torch.utils.data.IterableDataset):
            raise ConfigError(
                "train_dataset and eval_dataset must give rows by index; a stream (IterableDataset) does not."
            )
        return super()._get_dataloader(Numbered(dataset), *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Visit rows in an order that depends on seed and epoch alone."""
        rows = self.train_dataset
        if self.memory is not None and self.memory.config.write_source == "context":
            require_context(rows)
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        lengths = lengths_of(rows, self.args.length_column_name) if strategy == "group_by_length" else None
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = EpochSampler(len(rows), seed, lengths=lengths, batch=batch)
        return self._sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Visit rows in their order."""
        return torch.utils.data.SequentialSampler(eval_dataset)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the rows and their noise; called at the start of every epoch."""
        self._epoch = epoch
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)

    # Training -------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Collect the batches of one optimizer step; add its noise and its denominators to each."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        add_noise(
            batches,
            seed=self.args.seed,
            epoch=self._epoch,
            step=self.state.global_step,
            stratified=self.args.stratified_times,
            shape=self.args.diffusion.noise_shape,
            world_size=self.args.world_size,
            hosts=self._hosts,
        )
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        self._speed.add(tokens, sum(map(self.objective.passed, batches)))
        for batch in batches:
            batch.update({name: batch[name].to(device, non_blocking=True) for name in (TIMES, UNIFORM, SOFT)})
        counted = [self.objective.learnable(batch).sum().to(device, non_blocking=True) for batch in batches]
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        rows = torch.full_like(nothing, sum(len(batch["input_ids"]) for batch in batches))
        totals = torch.stack([torch.stack([nothing, *counted]).sum(), rows, self._watch.flag()])
        tokens, rows, unsound = self.accelerator.reduce(totals, reduction="sum").unbind()
        self._stop_soon_if(unsound)
        for batch in batches:
            batch.update({TOKENS: tokens, ROWS: rows})
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run one forward and backward pass; a memory stays open until both are done."""
        # Gradient checkpointing reruns layers during the backward pass, and they must read the same memory.
        with self._open:
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the outer loss of one micro-batch, divided by the totals of its optimizer step."""
        if return_outputs:
            raise ConfigError(
                "compute_loss(return_outputs=True): outputs of a noised batch mean nothing; use evaluate."
            )
        batch = self.objective.noised(inputs, inputs[TIMES], inputs[UNIFORM])
        # Data-parallel training averages gradients over ranks; the denominators are already global.
        return self._outer_loss(model, batch, inputs) * self.args.world_size

    def _outer_loss(self, model: nn.Module, batch: Batch, inputs: Mapping[str, Any]) -> Tensor:
        """Return this micro-batch's part of the step's loss, [], mixed from those with and without memory."""
        mode, pattern = self._mode()
        mix = 1.0 if self.memory is None or mode == TEXT else self.memory.config.outer_mix
        totals = {"total_tokens": inputs[TOKENS].clamp_min(1), "total_rows": inputs[ROWS]}
        loss: Tensor | float = 0.0
        if mix > 0 or self._is_bare_step():
            with self._without_trace() if mix == 0 else nullcontext():
                own = model if self.memory is None or mix > 0 else self.memory.model
                is_soft = self.objective.softens(inputs)
                honest = self.objective.score(own, batch, is_soft=is_soft, totals=totals)
            name = "nll" if is_soft is None else "nll_soft"
            bound, counts, times = honest.parts.bound, honest.parts.counts, honest.parts.t
            is_counted = self._has_context(batch)[:, None]
            self._means.add_rows(name, bound.where(is_counted, 0.0), counts.where(is_counted, 0), times)
            loss = mix * honest.loss if mix > 0 else 0.0
            if mix == 1:
                return honest.loss
        if self.memory is None:
            raise AssertionError("without memory, mix is 1")
        rows = [derive(key) for key in inputs[WRITE]]
        written = self._written(batch, rows, pattern, is_of_next_row=mode == OTHER)
        readers = reading_rows(self.memory.config, batch, is_of_next_row=mode == OTHER)
        self._count_write(self._open.enter_context(written), is_read=readers is None or len(readers) > 0)
        lost = self.objective.score(model, batch, self.memory.lower_layers, pattern, totals=totals)
        self._count_rows(_NAMES[mode], lost, self._chosen(batch, readers))
        # Also where there are none, as all ranks have to count the same.
        self._count_rows(NO_CONTEXT, lost, ~self._has_context(batch))
        return loss + (1 - mix) * lost.loss

    def _has_context(self, batch: Batch) -> Tensor:
        """Return [B], false at the rows that are trained without memory as they have no context."""
        return self._chosen(batch, None if self.memory is None else rows_with_context(self.memory.config, batch))

    def _chosen(self, batch: Batch, rows: Sequence[int] | None) -> Tensor:
        """Return [B], true at the `rows`; None: everywhere."""
        is_chosen = torch.full((len(batch.clean),), rows is None, device=batch.clean.device)
        if rows:
            is_chosen.index_fill_(0, torch.tensor(rows).to(is_chosen.device, non_blocking=True), True)
        return is_chosen

    def _count_rows(self, name: str, lost: MaskedLoss, is_counted: Tensor) -> None:
        """Count the bound of the rows that `is_counted` [B] has."""
        bound = lost.bound.double().where(is_counted, 0.0)
        self._means.add(name, bound.sum(), lost.counts.where(is_counted, 0).sum())

    def _mode(self) -> tuple[str, AttentionPattern | None]:
        """Return what this optimizer step trains with (`mem_batch_mix`; the same on all ranks), and its attention."""
        config = None if self.memory is None else self.memory.config
        if config is None or config.batch_shares is None or config.batch_reach is None:
            return BOTH, None
        drawn = torch.rand((), generator=derive("batch mix", self.args.seed, self.state.global_step)).item()
        # The last kind with a share is also drawn where the shares' sum is rounded to less than 1.
        kinds = [(kind, share) for kind, share in zip(MODES, config.batch_shares, strict=True) if share]
        ends = accumulate(share for _, share in kinds)
        mode = next((kind for (kind, _), end in zip(kinds, ends, strict=True) if drawn < end), kinds[-1][0])
        return mode, SlidingWindow(config.batch_reach) if mode == ALONE else None

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        """Build no graph and keep the global random state: dropout must not depend on what is logged."""
        device = self.args.device
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices, device_type="cuda"):
            yield

    def _is_bare_step(self) -> bool:
        """Whether this step makes a pass without memory for the log alone; the same on all ranks and when resumed."""
        if self.args.logging_strategy == "no":
            return False
        interval = max(1, int(self.state.logging_steps)) if self.args.logging_strategy == "steps" else 1
        step = self.state.global_step + 1
        if step == 1 and self.args.logging_first_step:
            return True
        # The first logged step of every BARE_EVERY steps, counted from the first.
        return step % interval == 0 and (step - 1) // BARE_EVERY > (step - 1 - interval) // BARE_EVERY

    # Evaluation -----------------------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (loss without memory, the rows' bounds with and without, see `row_columns`, counts [B])."""
        inputs = self._prepare_inputs(inputs)
        batch = self.objective.evaluated(inputs, self.args.seed, inputs[SAMPLE])
        with torch.no_grad(), self.compute_loss_context_manager():
            lost = self.objective.score(model, batch)
            loss = normalise(lost.sums, lost.counts, self.args.loss_norm_type).squeeze(0)
        with_memory = torch.full_like(lost.bound, NO_MEMORY)
        if self.memory is not None and rows_with_context(self.memory.config, batch) != ():
            randomness = [derive("evaluation write", self.args.seed, sample) for sample in inputs[SAMPLE]]
            with torch.no_grad(), self._written(batch, randomness, is_alone=True):
                with_memory = self.objective.score(model, batch, self.memory.lower_layers).bound
            with_memory = with_memory.where(self._has_context(batch), NO_MEMORY)
        rows = row_columns(lost.parts.bound, with_memory, lost.parts.counts, lost.parts.t)
        return (loss, None, None) if prediction_loss_only else (loss, rows, lost.counts)

    # Shared ---------------------------------------------------------------------------------------------------

    def _written(
        self,
        batch: Batch,
        randomness: Randomness,
        attention_pattern: AttentionPattern | None = None,
        *,
        is_alone: bool = False,
        is_of_next_row: bool = False,
    ) -> Any:
        if self.memory is None:
            raise AssertionError("only called while memory is on")
        return memory_of(
            self.memory,
            batch,
            pad_token_id=self.pad_token_id,
            randomness=randomness,
            is_alone=is_alone,
            is_read_at_anchor=self.args.block_size is None,
            # An evaluation, which is alone, always writes in the same way.
            is_whole=not is_alone and not writes_chunks(self.memory.config.chunk_share, self.state.global_step),
            attention_pattern=attention_pattern,
            is_of_next_row=is_of_next_row,
        )

    # Logging --------------------------------------------------------------------------------------------------

    def _count_write(self, written: Written, *, is_read: bool) -> None:
        """Count the losses and gradient norms before the inner updates, and the norm of the fast weights.

        Nothing counts where no row reads what was written.
        """
        if self.memory is None:
            raise AssertionError("only called while memory is on")
        count = int(is_read)
        for step, (loss, norm) in enumerate(zip(written.losses, written.grad_norms, strict=True), start=1):
            self._means.add(f"inner_loss_{step}", loss.sum() * count, loss.numel() * count)
            self._means.add(f"inner_grad_norm_{step}", norm.sum() * count, norm.numel() * count)
        squares = [value.detach().double().square().sum() for value in self.memory.fast.tensors()]
        self._means.add("fast_norm", torch.stack(squares).sum().sqrt() * count, count)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics since the last log to transformers' training metrics."""
        if "loss" in logs:
            logs |= self._means.read(lambda sums: self.accelerator.reduce(sums, reduction="sum"))
            if "nll" in logs:
                logs["ppl"] = safe_exp(logs["nll"])
            logs |= self._speed.read(self.args.device)
        super().log(logs, *args, **kwargs)


class _RunCallback(TrainerCallback):
    """Tells the trainer which epoch begins, and keeps this run's intervals after a resume."""

    def __init__(self, trainer: MemDLMTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Use this run's intervals to log, evaluate and save, not those in the checkpoint's state."""
        state.compute_steps(args, state.max_steps)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass the epoch on; after a resume, the state's epoch has a fraction."""
        self.trainer.set_epoch(math.floor((state.epoch or 0) + 1e-6))


def _row_metrics(predicted: EvalPrediction) -> dict[str, float]:
    return row_metrics(torch.from_numpy(predicted.predictions))
