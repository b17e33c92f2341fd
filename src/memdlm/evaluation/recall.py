"""Exact-match accuracy on the synthetic long-context tasks, with or without an inference-time memory."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from memdlm.data.chat import Encoded, encode_chat
from memdlm.data.documents import plain_ids
from memdlm.data.synthetic import Sample, exact_match
from memdlm.diffusion.sampling import TokenSampler, denoise_canvas
from memdlm.errors import DataError, unknown
from memdlm.evaluation.prompts import EncodedText, PaddedBatch, answer_spans, pad_texts
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.networks.soundness import blaming
from memdlm.randomness import derive
from memdlm.types import IGNORE_INDEX

CONTEXTS = ("kept", "dropped")
"""Whether the network sees the context of a conversation when it answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recall:
    """How many questions were answered exactly."""

    correct: int
    questions: int

    @property
    def accuracy(self) -> float:
        """Share of the questions, 0 to 1."""
        return self.correct / self.questions


def encode_samples(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], context: str = "kept"
) -> list[EncodedText]:
    """Tokenize the conversations, with or without their context; every assistant turn is a target."""
    if context not in CONTEXTS:
        raise DataError(unknown("context:", context, CONTEXTS))
    conversations = [sample.messages if context == "kept" else sample.without_context() for sample in samples]
    return [encode_chat(tokenizer, messages, train_turns="all") for messages in conversations]


def written_texts(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], context: str, shown: Sequence[EncodedText]
) -> Sequence[EncodedText]:
    """Return the texts whose `prompt` a memory writes; `shown` is what the network sees of the conversations.

    With the context kept, that is the text before the first answer. With the context dropped, it is the context as
    plain text, as in `memdlm memorize`; raises DataError for samples without `Sample.context`.
    """
    if context == "kept":
        return shown
    rows = [plain_ids(tokenizer, sample.context) for sample in samples]
    if not all(rows):
        raise DataError("context='dropped' needs samples that hold their context (Sample.context).")
    return [Encoded(ids, [IGNORE_INDEX] * len(ids), len(ids)) for ids in rows]


def recall(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    steps: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    memory: ParametricMemory | None = None,
    context: str = "kept",
    attention_pattern: AttentionPattern | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Recall:
    """Decode all answers of each conversation in one canvas, most confident first, and compare them as text.

    The questions of a conversation share its context. Their answers are decoded at the same time, in `steps` denoising
    steps together; `Sample.alone` asks them one by one, as `memdlm eval` does. With a `memory`, the text before the
    first answer is written, for each conversation. With the `context` dropped, the network sees only the questions,
    and the context is written. `attention_pattern` replaces the network's own attention in writing and decoding.
    `on_batch` is called with the number of samples done.
    """
    texts = encode_samples(tokenizer, samples, context)
    written = written_texts(tokenizer, samples, context, texts)
    device = next(model.parameters()).device
    correct = questions = 0
    for start in range(0, len(texts), batch_size):
        part, golden = texts[start : start + batch_size], samples[start : start + batch_size]
        batch = pad_texts(part, tokenizer.pad_token_id, device)
        writes: AbstractContextManager[object] = nullcontext()
        if memory is not None:
            prompts = pad_texts(written[start : start + batch_size], tokenizer.pad_token_id, device).prompt()
            writes = memory.write(*prompts, derive("recall", seed, start), attention_pattern=attention_pattern)
        with writes, blaming(model):
            filled = _fill(model, batch, tokenizer.mask_token_id, steps, attention_pattern)
        for row, text, sample in zip(filled.cpu(), part, golden, strict=True):
            for (first, last), answer in zip(answer_spans(text.labels), sample.answers, strict=True):
                predicted = tokenizer.decode(_up_to_end(row[first:last], tokenizer), skip_special_tokens=True)
                correct += exact_match(answer, predicted)
                questions += 1
        if on_batch is not None:
            on_batch(start + len(part))
    return Recall(correct=correct, questions=questions)


def _up_to_end(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens before the first EOS, where an answer ends."""
    ends = (ids == tokenizer.eos_token_id).nonzero()
    return ids if ends.numel() == 0 else ids[: int(ends[0])]


def _fill(
    model: nn.Module, batch: PaddedBatch, mask_token_id: int, steps: int, attention_pattern: AttentionPattern | None
) -> Tensor:
    ids = batch.ids.masked_fill(batch.is_target, mask_token_id)
    mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
    denoise = ModelDenoiser(model, attention_mask=mask, attention_pattern=attention_pattern)
    for step in denoise_canvas(
        denoise,
        ids,
        batch.is_target,
        [batch.is_target],
        steps_per_block=steps,
        sampler=TokenSampler(mask_token_id=mask_token_id),
    ):
        ids = step.ids
    return ids
