"""Answer and score the requests of an evaluation: in batches, with a seed per request and the costs counted.

A request's draws come from a generator that is derived from the request itself. Neither its batch nor its process
changes its result.
"""

import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memdlm.diffusion.likelihood import Likelihood, is_greedy, monte_carlo_nll
from memdlm.errors import ConfigError, DataError
from memdlm.evaluation.harness_options import Arguments, Request, Settings, cut, parse_request
from memdlm.evaluation.ledger import Ledger, MeteredMemory
from memdlm.inference.config import GenerationConfig
from memdlm.inference.decoder import Decoder
from memdlm.inference.shared_prompt import SharedPrompt, can_share
from memdlm.memory.files.library import find_memory
from memdlm.memory.files.saved import read_memory
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.blocks.masks import AttentionPattern, BlockCausal, Full
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.models.hub.families import decoding_pattern
from memdlm.models.lora.wrappers import unwrap
from memdlm.models.networks.shifting import shift_of
from memdlm.models.networks.sizes import trained_positions
from memdlm.models.networks.soundness import blaming
from memdlm.randomness import derive
from memdlm.templates import MARK, control_of, prompt_ids, rendered_ids
from memdlm.types import Denoise

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt to be answered."""

    context: str
    gen_kwargs: Arguments
    key: str
    """Distinguishes requests with the same prompt: the document's name, and the number of the repetition."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """A text to score, as ids."""

    written: tuple[int, ...]
    """What a memory writes before the target is scored."""
    prompt: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """The result of a `Scoring`."""

    nll: Likelihood
    is_greedy: bool
    """Whether decoding would give the target; False unless `is_check_greedy` is on."""


