"""prompt -> text: generate, stream and infill, for any mix of prompt lengths, with or without a memory."""

from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from memdlm.diffusion.sampling import Step
from memdlm.inference.config import GenerationConfig
from memdlm.inference.decoder import Decoder, Generation
from memdlm.inference.prompt_cache import PromptCache
from memdlm.inference.prompts import Prompt
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.randomness import Randomness


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
    attention_pattern: AttentionPattern | None = None,
    prompt_cache: PromptCache | None = None,
) -> Generation:
    """Decode a response to each of `prompts` (texts, lists of messages, or lists of ids; lengths may differ).

    With a `memory`, each prompt is written before it is decoded. `generator` draws memories and samples. It is one for
    the batch, or one per row; None means a fixed one per row, so that a row's response is the one it would get alone.
    `attention_pattern` None means the family's own: block-causal for LLaDA2.x, else full. A mask token in a prompt is
    not filled, and the model sees it as a blank; `infill` fills such tokens. With a `prompt_cache` (block-causal
    families), the beginning of a prompt that earlier calls have seen is not computed again; the tokens are the same.

    Warns when prompt and response exceed the positions the model was trained on. Raises DataError for an empty prompt
    and ConfigError for options that cannot be honoured.
    """
    decoder = Decoder(
        model, tokenizer, config, memory=memory, attention_pattern=attention_pattern, prompt_cache=prompt_cache
    )
    return decoder.generate(prompts, generator)


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
    attention_pattern: AttentionPattern | None = None,
    prompt_cache: PromptCache | None = None,
) -> Iterator[Step]:
    """Decode like `generate`, but yield after every denoising step, for live display.

    A step's canvas may hold whole blocks beyond `max_new_tokens` (LLaDA2.x).
    """
    decoder = Decoder(
        model, tokenizer, config, memory=memory, attention_pattern=attention_pattern, prompt_cache=prompt_cache
    )
    yield from decoder.stream(prompts, generator)


def infill(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    memory: ParametricMemory | None = None,
    generator: Randomness | None = None,
    attention_pattern: AttentionPattern | None = None,
) -> Generation:
    """Fill the mask tokens inside `sequences` (texts with mask tokens, or ids), in absolute blocks of `block_size`.

    `max_new_tokens`, `max_length` and `eos_early_stop` are ignored. `steps` are spread over the blocks of the longest
    sequence, as published; `steps_per_block` does not depend on the batch. With a `memory`, the given tokens of each
    sequence are written. The result's `texts` are the whole sequences. A block-causal pattern (the default of LLaDA2.x)
    does not see what follows the block; pass `attention_pattern=Full()` to use both sides. Raises DataError when a
    sequence has no mask token.
    """
    decoder = Decoder(model, tokenizer, config, memory=memory, attention_pattern=attention_pattern)
    return decoder.infill(sequences, generator)
