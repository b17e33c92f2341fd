"""How the published samplers of the families decode: their defaults, and what they read confidences of."""

from dataclasses import dataclass, replace
from typing import Any, final

from memdlm.diffusion.choice import CONFIDENCES
from memdlm.errors import ConfigError
from memdlm.inference.algorithms import ALGORITHMS, Algorithm
from memdlm.inference.config import DRAWN_SCHEDULES, GenerationConfig
from memdlm.models.blocks.masks import AttentionPattern, BlockCausal, Full
from memdlm.models.hub.families import decoding_pattern, family_of

BLOCK = 32
"""Tokens of a block where `attention` asks for blocks that the family does not have by itself."""
EPS = 1e-3
"""The time at which Dream's schedule ends, unless told otherwise."""
EB_THRESHOLD = 0.35
"""The default bound on the entropy of a step, in nats, as published for SDAR."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Conventions:
    """The conventions of one family."""

    remasking: str = "low_confidence"
    transfer_schedule: str = "dllm"
    threshold: float | None = None
    """If set, steps commit all tokens surer than this, unless told otherwise."""
    has_schedule: bool = True
    """Whether a step may commit a fixed number of tokens."""
    is_tempered: bool = False
    is_filtered: bool = True
    is_top_p_first: bool = False
    """See `memdlm.diffusion.TokenSampler` for these three."""
    ends_with_turn: bool = False
    """A response also ends with the end of a turn."""
    blocks_from_response: bool = False
    """Where blocks do not see later ones, the first token of the response begins one (BD3LM)."""


PLAIN = Conventions()
"""LLaDA and LLaDA-MoE."""
LLADA2 = Conventions(threshold=0.95, has_schedule=False, is_tempered=True)
DREAM = Conventions(
    remasking="entropy", transfer_schedule="dream", is_tempered=True, is_top_p_first=True, ends_with_turn=True
)
SDAR = Conventions(transfer_schedule="sdar", threshold=0.85, is_tempered=True, is_filtered=False, ends_with_turn=True)
A2D = Conventions(blocks_from_response=True)
"""The converted models of dLLM, with full attention or in blocks (BD3LM)."""
CONVENTIONS: dict[str, Conventions] = {
    "Dream": DREAM,
    "SDAR": SDAR,
    "A2D-Qwen2": A2D,
    "A2D-Qwen3": A2D,
    "A2D-Llama": A2D,
}
"""By the name of a family; the others decode in blocks like LLaDA2.x, or like LLaDA."""


def conventions_of(config: object, pattern: AttentionPattern) -> Conventions:
    """Return the conventions of a model with the configuration `config` that decodes under `pattern`."""
    family = family_of(config)
    plain = LLADA2 if isinstance(pattern, BlockCausal) else PLAIN
    return plain if family is None else CONVENTIONS.get(family.name, plain)


def pattern_of(config: object, options: GenerationConfig) -> AttentionPattern:
    """Return the pattern under which a model of the configuration `config` decodes, if `attention` names no other."""
    own = decoding_pattern(config, options.block_size)
    if options.attention == "full":
        return Full()
    if options.attention is None or isinstance(own, BlockCausal):
        return own
    return BlockCausal(options.block_size or BLOCK)


def resolved(config: GenerationConfig, pattern: AttentionPattern, conventions: Conventions) -> GenerationConfig:
    """Return the options with a family's defaults filled in; `remasking` becomes a name of `CONFIDENCES`.

    Raises ConfigError for options that have no effect there, and for a `block_size` other than the pattern's.
    """
    changes: dict[str, Any] = {"attention": "full"}
    if isinstance(pattern, BlockCausal):
        changes["attention"] = config.attention or ("bd3lm" if conventions.blocks_from_response else "block_causal")
        if config.block_size not in (None, pattern.block):
            raise ConfigError(
                f"block_size {config.block_size} and attention_pattern {pattern} disagree; this model decodes "
                "the tokens of one block together. Leave block_size out."
            )
        changes["block_size"] = pattern.block
    algorithm = ALGORITHMS[config.remasking or _order(config, conventions)]
    changes["remasking"] = algorithm.order
    if config.threshold is None and config.factor is None and config.eb_threshold is None:
        changes |= _looking(config, algorithm, conventions)
    if not config.looks and not changes.keys() & {"threshold", "eb_threshold"}:
        changes |= _paced(config, algorithm, conventions)
    _refuse_unread(config, changes, conventions)
    return replace(config, **changes)


def _order(config: GenerationConfig, conventions: Conventions) -> str:
    """Return the default of `remasking`: what the rule reads that says how many tokens a step commits."""
    if config.eb_threshold is not None:
        return "entropy"
    return "low_confidence" if config.looks else conventions.remasking


def _looking(config: GenerationConfig, algorithm: Algorithm, conventions: Conventions) -> dict[str, Any]:
    """Return the default of the confidence that tokens must have, if such a rule is the default."""
    if algorithm.has_bound:
        return {"eb_threshold": EB_THRESHOLD}
    if algorithm.has_threshold:
        return {"threshold": SDAR.threshold if conventions.threshold is None else conventions.threshold}
    is_fixed = algorithm.is_static or algorithm.order != "low_confidence" or config.transfer_schedule is not None
    if conventions.threshold is None or (conventions.has_schedule and is_fixed):
        return {}
    for name in ("transfer_schedule", "stochastic_transfer", "remasking"):
        is_said = getattr(config, name) not in (None, False)
        if is_said and (name != "remasking" or is_fixed):
            raise ConfigError(
                f"{name}={getattr(config, name)!r} has no effect on this model: it commits all tokens surer than "
                f"threshold, which is {conventions.threshold} if unset. Leave {name} out."
            )
    return {"threshold": conventions.threshold}


def _paced(config: GenerationConfig, algorithm: Algorithm, conventions: Conventions) -> dict[str, Any]:
    """Return the schedule that says how many tokens a step commits."""
    schedule, is_drawn = config.transfer_schedule, config.stochastic_transfer or algorithm.is_stochastic
    if schedule is None:
        schedule = conventions.transfer_schedule
        if is_drawn and schedule not in DRAWN_SCHEDULES:
            schedule = "dream"
    found: dict[str, Any] = {"transfer_schedule": schedule, "stochastic_transfer": is_drawn}
    return found | ({"eps": EPS} if schedule == "dream" and config.eps is None else {})


def _refuse_unread(config: GenerationConfig, changes: dict[str, Any], conventions: Conventions) -> None:
    if config.temperature == 0 and not conventions.is_filtered:
        for name in ("top_k", "top_p"):
            if getattr(config, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(config, name)!r} has no effect on this model without a temperature: neither the "
                    f"likeliest token nor its confidence depends on it. Set temperature above 0, or leave {name} out."
                )
    if config.eps is not None and changes.get("transfer_schedule") != "dream":
        raise ConfigError(
            f"eps={config.eps} has no effect without Dream's schedule; set transfer_schedule='dream', or leave eps out."
        )
    if config.alg_temp and not CONFIDENCES[changes["remasking"]].compares:
        raise ConfigError(
            f"alg_temp={config.alg_temp} has no effect where remasking does not compare confidences; leave it out."
        )
