"""The options of generation and infilling, under the names that users know."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from memdlm.diffusion.soft_masking import SoftMaskOptions
from memdlm.errors import ConfigError, unknown
from memdlm.inference.algorithms import ALGORITHMS
from memdlm.options import Defaulted, option, own_options_first, validate

CACHES = ("exact", "none", "approximate")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
SCHEDULES = ("dllm", "llada", "dream", "sdar")
DRAWN_SCHEDULES = ("dllm", "dream")
"""Schedules whose counts can be drawn."""
ATTENTIONS = ("full", "block_causal", "bd3lm")
UNCOMPARED = ("random", "origin", "sequential")
"""Values of `remasking` that do not compare predictions."""
TOKEN_LISTS = ("cfg_keep_tokens", "suppress_tokens", "begin_suppress_tokens", "stop_tokens")
MOST = 2**16
"""The most tokens and steps: more than a model of this kind can use, yet a mistyped number costs little."""
COLDEST = 1e-4
"""The least temperature above 0: with a lower one, divided logits leave the range of their dtype."""


@own_options_first
@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SoftMaskOptions):
    """How a response is decoded.

    LLaDA, LLaDA-MoE and Dream: the response is cut into blocks of `block_size` from the end of the prompt. The blocks
    are filled one after the other, and the `steps` denoising steps are spread over them. LLaDA2.x and SDAR: blocks are
    absolute columns and do not see later ones. A step commits all tokens surer than `threshold`, at least an even share
    of the block. With `editing_threshold`, committed tokens may still be replaced (LLaDA2.1). Values of None become the
    default, which may depend on the family.
    """

    max_new_tokens: int | None = option(
        128, "Length of the response in tokens; unset: what the prompt leaves of max_length.", minimum=1, maximum=MOST
    )
    max_length: int | None = option(
        None, "Length of prompt and response together, in tokens, if max_new_tokens is unset.", minimum=1, maximum=MOST
    )
    block_size: int | None = option(
        None,
        "Tokens decoded together; unset: the whole response, 32 for LLaDA2.x, or 4 for SDAR.",
        minimum=1,
        maximum=MOST,
    )
    steps: int | None = option(None, "Denoising steps in total; unset: one per token.", minimum=1, maximum=MOST)
    steps_per_block: int | None = option(
        None, "Denoising steps per block, given instead of steps.", minimum=1, maximum=MOST
    )
    temperature: Defaulted[float] = option(
        0.0, "0: take the likeliest token; above 0: sample tokens.", minimum=0, maximum=1e4
    )
    top_k: int | None = option(None, "Only the k likeliest tokens count.", minimum=1)
    top_p: float | None = option(
        None, "Only the likeliest tokens up to this total probability count.", above=0, maximum=1
    )
    remasking: str | None = option(
        None,
        "Order in which predictions are committed. low_confidence: the surest first (unset: this; Dream: entropy); "
        "random: a random order; the others are Dream's and SDAR's.",
        choices=tuple(ALGORITHMS),
    )
    alg_temp: Defaulted[float] = option(
        0.0, "Above 0: draw the positions to commit from softmax(confidence / alg_temp).", minimum=0, maximum=1e4
    )
    threshold: float | None = option(
        None,
        "Commit every prediction whose confidence is above this; unset: a fixed number per step, 0.95 for LLaDA2.x, or "
        "0.85 for SDAR.",
        minimum=0,
        maximum=1,
    )
    factor: float | None = option(
        None,
        "Commit the r-th surest prediction if its confidence is at least 1 - factor / (r + 1).",
        above=0,
        maximum=1e6,
    )
    eb_threshold: float | None = option(
        None,
        "With remasking=entropy: commit the surest predictions whose entropies, in nats, add up to less than this.",
        above=0,
        maximum=1e6,
    )
    minimal_topk: Defaulted[int] = option(
        1, "With threshold: at most max_new_tokens // minimal_topk denoising steps per block.", minimum=1, maximum=MOST
    )
    num_to_transfer: int | None = option(
        None, "With threshold or editing: minimum number of tokens that a step commits.", minimum=1, maximum=MOST
    )
    editing_threshold: float | None = option(
        None,
        "Replace a committed token by another prediction whose confidence is above this (LLaDA2.1).",
        minimum=0,
        maximum=1,
    )
    max_post_steps: Defaulted[int] = option(
        16, "With editing: how many more times, at most, a full block is revised.", minimum=0, maximum=MOST
    )
    transfer_schedule: str | None = option(
        None,
        "With a fixed number of tokens per step: how they are shared out; unset: dllm, or the family's own.",
        choices=SCHEDULES,
    )
    eps: float | None = option(
        None, "With transfer_schedule=dream: the time at which it ends; unset: 0.001.", above=0, below=1
    )
    stochastic_transfer: Defaulted[bool] = option(
        False, "Draw how many tokens each step commits instead of spreading them evenly."
    )
    stable_steps: int | None = option(
        None,
        "Commit the rest of a block once its predictions have not changed for this many steps.",
        minimum=1,
        maximum=MOST,
    )
    cfg_scale: Defaulted[float] = option(0.0, "Strength of classifier-free guidance; 0: off.", minimum=0, maximum=1e4)
    cfg_keep_tokens: Defaulted[tuple[int, ...]] = option((), "Ids of prompt tokens that guidance never masks.")
    suppress_tokens: Defaulted[tuple[int, ...]] = option((), "Ids of tokens that are never predicted.")
    begin_suppress_tokens: Defaulted[tuple[int, ...]] = option(
        (), "Ids of tokens that are committed last, or never (see begin_suppress)."
    )
    begin_suppress: Defaulted[str] = option(
        "postpone",
        "postpone: begin_suppress_tokens are committed only when nothing else is left; forbid: they are "
        "never predicted.",
        choices=("postpone", "forbid"),
    )
    stop_tokens: Defaulted[tuple[int, ...]] = option((), "Ids of tokens that end a response, beside EOS.")
    attention: str | None = option(
        None,
        "full: every position sees all; block_causal: no later block, counted from the first token; bd3lm: the same, "
        "with blocks counted from the response; unset: the family's own.",
        choices=ATTENTIONS,
    )
    right_shift_logits: bool | None = option(
        None, "The network's output at position i - 1 predicts position i; unset: as the family was trained."
    )
    eos_early_stop: Defaulted[bool] = option(
        True, "Stop decoding a row once it is complete up to its first EOS; the text stays the same."
    )
    cache: Defaulted[str] = option(
        "exact", "How results of earlier passes are reused; exact gives the same tokens as none.", choices=CACHES
    )
    compile: str | None = option(
        None,
        "torch.compile mode for repeated steps; unset: off. reduce-overhead and max-autotune record CUDA graphs.",
        choices=COMPILE_MODES,
    )
    cache_refresh: int | None = option(
        None,
        "With cache=approximate: recompute everything after this many steps, and at new blocks; unset: at new blocks.",
        minimum=1,
        maximum=MOST,
    )
    cache_scope: Defaulted[str] = option(
        "dual",
        "With cache=approximate: dual recomputes the current block; prefix, the block and all that follows.",
        choices=("dual", "prefix"),
    )
    soft_mask: Defaulted[bool] = option(
        False, "Soft-masking: show the model its last predictions at masked positions; for models trained with it."
    )

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is None and field.default is not None and field.name != "max_new_tokens":
                object.__setattr__(self, field.name, field.default)
        for name in TOKEN_LISTS:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        validate(self)
        self._check_tokens()
        if self.max_new_tokens is None and self.max_length is None:
            raise ConfigError("max_new_tokens and max_length are both unset; set one of them.")
        for is_wrong, message in self._conflicts() + self._conflicts_of_rules():
            if is_wrong:
                raise ConfigError(message)
        self.refuse_idle(field.name for field in fields(self) if getattr(self, field.name) != field.default)

    def refuse_idle(self, given: Iterable[str]) -> None:
        """Raise ConfigError if one of the options `given` has no effect with the others as they are."""
        names = set(given)
        for group, is_read, why in self._read_with():
            for name in group:
                if name in names and not is_read:
                    raise ConfigError(f"{name}={getattr(self, name)!r} has no effect {why}, or leave {name} out.")

    def check_vocabulary(self, rows: int) -> None:
        """Raise ConfigError for a token, or a count of tokens, beyond the `rows` of the embedding table."""
        for name in TOKEN_LISTS:
            for token in getattr(self, name):
                if token >= rows:
                    raise ConfigError(f"{name}: token {token} is not in the vocabulary, 0 to {rows - 1}.")
        if self.soft_mask and self.soft_mask_top_k > rows:
            raise ConfigError(f"soft_mask_top_k={self.soft_mask_top_k} exceeds the {rows} tokens there are; lower it.")
        if self.top_k is not None and self.top_k > rows:
            raise ConfigError(f"top_k={self.top_k} is more than the {rows} tokens there are; leave it out.")

    def _check_tokens(self) -> None:
        for name in TOKEN_LISTS:
            for token in getattr(self, name):
                if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                    raise ConfigError(f"{name}: {token!r} is no token id; ids are whole numbers from 0 on.")

    def _read_with(self) -> list[tuple[tuple[str, ...], bool, str]]:
        """Return options that need others: their names, whether they take effect, and if not, why and what to set."""
        soft = tuple(field.name for field in fields(SoftMaskOptions))
        compares, order = self.remasking not in UNCOMPARED, f"where remasking={self.remasking!r} sets the order"
        return [
            (("max_length",), self.max_new_tokens is None, "beside max_new_tokens; set that to None"),
            (("cfg_keep_tokens",), self.cfg_scale != 0, "without guidance; set cfg_scale above 0"),
            (("max_post_steps",), self.editing_threshold is not None, "without editing_threshold; set it"),
            (("cache_refresh", "cache_scope"), self.cache == "approximate", "without cache='approximate'; set that"),
            (soft, self.soft_mask, "without soft_mask=True; add it"),
            (("begin_suppress",), bool(self.begin_suppress_tokens), "without begin_suppress_tokens; name some"),
            (
                ("begin_suppress_tokens",),
                (compares and not self.alg_temp) or self.begin_suppress == "forbid",
                f"{order if not self.alg_temp else 'where alg_temp draws the order'}; set begin_suppress='forbid'",
            ),
            # A greedy choice ignores the filters; the confidences that order it do not.
            (("top_k", "top_p"), self.temperature != 0 or compares, f"{order}; set temperature above 0"),
            (("alg_temp",), compares, f"{order}; choose another remasking"),
            (
                ("eb_threshold",),
                self.remasking in (None, "entropy", "entropy_bounded"),
                f"{order}; set remasking='entropy'",
            ),
            (
                ("eps",),
                not self.looks and self.transfer_schedule in (None, "dream"),
                "without Dream's schedule; set transfer_schedule='dream'",
            ),
        ]

    @property
    def looks(self) -> bool:
        """Whether options say that confidences decide how many tokens a step commits."""
        rules = (self.threshold, self.factor, self.editing_threshold, self.num_to_transfer, self.eb_threshold)
        return any(each is not None for each in rules)

    def _conflicts(self) -> list[tuple[bool, str]]:
        """Return pairs of whether options exclude each other, and the message for that."""
        is_paced = self.steps is not None or self.steps_per_block is not None
        free = (self.editing_threshold, self.num_to_transfer, self.factor, self.eb_threshold)
        is_free = any(each is not None for each in free)
        return [
            (
                0 < self.temperature < COLDEST,
                f"temperature must be 0 (the likeliest token) or at least {COLDEST}, got {self.temperature}.",
            ),
            (
                self.steps is not None and self.steps_per_block is not None,
                "steps and steps_per_block say the same; leave one of them out.",
            ),
            (
                is_paced and is_free,
                "steps and steps_per_block have no effect with editing_threshold, num_to_transfer, factor or "
                "eb_threshold, which take as many steps as they need; leave them out.",
            ),
            (
                self.minimal_topk != 1 and is_free,
                "minimal_topk has no effect with editing_threshold, num_to_transfer, factor or eb_threshold, which "
                "take as many steps as they need; leave it out (num_to_transfer says the fewest that a step commits).",
            ),
            (
                self.factor is not None and (self.threshold is not None or self.num_to_transfer is not None),
                "factor replaces threshold and num_to_transfer; leave one side out.",
            ),
            (
                self.soft_mask and self.compile is not None,
                "soft_mask changes embeddings at every step, which a compiled step would not see; leave compile out.",
            ),
            (
                self.soft_mask and self.cfg_scale != 0,
                "soft_mask and cfg_scale exclude each other: guidance makes two predictions, and which of them to feed "
                "back is not defined; use one of the two options.",
            ),
        ]

    def _conflicts_of_rules(self) -> list[tuple[bool, str]]:
        """Return the same for the order of commits, and for the rules that say how many a step makes."""
        algorithm = ALGORITHMS[self.remasking or "low_confidence"]
        ranks_tokens = algorithm.order == "low_confidence"
        others = (self.threshold, self.editing_threshold, self.num_to_transfer, self.factor)
        return [
            (
                self.looks and (self.stochastic_transfer or self.transfer_schedule is not None),
                "stochastic_transfer and transfer_schedule have no effect where confidences decide how many tokens "
                "are committed (threshold, factor, editing_threshold, num_to_transfer, eb_threshold); leave them out.",
            ),
            (
                self.looks and self.eb_threshold is None and self.remasking is not None and not ranks_tokens,
                f"remasking {self.remasking!r} gives no probabilities of tokens, which threshold, factor, "
                "num_to_transfer and editing_threshold compare; use low_confidence with them.",
            ),
            (
                self.eb_threshold is not None and any(each is not None for each in others),
                "eb_threshold replaces threshold, factor, num_to_transfer and editing_threshold; leave one side out.",
            ),
            (
                self.looks and algorithm.is_static,
                "remasking 'low_confidence_static' commits a fixed number of tokens per step; use "
                "low_confidence_dynamic with threshold, factor, num_to_transfer or editing_threshold.",
            ),
            (
                self.looks and self.alg_temp != 0,
                "alg_temp draws which of a fixed number of positions to commit; leave it out where confidences decide "
                "how many (threshold, factor, editing_threshold, num_to_transfer, eb_threshold).",
            ),
            (
                self.stochastic_transfer and self.transfer_schedule not in (None, *DRAWN_SCHEDULES),
                f"stochastic_transfer belongs to transfer_schedule {' or '.join(map(repr, DRAWN_SCHEDULES))}; leave "
                "one of them out.",
            ),
        ]

    def response_length(self, longest: int) -> int:
        """Return the length of a response to prompts of at most `longest` tokens. Raises ConfigError if none fits."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None or self.max_length <= longest:
            raise ConfigError(
                f"max_length {self.max_length} leaves no room after a prompt of {longest} tokens; raise max_length."
            )
        return self.max_length - longest

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GenerationConfig":
        """Return the preset called `name` with some options changed; raises ConfigError with the possible names."""
        if name not in PRESETS:
            raise ConfigError(unknown("preset:", name, PRESETS))
        return PRESETS[name](**changes)

    @classmethod
    def llada_quality(cls, **changes: Any) -> "GenerationConfig":
        """LLaDA and LLaDA-MoE: blocks of 32 tokens, one token per step."""
        return cls(**{"block_size": 32, "max_new_tokens": 256} | changes)

    @classmethod
    def llada21_quality(cls, **changes: Any) -> "GenerationConfig":
        """LLaDA2.1, as its model card recommends for quality."""
        return cls(**{"block_size": 32, "threshold": 0.7, "editing_threshold": 0.5, "max_new_tokens": 512} | changes)

    @classmethod
    def llada21_speed(cls, **changes: Any) -> "GenerationConfig":
        """LLaDA2.1, as its model card recommends for speed: commit early, then edit."""
        return cls(**{"block_size": 32, "threshold": 0.5, "editing_threshold": 0.0, "max_new_tokens": 512} | changes)

    @classmethod
    def mdlm_ancestral(cls, **changes: Any) -> "GenerationConfig":
        """MDLM's `ddpm` and `ddpm_cache`: from time t to s, each masked token is drawn with probability (t - s) / t."""
        return cls(
            **{"remasking": "origin", "transfer_schedule": "dream", "eps": 1e-5, "temperature": 1.0} | changes  # type: ignore[arg-type]
        )


PRESETS: dict[str, Callable[..., GenerationConfig]] = {
    "llada_quality": GenerationConfig.llada_quality,
    "llada21_quality": GenerationConfig.llada21_quality,
    "llada21_speed": GenerationConfig.llada21_speed,
    "mdlm_ancestral": GenerationConfig.mdlm_ancestral,
}
