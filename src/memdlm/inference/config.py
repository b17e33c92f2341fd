"""The options of generation and infilling, under the names users know."""

from dataclasses import dataclass

from memdlm.diffusion.sampling import COMMITS
from memdlm.errors import ConfigError
from memdlm.options import option, validate


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How a response is decoded (the MDLM sampler).

    The response is cut into blocks of `block_size` from the end of the prompt, filled one after the other;
    `steps` denoising steps are shared out among the blocks.
    """

    max_new_tokens: int | None = option(128, "Length of the response; unset: what max_length leaves.", minimum=1)
    max_length: int | None = option(None, "Length of prompt and response, if max_new_tokens is unset.", minimum=1)
    block_size: int | None = option(None, "Tokens decoded together; unset: the whole response.", minimum=1)
    steps: int | None = option(None, "Denoising steps in all; unset: one per token.", minimum=1)
    temperature: float = option(0.0, "0 takes the likeliest token, otherwise tokens are sampled.", minimum=0)
    remasking: str = option("low_confidence", "Which predictions are kept.", choices=tuple(COMMITS))
    stochastic_transfer: bool = option(False, "Draw how many tokens a step commits instead of spreading evenly.")
    cfg_scale: float = option(0.0, "Classifier-free guidance; 0 is off.", minimum=0)
    cfg_keep_tokens: tuple[int, ...] = option((), "Prompt tokens that guidance never masks.")
    suppress_tokens: tuple[int, ...] = option((), "Tokens that are never predicted.")
    begin_suppress_tokens: tuple[int, ...] = option((), "Tokens that are committed only when nothing else is left.")
    right_shift_logits: bool = option(False, "The network predicts position i at i - 1.")

    def __post_init__(self) -> None:
        for name in ("cfg_keep_tokens", "suppress_tokens", "begin_suppress_tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        validate(self)
        if self.max_new_tokens is None and self.max_length is None:
            raise ConfigError("max_new_tokens and max_length are both unset; set one of them.")
        if self.cfg_keep_tokens and self.cfg_scale == 0:
            raise ConfigError("cfg_keep_tokens has no effect without guidance; set cfg_scale above 0 or leave it out.")
