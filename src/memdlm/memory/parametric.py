"""A model's parametric memory: write a text into fast weights, read it through any call, leave no trace."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedTokenizerBase

from memdlm.diffusion.masking import Corrupted, maskable_positions
from memdlm.diffusion.schedules import Linear, Schedule
from memdlm.errors import ConfigError
from memdlm.memory.checking import check_parts, check_text, warn_if_long
from memdlm.memory.chunks import Text
from memdlm.memory.config import MemoryConfig
from memdlm.memory.fast_weights import FastWeights
from memdlm.memory.files.exporting import WrittenText, check_fits, check_written, exported, packed
from memdlm.memory.files.fingerprint import Identity
from memdlm.memory.files.packing import unpack
from memdlm.memory.files.saved import SavedMemory, read_memory
from memdlm.memory.inner_loop import InnerLoss, Written
from memdlm.memory.learned import LearnedWrite, saved_config
from memdlm.memory.outer_gradient import check_attention
from memdlm.memory.sites import adapted_blocks, find_sites
from memdlm.memory.stepwise import Writing
from memdlm.memory.write_gate import width_below
from memdlm.memory.write_pattern import write_pattern
from memdlm.memory.writer import Writer
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.lora.wrappers import unwrap, unwrap_parallel
from memdlm.models.networks.checking import check_kind
from memdlm.models.networks.lower_layers import LowerLayers, SharedLowerLayers
from memdlm.models.networks.shifting import shift_of
from memdlm.models.networks.soundness import blaming
from memdlm.options import from_mapping
from memdlm.randomness import Randomness, derive
from memdlm.types import Ids, PositionSet


class ParametricMemory:
    """Fast weights of `model`, written along a denoising trajectory.

        memory = ParametricMemory(model, MemoryConfig(), mask_token_id=tokenizer.mask_token_id)
        with memory.write(input_ids) as written:
            logits = model(input_ids=other_ids).logits      # reads the memory
        # here the model is bit for bit what it was

    Nothing is added to the model: `state_dict()`, `parameters()` and the training mode never change, and a copy made
    inside a block is a bare model. One block can be open per model at a time, and the thread that opened it alone may
    call the model meanwhile (ConfigError): several texts at once are the rows of one write. `process_group` holds the
    ranks that `mem_sync_inner` joins (None: all). With the `tokenizer`, saved memories are refused under another one.
    `learned` is another memory's, to be shared (None: that of the model's folder, or a new one), see `with_options`.
    Raises ConfigError when a target names no projection of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MemoryConfig | None = None,
        *,
        mask_token_id: int,
        schedule: Schedule | None = None,
        right_shift_logits: bool | None = None,
        attention_pattern: AttentionPattern | None = None,
        process_group: ProcessGroup | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        learned: LearnedWrite | None = None,
    ) -> None:
        check_parts(model, config, mask_token_id, schedule, attention_pattern, tokenizer, right_shift_logits)
        check_kind(learned, (LearnedWrite, type(None)), "learned", "what another memory of this model learned, or None")
        folder = getattr(unwrap(model), "memory_folder", None) or getattr(model, "memory_folder", None)
        if config is None:
            config = MemoryConfig() if folder is None else saved_config(folder)
        self.config = config
        self.model, self.mask_token_id = unwrap_parallel(model), mask_token_id
        self.schedule = Linear() if schedule is None else schedule
        self.process_group = process_group
        self.right_shift_logits = shift_of(model, right_shift_logits)
        self._given_pattern = attention_pattern
        self.attention_pattern = write_pattern(unwrap(model), self.config, attention_pattern)
        self.strategy = self.config.strategy()
        self.update = self.config.update()
        self.loss = InnerLoss(
            objective=self.config.objective(),
            schedule=self.schedule,
            weighting=self.config.loss_weight_type or "uniform",
            norm=self.config.loss_norm_type or "token",
        )
        sites = find_sites(model, self.config.targets, self.config.inner_layer_fraction)
        self.first_block, self._adapted = adapted_blocks(model, self.config.inner_layer_fraction)
        """The first block with fast weights; those below compute the same whatever is written."""
        self.fast = FastWeights(sites, self.config.adapter(), network=unwrap(model), blocks=self._adapted)
        if self.config.outer_gradient != "first_order":
            check_attention(model)
        self.folder: str | None = folder
        if learned is not None and self.config.is_learned:
            self.learned: LearnedWrite | None = learned.with_config(self.config, self.fast)
        else:
            self.learned = self._new_learned(0)
            if folder is not None and self.learned is not None:
                self.learned.load(folder)
        self._identity = Identity(self.fast.network, tokenizer, mask_token_id)
        self._source: WrittenText | SavedMemory | None = None
        """What the open block was made from."""
        self._lower: SharedLowerLayers | None = None

    def with_options(self, **options: Any) -> "ParametricMemory":
        """Return a memory of the same network, with this one's learned start, rates and gate, and other options.

            in_chunks = memory.with_options(chunk_length=512, chunk_overlap=16)

        `options` are fields of MemoryConfig. What was learned is shared: a training of one of the two changes both.
        Raises ConfigError for an unknown option, and for one that a learned start was not trained with (its rank, its
        steps, its rates), unless learn_start, learn_lr and write_gate are switched off with it.
        """
        config = from_mapping(MemoryConfig, dataclasses.asdict(self.config) | options, "memory")
        other = ParametricMemory(
            self.model,
            config,
            mask_token_id=self.mask_token_id,
            schedule=self.schedule,
            right_shift_logits=self.right_shift_logits,
            attention_pattern=self._given_pattern,
            process_group=self.process_group,
            learned=self.learned,
        )
        other._identity = self._identity
        return other

    def learn_from(self, *keys: int | str) -> None:
        """Begin anew with a learned start that depends on `keys`, and rates of `mem_inner_lr`."""
        self.learned = self._new_learned(*keys)

    def _new_learned(self, *keys: int | str) -> LearnedWrite | None:
        if not self.config.is_learned:
            return None
        updates, width = self.strategy.num_inner_steps * self.config.num_inner_epochs, 0
        if self.config.write_gate != "none":
            width = width_below(self.model, self.first_block)
        return LearnedWrite(self.config, self.fast, updates, *keys, width=width)

    @contextmanager
    def write(
        self,
        input_ids: Ids,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: Randomness | None = None,
        *,
        anchor: Corrupted | None = None,
        is_padding: PositionSet | None = None,
        is_alone: bool = False,
        is_read_at_anchor: bool = True,
        is_whole: bool = False,
        attention_pattern: AttentionPattern | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> Iterator[Written]:
        """Write `input_ids` [B, L]; inside the block every call of the model reads the result.

        `labels` (default: the ids) are -100 where a token is not to be learned; positions that a 2-D
        `attention_mask` hides, and with `mem_pad_unmask_mode` the collator's `is_padding`, are left out too.
        `anchor` is the noised batch that will be read (training); without one, each learnable token is masked with
        probability `mem_prompt_mask_ratio` (inference). With a memory per row, row i of any later call reads memory
        i (calls with a whole multiple of B rows: neighbouring rows share one). `generator` draws the start of the
        fast weights and the masks: one for the batch or one per row; None: a fixed one. With `mem_sync_inner` all
        ranks must write at the same time, unless the write `is_alone`. Unless `is_read_at_anchor`, the caller reads
        nothing through `lower_layers`, and no graph of the anchor's lower blocks is kept. A write that `is_whole` has
        one piece, whatever `mem_chunk_length` is. `attention_pattern` is this write's; None: the memory's. `on_chunk`
        is told how many columns are written (with `mem_chunk_length`, several times).

        Raises DataError for malformed ids, ConfigError when a block of this model is open already, and, unless the
        model is in training mode, NotFiniteError when the memory or the loss under it is not finite.
        """
        check_text(self.model, input_ids, labels, attention_mask, generator, anchor, is_padding, attention_pattern)
        length = None if is_whole else self.config.chunk_length
        warn_if_long(self.model, min(input_ids.shape[1], length or input_ids.shape[1]))
        randomness = derive("memdlm.write", 0) if generator is None else generator
        # In training, the outer loss continues from what the write computed below the fast weights.
        is_tracked = torch.is_grad_enabled() and (self.config.is_learned or self.config.outer_gradient != "first_order")
        pattern = self.attention_pattern if attention_pattern is None else attention_pattern
        is_read_at_anchor = is_read_at_anchor and anchor is not None and torch.is_grad_enabled()
        writer = self._writer(pattern, is_tracked=is_tracked, is_read_at_anchor=is_read_at_anchor, is_whole=is_whole)
        with self._opened("write"):
            # Gradients are needed even where the caller switched them off; the block itself is left as it is.
            with torch.inference_mode(False), torch.enable_grad():
                text = self._begun(input_ids, labels, attention_mask, randomness, anchor, is_padding)
            with self.fast.attached():
                with torch.inference_mode(False), torch.enable_grad():
                    written, self._lower = writer.write(text, randomness, is_alone=is_alone, on_chunk=on_chunk)
                # In training the trainer looks, where it waits for the device anyway.
                if not self.model.training:
                    with blaming(self.model):
                        check_written(written.losses[-1], self.fast.tensors())
                self._source = WrittenText(text.clean, text.is_maskable, written)
                yield written if self._is_per_sample else written.of_one()

    def writing(
        self,
        input_ids: Ids,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generator: Randomness | None = None,
    ) -> Writing:
        """Begin a write that is done gradient by gradient; in between the model is free, for other memories too.

        The result is that of `write` with the same arguments, and so are the errors. It is not differentiated, and this
        process does it alone. One memory object does one such write at a time (ConfigError).
        """
        check_text(self.model, input_ids, labels, attention_mask, generator, None, None, None)
        warn_if_long(self.model, min(input_ids.shape[1], self.config.chunk_length or input_ids.shape[1]))
        if self.fast.num_samples:
            raise ConfigError("this memory is being written; end that write first, or make another ParametricMemory.")
        randomness = derive("memdlm.write", 0) if generator is None else generator
        writer = self._writer(self.attention_pattern, is_tracked=False, is_read_at_anchor=False)
        with torch.inference_mode(False), torch.enable_grad():
            text = self._begun(input_ids, labels, attention_mask, randomness, None, None)
        length, overlap = self.config.chunk_length, self.config.chunk_overlap
        total = len(list(text.chunks(length, overlap))) * self.strategy.num_inner_steps * self.config.num_inner_epochs
        return Writing(
            self.model,
            self.fast,
            text,
            writer.steps(text, randomness, is_alone=True, on_chunk=None),
            total=total,
            export=lambda source, row: exported(
                source, self.fast, row, self.config, self._identity.fingerprint(self.learned)
            ),
        )

    def _begun(
        self,
        input_ids: Ids,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        randomness: Randomness,
        anchor: Corrupted | None,
        is_padding: PositionSet | None,
    ) -> Text:
        """Put the fast weights to their start, and return what is written into them."""
        clean, labels, mask = _usable(input_ids), _usable(labels), _usable(attention_mask)
        is_maskable = maskable_positions(clean if labels is None else labels, mask)
        if is_padding is not None and self.config.pad_unmask_mode != "none":
            is_maskable = is_maskable & ~is_padding
        start = None if self.learned is None else self.learned.start()
        per_sample = self._is_per_sample
        samples, drawing = (clean.shape[0] if per_sample else 1), _for_start(randomness, per_sample)
        self.fast.reset(samples, drawing, start, dropout=self.config.inner_dropout)
        return Text(clean, is_maskable, mask, anchor)

    @property
    def _is_per_sample(self) -> bool:
        return self.config.per_sample is not False

    def export(self, row: int | None = None) -> SavedMemory:
        """Inside an open block: return what was written as a thing to keep; `row` picks one of B memories.

        Raises ConfigError outside a block, and for a `row` that is not there or not said.
        """
        if self._source is None:
            raise ConfigError("no memory is open; save inside a `with memory.write(...)` block.")
        self.fast.check_thread()
        if isinstance(self._source, SavedMemory):
            return self._source
        if self.fast.is_spread:
            raise ConfigError("some rows of this batch have no memory; save one where its text is written alone.")
        return exported(self._source, self.fast, row, self.config, self._identity.fingerprint(self.learned))

    def save(self, folder: str | Path, row: int | None = None, **provenance: Any) -> SavedMemory:
        """Inside an open block: write the memory into `folder`, see `memdlm.memory.files.saved`; returns what is in it.

        The folder is an ordinary PEFT adapter. It appears whole or not at all, in the place of an earlier memory.
        `provenance` is noted in it (JSON). Raises ConfigError as `export`, and when `folder` holds anything else.
        """
        check_kind(folder, (str, Path), "folder", "the name of a folder")
        saved = self.export(row).noted(**provenance)
        saved.save(folder)
        return saved

    def load(self, folder: str | Path) -> SavedMemory:
        """Read a memory that `save` wrote, and check that it was written for this model, tokenizer and configuration.

        Raises MemoryFileError with the reason when it is damaged or was written for others.
        """
        check_kind(folder, (str, Path), "folder", "the name of a memory's folder")
        saved = read_memory(folder)
        self.check_fits(saved, f"memory {str(folder)!r}")
        return saved

    def check_fits(self, saved: SavedMemory, where: str = "memory") -> None:
        """Raise MemoryFileError, which begins with `where`, unless `saved` was written for this model and options."""
        check_fits(saved, self.fast, self.config, self._identity.fingerprint(self.learned), where)

    def unwritten(self) -> SavedMemory:
        """Return the learned start alone, which every memory written from it contains; ConfigError if there is none."""
        start = None if self.learned is None else self.learned.start()
        if start is None:
            raise ConfigError("this memory has no learned start: unwritten, it adds nothing.")
        # Values of their own: a memory that is open stays as it is.
        fast = FastWeights(self.fast.sites, self.fast.adapter, network=self.fast.network, blocks=self.fast.blocks)
        fast.replace(start)
        return packed(fast, 0, self.config, self._identity.fingerprint(self.learned), {"tokens": 0})

    @contextmanager
    def recall(self, memory: str | Path | SavedMemory) -> Iterator[SavedMemory]:
        """Read a saved memory, of a folder or from `load`: inside the block every call of the model reads it.

        All rows of a call share it. Raises MemoryFileError as `load`, ConfigError when a block is open already.
        """
        check_kind(memory, (str, Path, SavedMemory), "memory", "a memory's folder, or a SavedMemory")
        if isinstance(memory, SavedMemory):
            self.check_fits(memory)
        else:
            memory = self.load(memory)
        with self._opened("recall"), self.fast.holding(unpack(memory.pairs, memory.rank, self.fast), (1, None)):
            self._source = memory
            yield memory

    def of_rows(self, rows: Tensor) -> AbstractContextManager[None]:
        """Inside an open block: let calls on the texts `rows` [R] alone read their memories."""
        return self.fast.of_samples(rows)

    def set_aside(self) -> AbstractContextManager[None]:
        """Inside an open block: leave the model bare for the length of another one; no other memory can be opened.

        Whoever leaves it reads the memory on, in whatever thread that is.
        """
        return self.fast.set_aside()

    @property
    def lower_layers(self) -> LowerLayers | None:
        """Inside a block: what calls on the anchor may continue from, see `ModelDenoiser`; None: nothing.

        If gradients were enabled when the block was entered with an `anchor`, they flow through it.
        """
        return None if self._lower is None else self._lower.connected()

    def _writer(
        self, pattern: AttentionPattern | None, *, is_tracked: bool, is_read_at_anchor: bool, is_whole: bool = False
    ) -> Writer:
        return Writer(
            model=self.model,
            config=self.config,
            fast=self.fast,
            learned=self.learned,
            strategy=self.strategy,
            loss=self.loss,
            update=self.update,
            adapted=self._adapted,
            first_block=self.first_block,
            mask_token_id=self.mask_token_id,
            right_shift_logits=self.right_shift_logits,
            pattern=pattern,
            process_group=self.process_group,
            is_tracked=is_tracked,
            is_read_at_anchor=is_read_at_anchor,
            is_whole=is_whole,
        )

    @contextmanager
    def _opened(self, kind: str) -> Iterator[None]:
        with self.fast.opened(kind):
            try:
                yield
            finally:
                self._lower, self._source = None, None


def _for_start(randomness: Randomness, per_sample: bool) -> Randomness:
    """One memory for the batch starts from one generator, even when every row draws its masks from its own.

    It is a copy: a row's masks must not depend on whether it comes first (on a rank, or in a smaller batch).
    """
    if per_sample or isinstance(randomness, torch.Generator):
        return randomness
    return randomness[0].clone_state()


def _usable(tensor: Tensor | None) -> Any:
    """Return `tensor`, or a copy that autograd accepts if it was made in inference mode."""
    return tensor.clone() if tensor is not None and tensor.is_inference() else tensor
