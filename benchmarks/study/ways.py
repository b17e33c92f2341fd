"""Ways to answer questions on one document: text in sight, its keys and values kept, LoRA, or a memory.

Every way yields `Written`: what was done before the first question, what is kept of it, and a denoiser for questions.
All are decoded by the same loop, one question at a time. Seconds are the process's CPU time on one thread.
"""

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memdlm.data.documents import plain_ids
from memdlm.data.synthetic import Sample
from memdlm.diffusion import Linear, TokenSampler, corrupt, denoise_canvas, draw_times, masked_loss
from memdlm.evaluation.prompts import EncodedText
from memdlm.evaluation.recall import encode_samples
from memdlm.inference.denoiser import CanvasDenoiser
from memdlm.inference.shared_prompt import SharedPrompt
from memdlm.inference.views import WholeRows
from memdlm.memory import ParametricMemory
from memdlm.models import BlockCausal, Full, LoRAOptions, ModelDenoiser, add_outer_lora
from memdlm.randomness import derive
from memdlm.types import IGNORE_INDEX

COPIES = 4
"""Noisings of the document in one step of fine-tuning, at times spread evenly."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    is_right: bool
    """The answer's words."""
    is_exact: bool
    """And the end mark behind them."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Written:
    """One document, written in one way, and its questions answered."""

    way: str
    write_seconds: float
    read_seconds: float
    """To make it ready in a new process, where there is a file."""
    num_bytes: int
    answers: list[Answer]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A document and its questions, each alone: encoded with the document before it, and without."""

    index: int
    sample: Sample
    ids: torch.Tensor
    """[L], the plain text."""
    shown: Sequence[EncodedText]
    gone: Sequence[EncodedText]


def documents(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> Iterator[Document]:
    for index, sample in enumerate(samples):
        alone = sample.alone()
        yield Document(
            index=index,
            sample=sample,
            ids=torch.tensor(plain_ids(tokenizer, sample.context)),
            shown=encode_samples(tokenizer, alone),
            gone=encode_samples(tokenizer, alone, "dropped"),
        )


class Clock:
    """Seconds of CPU time since it was made."""

    def __init__(self) -> None:
        self.start = time.process_time()

    def seconds(self) -> float:
        return time.process_time() - self.start


def answered(model: nn.Module, text: EncodedText, mask: int, cached: SharedPrompt | None = None) -> Answer:
    """Decode one answer, a token a step, the surest first."""
    ids, labels = torch.tensor([text.input_ids]), torch.tensor([text.labels])
    is_open = labels != IGNORE_INDEX
    canvas, steps = ids.masked_fill(is_open, mask), int(is_open.sum())
    clock = Clock()
    # What `generate` decodes with: the last block computes what is asked, and nothing else.
    denoise = CanvasDenoiser(model, WholeRows(torch.tensor([ids.shape[1]])), pattern=Full())
    for step in denoise_canvas(
        denoise if cached is None else cached,
        canvas,
        is_open,
        [is_open],
        steps_per_block=steps,
        sampler=TokenSampler(mask_token_id=mask),
    ):
        canvas = step.ids
    seconds = clock.seconds()
    same = (canvas == ids)[is_open]
    # The last open token is the end mark.
    return Answer(is_right=bool(same[:-1].all()), is_exact=bool(same.all()), seconds=seconds)


def in_context(model: PreTrainedModel, document: Document, mask: int) -> Iterator[Written]:
    """The text before every question."""
    answers = [answered(model, text, mask) for text in document.shown]
    size = len(document.sample.context.encode())
    yield Written(way="text in the context", write_seconds=0.0, read_seconds=0.0, num_bytes=size, answers=answers)


def cached(model: PreTrainedModel, document: Document, mask: int) -> Iterator[Written]:
    """Keys and values of the text, computed once without a question in sight.

    That is approximate here. The small network has full attention and mixes neighbours, so that a question would
    change the states of the text, and these are the states without one.
    """
    first, without = document.shown[0].input_ids, document.gone[0].input_ids
    # What stands before the text's first token, and the text.
    end = len(first) - len(without) + first.index(int(document.ids[0]))
    clock = Clock()
    prefix = SharedPrompt(model, torch.tensor(first[:end]), BlockCausal(end))
    seconds = clock.seconds()
    # A buffer's last column is never read.
    size = sum(each[:, :, :-1].numel() * each.element_size() for each in prefix.cache.buffers())
    answers = [answered(model, text, mask, prefix) for text in document.shown]
    yield Written(
        way="keys and values kept (approximate)",
        write_seconds=seconds,
        read_seconds=0.0,
        num_bytes=size,
        answers=answers,
    )


def tuned(
    model: PreTrainedModel, document: Document, mask: int, *, options: LoRAOptions, rates: dict[int, float], name: str
) -> Iterator[Written]:
    """A fresh LoRA, trained on the document by the masked loss: asked after each number of steps in `rates`.

    Steps of equal learning rates are those of one run.
    """
    for rate in dict.fromkeys(rates.values()):
        own = copy.deepcopy(model)
        add_outer_lora(own, options, seed=document.index)
        ids = document.ids.repeat(COPIES, 1)
        is_maskable, schedule = torch.ones_like(ids, dtype=torch.bool), Linear()
        weights = [each for each in own.parameters() if each.requires_grad]
        size = sum(each.numel() * each.element_size() for each in weights)
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        generator, seconds = derive("fine-tuning", document.index), 0.0
        wanted = [count for count, each in rates.items() if each == rate]
        for step in range(max(wanted) + 1):
            if step in wanted:
                answers = [answered(own, text, mask) for text in document.gone]
                yield Written(
                    way=f"{name}, {step} steps",
                    write_seconds=seconds,
                    read_seconds=0.0,
                    num_bytes=size if step else 0,
                    answers=answers,
                )
            clock = Clock()
            even = (torch.arange(COPIES) + torch.rand(COPIES, generator=generator)) / COPIES
            draws = torch.rand(ids.shape, generator=generator)
            noised = corrupt(ids, is_maskable, draw_times(even, 1e-3), draws, schedule=schedule, mask_token_id=mask)
            found = masked_loss(ModelDenoiser(own), ids, noised, is_maskable, schedule=schedule, norm="token")
            assert found.loss is not None
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
            seconds += clock.seconds()


def written(memory: ParametricMemory, document: Document, seed: int) -> Iterator[Written]:
    """Ours: written once and asked, then the same from a file that a new process would read."""
    mask, model = memory.mask_token_id, memory.model
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "document.mem"
        clock = Clock()
        with memory.write(document.ids[None], generator=derive("instead", seed, document.index)):
            seconds = clock.seconds()
            answers = [answered(model, text, mask) for text in document.gone]
            size = sum(each.numel() * each.element_size() for each in memory.fast.tensors())
            clock = Clock()
            memory.save(folder)
            saving = clock.seconds()
        yield Written(way="memory", write_seconds=seconds, read_seconds=0.0, num_bytes=size, answers=answers)
        clock = Clock()
        fresh = memory.with_options()
        saved = fresh.load(folder)
        reading = clock.seconds()
        with fresh.recall(saved):
            answers = [answered(model, text, mask) for text in document.gone]
        yield Written(
            way="memory, from its file",
            write_seconds=seconds + saving,
            read_seconds=reading,
            num_bytes=sum(each.stat().st_size for each in folder.iterdir()),
            answers=answers,
        )
