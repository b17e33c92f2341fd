"""The options of a memory. Users know them with the prefix `mem_`; here they have none.

Three parts, each checked by itself, and `MemoryConfig`, which has the options of all three side by side. What reads one
part alone asks for that part.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from memdlm.diffusion.losses import NORMS, WEIGHTINGS
from memdlm.errors import ConfigError
from memdlm.memory.adapters import ADAPTERS, Adapter
from memdlm.memory.batch_mix import BatchShares, parse_shares
from memdlm.memory.inner_loop import LocalSGD
from memdlm.memory.objectives import HIDDEN_TYPES, OBJECTIVES, Objective
from memdlm.memory.outer_gradient import OUTER_GRADIENTS
from memdlm.memory.trajectory import SCORED, STRATEGIES, Strategy
from memdlm.options import names_of, option, validate

Part = TypeVar("Part")

WRITE_SOURCES = ("response", "prompt", "both", "context")
ATTENTIONS = ("full", "decode")
WRITE_GATES = ("none", "learned")
CHUNK_UPDATES = ("sequential", "accumulated")
PAD_UNMASK_MODES = ("none", "inner", "both")
CLIP_SCOPES = ("tensor", "global")
MOST = 4096
"""Of updates, of views and of ranks: more than any use has, and as much as a mistyped number may cost."""


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What all parts share: their own checks, and parts of the method built from them."""

    def __post_init__(self) -> None:
        validate(self, prefix="mem_")

    def _build(self, part: type[Part]) -> Part:
        # A part's fields are named like the options it reads: that is the whole wiring.
        return part(**{name: getattr(self, name) for name in names_of(part)})

    def _refuse_idle(self, name: str, reason: str) -> None:
        """Raise ConfigError if an option that nothing reads is not at its default."""
        if getattr(self, name) != getattr(type(self), name):
            raise ConfigError(f"mem_{name}={getattr(self, name)!r} has no effect {reason}")

    def _refuse_unread(self, selector: str, table: dict[str, type]) -> None:
        """Refuse the options that other choices of `selector` read, and the chosen one does not."""
        choice = getattr(self, selector)
        for name in dict.fromkeys(name for part in table.values() for name in names_of(part)):
            users = sorted(key for key, part in table.items() if name in names_of(part))
            # The anchor reads this one too.
            if choice not in users and name != "prompt_mask_ratio":
                self._refuse_idle(
                    name,
                    f"with mem_{selector}={choice!r}; it is read by {', '.join(users)}. Leave it out, or change "
                    f"mem_{selector}.",
                )


