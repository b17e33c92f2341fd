"""The model class for lm-evaluation-harness.

Importing this module registers the names `memdlm`, `llada` and `llada21`. All mean one class; the checkpoint says which
family it is. Several processes (`accelerate launch`, `torchrun`) divide the documents among themselves.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm import tqdm

from memdlm.errors import ConfigError
from memdlm.evaluation.answering import Answerer, Question, numbered
from memdlm.evaluation.harness_options import Settings, parse_arguments
from memdlm.evaluation.identity import settings_identity
from memdlm.models.hub.devices import AUTO, cuda_is_there
from memdlm.models.hub.loading import line_of, load_model
from memdlm.models.hub.tokenizers import load_tokenizer
from memdlm.templates import control_of
from memdlm.terminal import printable
from memdlm.version import __version__

TASK_FOLDER = Path(__file__).parent / "tasks"
"""Folder of this package's task files, for `--include_path`; the commands add it themselves."""

LM_EVAL_DEVICE = "cuda:0"
"""The device that lm-eval passes when none was named."""
MOST_TOGETHER = 2**16
"""Largest batch size; a larger one is taken for a typing error."""
_SETTINGS = "memdlm settings"
"""Key under which a cache of answers keeps the settings that they were given under."""

log = logging.getLogger(__name__)


