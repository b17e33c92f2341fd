"""Measure exposure bias of one or two models on a dataset, without and with memory, as JSON and as a picture."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass
from typing import Any

from memdlm.data.chat import ChatEncoder, Encoded
from memdlm.data.layouts import Columns, parse_column_map
from memdlm.data.sources import Conversations, evaluation_split, load_conversations
from memdlm.data.turns import TRAIN_TURNS
from memdlm.errors import ConfigError, DataError, MemDLMError, unknown
from memdlm.evaluation.exposure_bias import exposure_bias
from memdlm.evaluation.prompts import pad_texts
from memdlm.memory.config import MemoryConfig
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.hub.devices import AUTO, DEVICE_HELP, DTYPE_HELP
from memdlm.models.hub.loading import DTYPES, line_of, load_model
from memdlm.models.hub.tokenizers import load_tokenizer
from memdlm.options import option, validate
from memdlm.outputs import Kind, Output, output_folder
from memdlm.report.figures import BIAS_PANELS, png
from memdlm.report.model import Bias, Part
from memdlm.report.records import plain
from memdlm.report.tables import bias_part
from memdlm.version import __version__

JSON_NAME, PICTURE_NAME = "exposure_bias.json", "exposure_bias.png"
MEASUREMENT = Kind(name="exposure bias", words="a measurement of exposure bias")


@dataclass(frozen=True, kw_only=True)
class BiasOptions:
    """What is measured, and on which data."""

    model: str = option(MISSING, "Model or adapter: folder or hub name.")
    dataset_args: str = option(
        MISSING,
        "Datasets as in training: hub names, files or saved folders. Join several with +, cut one with name[test:100].",
    )
    column_map: str | None = option(
        None,
        "How the data's column names map to ours, as in question=prompt,answer=response; NAME= leaves a column out.",
    )
    split: str | None = option(None, "Split to decode; unset: validation or test if there is one, else the first.")
    adapter: str | None = option(None, "Folder or hub name of an outer LoRA adapter on top of the model.")
    model2: str | None = option(None, "A second model to compare with; its tokenizer must be the same.")
    adapter2: str | None = option(
        None, "Folder or hub name of an outer LoRA adapter on top of the second model; without model2: of the first."
    )
    output: str = option("runs/exposure_bias", f"Folder of {JSON_NAME} and {PICTURE_NAME}.")
    overwrite: bool = option(False, "Replace an earlier measurement in output.")
    steps: int = option(48, "Denoising steps per response.", minimum=1, maximum=2**16)
    num_samples: int = option(64, "Number of conversations to decode: the first that fit into max_length.", minimum=1)
    max_length: int = option(1024, "Conversations with more tokens are left out.", minimum=2)
    train_turns: str = option("last", "Which assistant turns are decoded.", choices=TRAIN_TURNS)
    batch_size: int = option(8, "Number of conversations decoded together.", minimum=1, maximum=2**16)
    seed: int = option(0, "Seed of the random masks and of memories; masks are the same for all models.")
    dtype: str = option(AUTO, DTYPE_HELP, choices=(AUTO, *DTYPES))
    device: str = option(AUTO, DEVICE_HELP)
    load_in_4bit: bool = option(False, "Quantise the models to 4 bits (nf4) while loading.")
    attn_implementation: str | None = option(None, "Attention implementation: sdpa or eager; unset: sdpa.")
    mem_enabled: bool = option(False, "Measure every model with memory, too; its prompts are written first.")

    def __post_init__(self) -> None:
        validate(self)
        parse_column_map(self.column_map)
        if self.models[1:] == self.models[:1]:
            raise ConfigError(f"model2 is the same as model, {self.model!r}; name another, or leave it out.")

    @property
    def models(self) -> list[tuple[str, str | None]]:
        """Return the measured models: name, and adapter on top."""
        second = (self.model2 or self.model, self.adapter2)
        has_second = self.model2 is not None or self.adapter2 is not None
        return [(self.model, self.adapter), *([second] if has_second else [])]


def measure_exposure_bias(
    options: BiasOptions, memory: MemoryConfig | None, *, say: Callable[[str], None], command: str
) -> Part:
    """Measure all models, write the JSON and the picture into `options.output`, and return the measured rows.

    With a `memory` every model is measured without and with it, so that a row with memory has a baseline. `memdlm
    report` reads the JSON. Raises DataError when nothing is left to decode, or when the second model's tokenizer gives
    other ids (the masks would then differ). Raises ConfigError when the output is taken.
    """
    with output_folder(options.output, MEASUREMENT, overwrite=options.overwrite) as output:
        return _measured(options, memory, output, say, command)


def _measured(
    options: BiasOptions, memory: MemoryConfig | None, output: Output, say: Callable[[str], None], command: str
) -> Part:
    split, conversations = _conversations(options)
    texts = _texts(options, conversations, options.model)
    if options.model2 not in (None, options.model) and _ids(
        _texts(options, conversations, str(options.model2))
    ) != _ids(texts):
        raise DataError(f"model2 {options.model2!r} has another tokenizer: its losses per token are not comparable.")
    say_once = functools.cache(say)
    rows = [row for each in options.models for row in _measure(options, each, texts, memory, say, say_once)]
    data: dict[str, Any] = {
        "kind": "exposure_bias",
        "version": __version__,
        "command": command,
        "seeds": [options.seed],
        "options": asdict(options),
        "memory": None if memory is None else asdict(memory),
        "split": split,
        "conversations": len(texts),
        "models": [],
        "accuracy": [],
        "exposure_bias": plain(rows),
    }
    part = bias_part(rows, data["seeds"])
    panels = [(panel.title, panel.draw) for panel in BIAS_PANELS]
    with output.replaced() as folder:
        (folder / JSON_NAME).write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")
        (folder / PICTURE_NAME).write_bytes(png(panels, part, size=(11.5, 3.7)))
    return part


def _measure(
    options: BiasOptions,
    named: tuple[str, str | None],
    texts: Sequence[Encoded],
    config: MemoryConfig | None,
    say: Callable[[str], None],
    say_once: Callable[[str], None],
) -> list[Bias]:
    name, adapter = named
    model = load_model(
        name,
        dtype=options.dtype,
        device=options.device,
        load_in_4bit=options.load_in_4bit,
        adapter=adapter,
        attn_implementation=options.attn_implementation,
    )
    say_once(line_of(model))
    tokenizer = load_tokenizer(name)
    label = name if adapter is None else f"{name} with {adapter}"
    size = options.batch_size
    batches = [
        pad_texts(texts[start : start + size], tokenizer.pad_token_id, model.device)
        for start in range(0, len(texts), size)
    ]
    memories: list[ParametricMemory | None] = [None]
    if config is not None:
        memories.append(ParametricMemory(model, config, mask_token_id=tokenizer.mask_token_id))
    rows = []
    for memory in memories:
        say(f"{label}, memory {'off' if memory is None else 'on'}: {len(texts)} conversations, {options.steps} steps")
        measured = exposure_bias(
            model,
            batches,
            mask_token_id=tokenizer.mask_token_id,
            steps=options.steps,
            seed=options.seed,
            memory=memory,
        )
        rows.append(Bias(model=label, seed=options.seed, memory=memory is not None, **asdict(measured)))
    return rows


def _conversations(options: BiasOptions) -> tuple[str, Conversations]:
    splits = load_conversations(options.dataset_args, Columns(parse_column_map(options.column_map)))
    split = options.split or evaluation_split(splits) or next(iter(splits))
    if split not in splits:
        raise DataError(f"dataset_args: {options.dataset_args!r}: {unknown('split', split, splits)}")
    return split, splits[split]


def _texts(options: BiasOptions, conversations: Conversations, name: str) -> list[Encoded]:
    """Return the first conversations that fit, sorted by length, so that rows of a batch differ little in length."""
    encoder = ChatEncoder(load_tokenizer(name), train_turns=options.train_turns)
    fitting: list[Encoded] = []
    for index, conversation in enumerate(conversations):
        try:
            encoded = encoder.encode([conversation])[0]
        except MemDLMError as error:
            raise DataError(f"{options.dataset_args!r}, conversation {index}: {error}") from error
        if len(encoded.input_ids) <= options.max_length:
            fitting.append(encoded)
        if len(fitting) == options.num_samples:
            break
    if not fitting:
        raise DataError(
            f"dataset: none of the {len(conversations)} conversations of {options.dataset_args!r} fits into "
            f"max_length {options.max_length}; raise it."
        )
    return sorted(fitting, key=lambda each: -len(each.input_ids))


def _ids(texts: Sequence[Encoded]) -> list[list[int]]:
    return [text.input_ids for text in texts]