@dataclass(frozen=True, kw_only=True)
class FastWeightsConfig(_Options):
    """What fast weights are, where they sit, and how they are read."""

    inner_adapter_type: str = option("lora", "Kind of fast weights.", choices=tuple(ADAPTERS))
    inner_rank: int = option(32, "Rank of the low-rank fast weights.", minimum=1, maximum=MOST)
    inner_alpha: float = option(64.0, "Fast weights are scaled by alpha / rank.", above=0, maximum=1e6)
    inner_layer_fraction: float = option(
        0.1, "Share of the blocks that get fast weights, counted from the last.", above=0, maximum=1
    )
    inner_target_modules: str = option(
        "gate_proj,up_proj,down_proj",
        "Projections that get fast weights, comma-separated. A network without projections of the default names gets "
        "them in its feed-forward, whatever that is called; memdlm info says where.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ConfigError("mem_inner_target_modules is empty; name at least one projection, e.g. down_proj.")
        self._refuse_unread("inner_adapter_type", ADAPTERS)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names in `inner_target_modules`."""
        return tuple(name.strip() for name in self.inner_target_modules.split(",") if name.strip())

    def adapter(self) -> Adapter:
        """Build the kind of fast weights."""
        return self._build(ADAPTERS[self.inner_adapter_type])


@dataclass(frozen=True, kw_only=True)
class WriteConfig(_Options):
    """How a write moves fast weights, alike in training and in use; what is `adjustable` may differ between them.

    `chunk_length` may, because texts longer than those of training need it; `inner_score_fraction`, because it changes
    neither the mean of the inner loss nor that of its gradient.
    """

    num_inner_steps: int = option(2, "Number of trajectory states; each gives one update.", minimum=1, maximum=MOST)
    num_inner_epochs: int = option(
        1, "Number of passes over the trajectory; fast weights are kept between passes.", minimum=1, maximum=MOST
    )
    masking_strategy: str = option(
        "pmc", "How the trajectory's states are made from the anchor.", choices=tuple(STRATEGIES)
    )
    prompt_mask_ratio: float = option(
        0.2, "Share of the tokens that the anchor masks at inference.", above=0, maximum=1, adjustable=True
    )
    progressive_consistent_start_scale: float = option(
        1.5, "The first state masks this many times as many tokens as the anchor.", minimum=1, maximum=1e6
    )
    chunk_length: int | None = option(
        None,
        "Write longer texts in chunks of at most this many tokens; unset: in one piece.",
        minimum=1,
        adjustable=True,
    )
    chunk_overlap: int = option(
        0,
        "Number of tokens of the chunk before that a chunk shows again, without writing them twice.",
        minimum=0,
        maximum=2**24,
        adjustable=True,
    )
    chunk_update: str = option(
        "sequential",
        "sequential: each chunk takes its own gradient steps; accumulated: the gradients of all chunks are added up "
        "for common steps, almost as if the text were written in one piece.",
        choices=CHUNK_UPDATES,
        adjustable=True,
    )
    strides: int = option(
        2,
        "Number of masked views in the strided strategy; every token is masked in one of them.",
        minimum=2,
        maximum=MOST,
    )
    inner_lr: float = option(0.1, "Learning rate of the inner SGD.", above=0, maximum=1e6)
    inner_grad_clip: float = option(1.0, "Maximum gradient norm, see mem_inner_clip_scope; 0: no clipping.", minimum=0)
    inner_clip_scope: str = option(
        "tensor",
        "tensor: clip the gradient of each fast-weight tensor by itself; global: clip all gradients of a "
        "memory by one norm.",
        choices=CLIP_SCOPES,
    )
    inner_dropout: float = option(
        0.0, "Dropout rate on the inputs of low-rank fast weights during a write.", minimum=0, below=1
    )
    inner_loss_type: str = option("ce", "Inner objective.", choices=tuple(OBJECTIVES))
    distill_temperature: float = option(1.0, "Temperature of the distillation objectives.", minimum=1e-4, maximum=1e4)
    distill_hidden_type: str = option("mse", "Distance between hidden states.", choices=HIDDEN_TYPES)
    inner_loss_mask_mode: str = option(
        "student_masked", "Which masked positions count in the inner loss.", choices=SCORED
    )
    inner_score_fraction: float = option(
        1.0,
        "Share of a state's scored positions that the inner loss is estimated from, drawn for each row and "
        "update; 1: all.",
        above=0,
        maximum=1,
        adjustable=True,
    )
    loss_weight_type: str | None = option(
        None,
        "Weighting of the inner loss; unset: that of the outer loss in training, uniform otherwise.",
        choices=tuple(WEIGHTINGS),
    )
    loss_norm_type: str | None = option(
        None,
        "Normalisation of the inner loss; unset: that of the outer loss in training, token otherwise.",
        choices=NORMS,
    )
    pad_unmask_mode: str = option(
        "none",
        "none: padding may be masked; inner: padding is never masked in a write; both: never in a write, "
        "never in the outer loss.",
        choices=PAD_UNMASK_MODES,
        adjustable=True,
    )
    learn_start: bool = option(False, "Train the start values of the fast weights; saved as memory_init.safetensors.")
    learn_lr: bool = option(
        False, "Train the inner learning rates, one per tensor and step; they start at mem_inner_lr."
    )
    write_gate: str = option(
        "none",
        "How strongly each token is written. none: all alike; learned: by a learned weight, which can "
        "leave filler out.",
        choices=WRITE_GATES,
    )
    attention: str | None = option(
        None,
        "Attention during a write. full: every token sees every other (the paper); decode: as in decoding "
        "(block-causal for LLaDA2.x); unset: decode for SDAR and for A2D models trained in blocks, else full.",
        choices=ATTENTIONS,
    )
    sync_inner: bool | None = option(
        None,
        "All ranks write one shared memory of their joint batch; unset: on in training with one memory per "
        "batch and mem_outer_gradient=first_order, off otherwise.",
        adjustable=True,
    )
    inner_gradient_checkpointing: bool = option(
        True,
        "Recompute the adapted blocks in the backward pass of a write instead of keeping their activations.",
        adjustable=True,
    )
    per_sample: bool | None = option(
        None,
        "One memory per row instead of one per batch; unset: per batch in training, per row otherwise.",
        adjustable=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_length is None:
            self._refuse_idle("chunk_overlap", "without mem_chunk_length; set it, or leave mem_chunk_overlap out.")
        elif self.chunk_overlap >= self.chunk_length:
            raise ConfigError(
                f"mem_chunk_overlap={self.chunk_overlap} leaves nothing new in a chunk of mem_chunk_length="
                f"{self.chunk_length} tokens; choose a smaller overlap."
            )
        if self.inner_grad_clip == 0:
            self._refuse_idle("inner_clip_scope", "with mem_inner_grad_clip=0; set a norm, or leave it out.")
        if self.inner_loss_type == "distill_hidden":
            self._refuse_idle(
                "inner_score_fraction",
                "with mem_inner_loss_type='distill_hidden', which predicts no tokens; leave it out, or set "
                "mem_inner_loss_type to ce, distill or distill_reverse.",
            )
        self._refuse_unread("masking_strategy", STRATEGIES)
        self._refuse_unread("inner_loss_type", OBJECTIVES)
        if self.sync_inner and self.per_sample is not False:
            raise ConfigError(
                f"mem_sync_inner=True has no effect with mem_per_sample={self.per_sample}: every row then has a memory "
                "of its own. Set mem_per_sample=False, or leave mem_sync_inner out."
            )

    @property
    def is_learned(self) -> bool:
        """Whether a write has parameters of its own."""
        return self.learn_start or self.learn_lr or self.write_gate == "learned"

    def strategy(self) -> Strategy:
        """Build the trajectory strategy."""
        return self._build(STRATEGIES[self.masking_strategy])

    def objective(self) -> Objective:
        """Build the inner objective."""
        return self._build(OBJECTIVES[self.inner_loss_type])

    def update(self) -> LocalSGD:
        """Build the update rule."""
        return self._build(LocalSGD)


@dataclass(frozen=True, kw_only=True)
class OuterConfig(_Options):
    """What a training writes, and how it learns from what was written. Nothing else reads it."""

    write_source: str = option(
        "response",
        "What training writes into memory. response: the labels that the outer loss scores (the paper); "
        "prompt: the prompt (no leak); both: the prompt, and the part of the response that the noised "
        "batch shows (no leak); context: a separate text, see context_column, that the network is not "
        "shown (no leak).",
        choices=WRITE_SOURCES,
    )
    outer_gradient: str = option(
        "first_order",
        "How the outer loss is differentiated. first_order: fast weights count as constants (the paper); "
        "exact: through the whole write; exact_top: through the adapted blocks of the write only.",
        choices=OUTER_GRADIENTS,
    )
    outer_mix: float = option(0.0, "Share of the outer loss that is computed without memory.", minimum=0, maximum=1)
    learned_start_lr: float = option(3e-3, "Outer learning rate of the learned start.", above=0, maximum=1e6)
    learned_rates_lr: float = option(
        0.03, "Outer learning rate of the logarithms of the learned rates.", above=0, maximum=1e6
    )
    write_gate_lr: float = option(0.1, "Outer learning rate of the write gate.", above=0, maximum=1e6)
    batch_mix: str | None = option(
        None,
        "Shares of the optimizer steps that train with memory only, with visible text only, with both, and (a fourth "
        "share) with the text and the memory of another row, such as 1,1,1,1; unset: always both.",
    )
    batch_reach: int | None = option(
        None, "In steps with memory only: how many tokens to either side attention sees.", minimum=0, maximum=2**24
    )
    chunk_share: float = option(
        1.0, "Share of the optimizer steps that write in chunks; the others write in one piece.", above=0, maximum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.batch_mix is None) != (self.batch_reach is None):
            raise ConfigError(
                f"mem_batch_mix={self.batch_mix!r} and mem_batch_reach={self.batch_reach!r} belong together: set both, "
                "or neither."
            )
        if self.batch_shares is not None and self.outer_mix != 0:
            raise ConfigError(
                f"mem_batch_mix is not combined with mem_outer_mix={self.outer_mix!r}; leave one of them out."
            )
        if self.batch_shares is not None and self.write_source == "response":
            raise ConfigError(
                "mem_batch_mix with mem_write_source='response': such a memory holds labels, not the text that is out "
                "of sight. Set mem_write_source=prompt."
            )

    @property
    def batch_shares(self) -> BatchShares | None:
        """`batch_mix` as shares; None: always both."""
        return None if self.batch_mix is None else parse_shares(self.batch_mix)


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(OuterConfig, WriteConfig, FastWeightsConfig):
    """All options of a memory. The defaults are the paper's (`MemoryConfig.paper()`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_adapter_type != "lora":
            self._refuse_idle(
                "inner_dropout",
                f"with mem_inner_adapter_type={self.inner_adapter_type!r}; it is read by lora. Leave it out, or change "
                "mem_inner_adapter_type.",
            )
        if self.chunk_length is None:
            self._refuse_idle("chunk_share", "without mem_chunk_length; set it, or leave mem_chunk_share out.")
        for name, switch in (("learned_start_lr", "learn_start"), ("learned_rates_lr", "learn_lr")):
            if not getattr(self, switch):
                self._refuse_idle(name, f"without mem_{switch}=True; set it, or leave mem_{name} out.")
        if self.write_gate == "none":
            self._refuse_idle(
                "write_gate_lr", "without mem_write_gate=learned; set it, or leave mem_write_gate_lr out."
            )
        elif self.outer_gradient == "first_order":
            raise ConfigError(
                "mem_write_gate='learned' with mem_outer_gradient='first_order': no gradient would reach the gate. Set "
                "mem_outer_gradient=exact (or exact_top), or mem_write_gate=none."
            )
        if self.outer_gradient != "first_order" and self.sync_inner:
            raise ConfigError(
                f"mem_outer_gradient={self.outer_gradient!r} is not taken through sums over ranks; set "
                "mem_sync_inner=False (each rank writes its own batch), or mem_outer_gradient=first_order."
            )
        if self.batch_shares is not None and self.batch_shares.other and self.per_sample is False:
            raise ConfigError(
                f"mem_batch_mix={self.batch_mix!r} has no effect with mem_per_sample=False: all rows of a batch read "
                "one memory, and no row reads another's. Set mem_per_sample=True, or leave the fourth share out."
            )
        if self.batch_mix is not None and self.attention not in (None, "full"):
            raise ConfigError(
                f"mem_batch_mix is not combined with mem_attention={self.attention!r}; leave one of them out."
            )

    @classmethod
    def paper(cls, **changes: Any) -> "MemoryConfig":
        """Return the paper's configuration, with `changes`."""
        return cls(**changes)

    @classmethod
    def recall(cls, **changes: Any) -> "MemoryConfig":
        """Return a memory that learns to be written, with `changes`: it can recall a prompt that is gone.

        Each prompt is written into its own fast weights, in one step over strided views, and the outer loss is
        differentiated through that step, its start, its rates and its gate. A stride of 4 keeps a value's cue in sight
        up to three tokens away; the rank bounds the number of facts. The loss is a sum over the tokens, so that the
        clipped step is as large for a short prompt as for a long one. Chunks of a long text take common steps: with
        steps of their own, a later chunk's facts weigh on those of an earlier one. What each choice is worth is in
        docs/recall.md.
        """
        options: dict[str, Any] = {
            "write_source": "prompt",
            "outer_gradient": "exact",
            "learn_start": True,
            "learn_lr": True,
            "learned_rates_lr": 0.3,
            "write_gate": "learned",
            "masking_strategy": "strided",
            "strides": 4,
            "num_inner_steps": 1,
            "inner_lr": 10.0,
            "inner_target_modules": "down_proj",
            "loss_weight_type": "scheduler",
            "loss_norm_type": "batch",
            "per_sample": True,
            "chunk_update": "accumulated",
        }
        if not changes.get("learn_lr", True):
            del options["learned_rates_lr"]
        if changes.get("outer_gradient") == "first_order":
            del options["write_gate"]
        return cls(**(options | changes))