@register_model("memdlm", "llada", "llada21")
class MemDLM(TemplateLM):
    """A masked diffusion language model, with or without inference-time memory.

    `arguments` are the options of `HarnessOptions`, `GenerationConfig` and, prefixed `mem_`, `MemoryConfig`. Raises
    ConfigError for an unknown option, and for one without effect.
    """

    def __init__(
        self,
        *,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        settings = parse_arguments(arguments)
        size = check_batch_size(batch_size, max_batch_size)
        if trust_remote_code:
            log.info("trust_remote_code only concerns datasets: models never run code from the hub")
        # Without CUDA, processes communicate on the CPU.
        state = PartialState(cpu=device == "cpu" or not cuda_is_there())
        self._rank, self._world_size = state.process_index, state.num_processes
        model, self.tokenizer = _load(settings, _device(device, state))
        self._device = next(model.parameters()).device
        if self._rank == 0:
            # Not through the log: lm-eval only shows its own log messages.
            tqdm.write(printable(line_of(model)), file=sys.stderr)
        self.answerer = Answerer(model=model, tokenizer=self.tokenizer, settings=settings, batch_size=size)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Use a cache of answers; raises ConfigError when its answers were given under other settings."""
        own, known = settings_identity(self.answerer.settings), cache_hook.dbdict
        if known is not None:
            if known.get(_SETTINGS, own if len(known) == 0 else None) != own:
                raise ConfigError(
                    f"use_cache: {known.filename!r} holds answers of another model, or of other settings of memory or "
                    "decoding; name another file."
                )
            known[_SETTINGS] = own
        super().set_cache_hook(cache_hook)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and response."""
        return self.answerer.max_length

    @property
    def tokenizer_name(self) -> str:
        """Name that distinguishes lm-eval's caches of rendered requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text."""
        return self.answerer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages; without a generation prompt, the last message is the beginning of the answer.

        Message contents are text: a control token spelled out in one is marked, and `Answerer.encode` reads the mark.
        """
        text: str = self.tokenizer.apply_chat_template(
            control_of(self.tokenizer).shield(chat_history),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts; every request has its own random numbers."""
        keys = numbered([(each.task_name, each.doc_id, each.idx) for each in requests])
        questions = [
            Question(context=each.args[0], gen_kwargs=each.args[1], key=key)
            for each, key in zip(requests, keys, strict=True)
        ]
        with self._bar(len(requests), "answering", disable_tqdm) as bar:

            def on_done(index: int, text: str) -> None:
                bar.update()
                self.cache_hook.add_partial("generate_until", requests[index].args, text)

            return self.answerer.answer(questions, on_done)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations: (minus the Monte-Carlo bound in nats, whether decoding would give the continuation).

        The second value is False unless `is_check_greedy` is on.
        """
        scorings = [self.answerer.pair(*each.args) for each in requests]
        with self._bar(len(requests), "scoring", disable_tqdm) as bar:

            def on_done(index: int, scored: Any) -> None:
                bar.update()
                self.cache_hook.add_partial("loglikelihood", requests[index].args, (-scored.nll, scored.is_greedy))

            return [(-float(each.nll), each.is_greedy) for each in self.answerer.score(scorings, on_done)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts; texts longer than `max_length` are scored in pieces."""
        windows = [self.answerer.windows(each.args[0]) for each in requests]
        flat = [window for each in windows for window in each]
        with self._bar(len(flat), "scoring", disable_tqdm) as bar:
            scored = iter(self.answerer.score(flat, lambda *_: bar.update()))
        totals = [-sum(float(next(scored).nll) for _ in each) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood scores texts itself")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results file records: the settings, and the cost of the evaluation on this process."""
        settings = self.answerer.settings
        return {
            "model_num_parameters": self.answerer.model.num_parameters(),
            "model_dtype": str(self.answerer.model.dtype),
            "memdlm": {
                "version": __version__,
                "options": dataclasses.asdict(settings.options),
                "generation": settings.generation,
                "memory": None if settings.memory is None else dataclasses.asdict(settings.memory),
                "processes": self.world_size,
                "cost": self.answerer.ledger.summary(),
            },
        }

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, concatenated."""
        if self.world_size == 1:
            return tensor
        own = torch.atleast_1d(tensor)
        parts = [torch.zeros_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all processes on process `dst`, None on the others."""
        if self.world_size == 1:
            return [obj]
        found: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, found, dst=dst)
        return found

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def _bar(self, total: int, what: str, disabled: bool) -> "tqdm[Any]":
        # None: tqdm draws on a terminal only.
        return tqdm(total=total, desc=what, disable=disabled or self.rank != 0 or None)


def check_batch_size(given: int | str | None, largest: int | None) -> int:
    """Return how many requests are answered together; raises ConfigError for an impossible size."""
    if largest is not None:
        raise ConfigError("max_batch_size belongs to batch_size 'auto', which is not supported; give a batch_size.")
    try:
        size = 1 if given is None else int(given)
    except ValueError as error:
        raise ConfigError(f"batch_size must be a whole number, got {given!r}; 'auto' is not supported.") from error
    if not 1 <= size <= MOST_TOGETHER:
        raise ConfigError(f"batch_size must be from 1 to {MOST_TOGETHER}, got {size}.")
    return size


def _device(wanted: str | None, state: PartialState) -> str | torch.device:
    """Return this process's device. The device that lm-eval passes by default counts as "auto"."""
    if wanted in (None, LM_EVAL_DEVICE):
        wanted = AUTO
    if state.num_processes == 1 or wanted == "cpu":
        return wanted
    if wanted not in (AUTO, "cuda"):
        raise ConfigError(
            f"device={wanted!r} with {state.num_processes} processes: all would share that device. Leave it out (every "
            "process then has its own), or name cpu."
        )
    return state.device


def _load(settings: Settings, device: str | torch.device) -> tuple[Any, Any]:
    options = settings.options
    name, adapter = options.pretrained, options.adapter
    if options.base_model_name_or_path is not None:
        if adapter is not None:
            raise ConfigError(
                "base_model_name_or_path and adapter: name the base model in pretrained, or leave one out."
            )
        name, adapter = options.base_model_name_or_path, options.pretrained
    model = load_model(
        name,
        dtype=options.dtype,
        device=device,
        load_in_4bit=options.load_in_4bit,
        adapter=adapter,
        attn_implementation=options.attn_implementation,
        revision=options.revision,
    )
    return model, load_tokenizer(options.tokenizer or options.pretrained, revision=options.revision)