@dataclass(kw_only=True)
class Answerer:
    """A model under evaluation, with its settings."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    batch_size: int = 1
    ledger: Ledger = field(default_factory=Ledger)
    memory: MeteredMemory | None = field(init=False, default=None)
    _told: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}.")
        self.ledger.begin(next(self.model.parameters()).device)
        self.config = GenerationConfig(**self.settings.generation)
        self.shifted = shift_of(self.model, self.config.right_shift_logits)
        if self.settings.memory is not None:
            self.memory = MeteredMemory(
                self.model,
                self.settings.memory,
                mask_token_id=self.tokenizer.mask_token_id,
                right_shift_logits=self.shifted,
            )
            self.memory.ledger = self.ledger
        self._recalled = self._read(self.settings.options.memory)

    def _read(self, path: str | None) -> Callable[[], AbstractContextManager[Any]]:
        """Return what opens the saved memory at `path` while requests are answered and scored."""
        if path is None:
            return nullcontext
        saved = read_memory(find_memory(path))
        memory = ParametricMemory(
            self.model,
            saved.reading_config,
            mask_token_id=self.tokenizer.mask_token_id,
            right_shift_logits=self.shifted,
            tokenizer=self.tokenizer,
        )
        memory.check_fits(saved, f"memory {path!r}")
        return lambda: memory.recall(saved)

    @property
    def pattern(self) -> AttentionPattern | None:
        """Attention pattern while a likelihood is estimated; None for full attention."""
        if self.settings.options.mc_attention == "full":
            return None
        pattern = decoding_pattern(getattr(unwrap(self.model), "config", None), self.config.block_size)
        if isinstance(pattern, Full):
            raise ConfigError(
                "mc_attention='decode' has no effect: this model decodes under full attention. Leave it out."
            )
        return pattern

    @property
    def max_length(self) -> int | None:
        """Maximum tokens of prompt and response: as set, or as the model was trained; None for no limit."""
        return self.settings.options.max_length or trained_positions(self.model)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with special tokens only if `add_special_tokens` asks for them.

        Control tokens spelled out in a message (see `memdlm.templates`) are read as text. Raises DataError when
        `text` is no valid text.
        """
        if MARK not in text:
            return prompt_ids(self.tokenizer, text, add_special_tokens=self.settings.options.add_special_tokens)
        if self.settings.options.add_special_tokens:
            raise DataError(
                "a message spells a control token, which add_special_tokens=True cannot tell from a real one."
            )
        return rendered_ids(self.tokenizer, text, control_of(self.tokenizer))

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both texts together and split after the context; its trailing spaces go to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        start = self.encode(context) if context else []
        return start, self.encode(context + continuation)[len(start) :]

    def answer(self, questions: Sequence[Question], on_done: Callable[[int, str], None] | None = None) -> list[str]:
        """Return one text per question, cut before its stop texts; decode the longest prompts first, in batches.

        `on_done` is called with (index, text) as soon as an answer is ready. Raises ConfigError for generation
        arguments that are unknown or leave no room for a prompt.
        """
        requests = [self._request(each.gen_kwargs) for each in questions]
        prompts = [self._prompt(each, request) for each, request in zip(questions, requests, strict=True)]
        kinds = [repr(request) for request in requests]
        order = sorted(range(len(questions)), key=lambda i: (kinds[i], -len(prompts[i]), i))
        answers = [""] * len(questions)
        with self._recalled():
            for batch in _batches(order, kinds, self.batch_size):
                request = requests[batch[0]]
                with self.ledger.timed():
                    result = Decoder(self.model, self.tokenizer, request.config, memory=self.memory).generate(
                        [prompts[index] for index in batch], [self._generator(questions[index]) for index in batch]
                    )
                self.ledger.add(result, len(batch))
                for index, text in zip(batch, result.texts, strict=True):
                    answers[index] = cut(text, request.stops)
                    if on_done is not None:
                        on_done(index, answers[index])
        self._say_truncated()
        return answers

    def score(self, scorings: Sequence[Scoring], on_done: Callable[[int, Scored], None] | None = None) -> list[Scored]:
        """Bound the likelihood of every target.

        Targets with the same written text share one write. With `mc_attention=decode`, targets with the same prompt
        share the computation of its finished blocks. The number of draws per target is `mc_num`, in rounds of
        `mc_batch_size`, whatever the batch size. Logs the standard errors. Raises DataError for an empty target
        and ConfigError for one that does not fit.
        """
        found: dict[int, Scored] = {}
        by_text: dict[tuple[int, ...], list[int]] = {}
        for index, each in enumerate(scorings):
            by_text.setdefault(each.written, []).append(index)
        with self._recalled():
            for text, members in by_text.items():
                with self.ledger.timed(), self._written(text):
                    for index, denoise in self._denoisers(scorings, members):
                        found[index] = self._score(scorings[index], denoise)
                        if on_done is not None:
                            on_done(index, found[index])
        self.ledger.requests += len(scorings)
        self._say_truncated()
        errors = [each.nll.stderr for each in found.values() if not math.isnan(each.nll.stderr)]
        if errors:
            log.info(
                "%d log-likelihoods from %d samples each: standard error %.3f nats on average, %.3f at most",
                len(errors),
                self.settings.options.mc_num,
                statistics.fmean(errors),
                max(errors),
            )
        return [found[index] for index in range(len(scorings))]

    def windows(self, text: str) -> list[Scoring]:
        """Cut a text into pieces of at most `max_length`; each piece after the first also sees the token before it.

        A memory writes the text before the piece, as much of its end as fits.
        """
        ids = tuple(self.encode(text))
        if not ids:
            return []
        room = self.max_length or len(ids)
        first = Scoring(written=(), prompt=(), target=ids[:room])
        rest = [
            Scoring(
                written=ids[max(0, start - room) : start],
                prompt=ids[start - 1 : start],
                target=ids[start : start + room - 1],
            )
            for start in range(room, len(ids), room - 1)
        ]
        return [first, *rest]

    def pair(self, context: str, continuation: str) -> Scoring:
        """Encode a context and its continuation; a context that does not fit loses its beginning."""
        prompt, target = self.encode_pair(context, continuation)
        if not target:
            raise DataError(f"the continuation {continuation!r} has no tokens: its likelihood is not defined.")
        limit = self.max_length
        if limit is not None and len(target) > limit:
            raise ConfigError(f"a continuation has {len(target)} tokens, max_length allows {limit}; raise max_length.")
        if limit is not None and len(prompt) + len(target) > limit:
            prompt = prompt[len(prompt) + len(target) - limit :]
            self.ledger.truncated += 1
        return Scoring(written=tuple(prompt), prompt=tuple(prompt), target=tuple(target))

    def _denoisers(self, scorings: Sequence[Scoring], members: Sequence[int]) -> Iterator[tuple[int, Denoise]]:
        """Yield each of `members` with its denoiser; members with the same prompt come together."""
        pattern = self.pattern
        plain = ModelDenoiser(self.model, attention_pattern=pattern, right_shift_logits=self.shifted)
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index in members:
            by_prompt.setdefault(scorings[index].prompt, []).append(index)
        for prompt, indices in by_prompt.items():
            denoise: Denoise = plain
            if isinstance(pattern, BlockCausal) and not self.shifted and can_share(self.model):
                denoise = SharedPrompt(self.model, self._tensor(prompt), pattern)
                self.ledger.forward_passes += int(denoise.seen > 0)
                self.ledger.token_positions += denoise.seen
            for index in indices:
                yield index, denoise

    def _score(self, scoring: Scoring, denoise: Denoise) -> Scored:
        options = self.settings.options
        prompt, target = self._tensor(scoring.prompt), self._tensor(scoring.target)
        mask = int(self.tokenizer.mask_token_id)
        copies = min(options.mc_num, options.mc_batch_size)
        with torch.no_grad(), blaming(self.model):
            nll = monte_carlo_nll(
                denoise,
                prompt,
                target,
                mask_token_id=mask,
                num_samples=options.mc_num,
                batch_size=copies,
                generator=derive("evaluate", options.request_seed, "score", repr(scoring.prompt), repr(scoring.target)),
            )
            greedy = options.is_check_greedy and is_greedy(denoise, prompt, target, mask_token_id=mask)
        passes = options.mc_num // copies
        self.ledger.forward_passes += passes + (len(scoring.target) if options.is_check_greedy else 0)
        seen = denoise.seen if isinstance(denoise, SharedPrompt) else 0
        self.ledger.token_positions += options.mc_num * (len(scoring.prompt) + len(scoring.target) - seen)
        return Scored(nll=nll, is_greedy=greedy)

    @contextmanager
    def _written(self, text: tuple[int, ...]) -> Iterator[None]:
        if self.memory is None or not text:
            yield
            return
        generator = derive("evaluate", self.settings.options.request_seed, "write", repr(text))
        with self.memory.write(self._tensor(text)[None], generator=generator):
            yield

    def _tensor(self, ids: tuple[int, ...]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=next(self.model.parameters()).device)

    def _generator(self, question: Question) -> torch.Generator:
        seed = self.settings.options.request_seed
        kwargs = sorted((key, repr(value)) for key, value in question.gen_kwargs.items())
        return derive("evaluate", seed, "answer", question.key, question.context, repr(kwargs))

    def _request(self, gen_kwargs: Arguments) -> Request:
        request, ignored = parse_request(gen_kwargs, self.settings)
        for name in ignored:
            self._say(f"the task sets {name}={gen_kwargs[name]!r}, which diffusion decoding does not have: ignored")
        own = self.settings.generation
        for name in ("temperature", "max_new_tokens"):
            taken = getattr(request.config, name)
            if name in own and taken != own[name]:
                self._say(f"the task sets {name} to {taken!r} instead of {own[name]!r}; --gen_kwargs overrides it")
        return request

    def _prompt(self, question: Question, request: Request) -> list[int]:
        ids = self.encode(question.context) or [int(self.tokenizer.eos_token_id)]
        limit = self.max_length
        if limit is None or len(ids) + request.new_tokens <= limit:
            return ids
        if limit <= request.new_tokens:
            raise ConfigError(
                f"max_length {limit} leaves no room for a prompt beside {request.new_tokens} new tokens; raise it, "
                "or shorten the response with --gen_kwargs max_gen_toks=..."
            )
        self.ledger.truncated += 1
        return ids[len(ids) + request.new_tokens - limit :]

    def _say_truncated(self) -> None:
        if self.ledger.truncated:
            self._say(f"prompts longer than max_length {self.max_length} lost their beginning: {self.ledger.truncated}")

    def _say(self, text: str) -> None:
        """Warn, once per text."""
        if text not in self._told:
            self._told.add(text)
            log.warning(text)


def _batches(order: Sequence[int], kinds: Sequence[str], size: int) -> Iterator[list[int]]:
    """Cut `order` into runs of one kind, at most `size` long."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == size or kinds[batch[0]] != kinds[index]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def numbered(keys: Sequence[Any]) -> list[str]:
    """Add the number of its repetition to every key, so that repeated requests draw anew."""
    seen: Counter[str] = Counter()
    names = []
    for key in map(str, keys):
        names.append(f"{key}#{seen[key]}")
        seen[key] += 1
    return names
