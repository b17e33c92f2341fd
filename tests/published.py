"""Recorded decodings of the Qwen-shaped families: their options in our names, and their canvases row by row."""

import copy
import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from goldens import ROOT, cannot_replay, folders, model, must_know, read_json, tensors
from memdlm.diffusion import positions_of
from memdlm.inference import Decoder, GenerationConfig, Job
from memdlm.models import load_tokenizer
from ties import Sureness, describe, is_tie

MASK = 505
OURS = [field.name for field in dataclasses.fields(GenerationConfig)]
SDAR_NAMES = {
    "gen_length": "max_new_tokens",
    "block_length": "block_size",
    "denoising_steps": "steps_per_block",
    "remasking_strategy": "remasking",
    "confidence_threshold": "threshold",
    "eb_threshold": "eb_threshold",
    "stopping_criteria_idx": "stop_tokens",
}
SDAR_DEFAULTS = {
    "gen_length": 128,
    "block_length": 8,
    "denoising_steps": 8,
    "remasking_strategy": "low_confidence_dynamic",
    "confidence_threshold": 0.85,
}
HONOURED = {
    *("prompts", "inputs", "kwargs", "n_forward", "n_store_forward", "masks_left", "published_defect", "token_ids"),
    *("left_padded", "greedy", "random_positions", "commits_per_step"),
}
MEASURED = {
    *("shape", "robust_to_1e6_weight_noise", "positions_set_back_to_mask_per_step_and_row", "masks_left_per_row"),
}


def sampler_of(family: str) -> str:
    """Which published sampler made a folder's recordings: dream, sdar, or mdlm, which all others share."""
    stated = str(read_json(family, "checkpoint/config.json").get("model_type")).lower()
    return stated if stated in ("dream", "sdar") else "mdlm"


@dataclass(frozen=True)
class Recording:
    """One recorded decoding."""

    family: str
    file: str
    name: str

    def __str__(self) -> str:
        return f"{self.family}/{self.file}:{self.name}"

    @property
    def record(self) -> dict[str, Any]:
        return read_json(self.family, f"{self.file}.json")[self.name]

    @property
    def kind(self) -> str:
        """`gen`: the model's own `diffusion_generate`; `sample`, `infill`: a sampler beside the model."""
        return self.name.split("/")[0]

    @property
    def is_defect(self) -> bool:
        return "published_defect" in self.record

    @property
    def stops(self) -> bool:
        """Whether the recording ended with an end token."""
        return bool(self.record["kwargs"].get("stopping_criteria_idx")) or "eos" in self.record.get("token_ids", {})

    @property
    def is_drawn(self) -> bool:
        """Whether the positions were drawn."""
        return self.kind == "gen" and self.record["kwargs"].get("alg", "origin") == "origin"

    def rows(self, what: str | None = None) -> list[Tensor]:
        """The prompts, or the texts to be filled."""
        data, record = tensors(self.family, f"{self.file}.safetensors"), self.record
        what = what or (f"infill_in/{record['inputs']}" if self.kind == "infill" else f"prompt/{record['prompts']}")
        names = [name for name in data if name.startswith(f"{what}/")]
        return [data[name] for name in sorted(names, key=lambda name: int(name.rsplit("/", 1)[1]))]

    def options(self) -> dict[str, Any]:
        """The recorded options in our names."""
        must_know(self, self.record, HONOURED | MEASURED)
        given = dict(self.record["kwargs"])
        if sampler_of(self.family) == "sdar" and self.file == "sampler":
            return self._of_sdar(given)
        must_know(self, given, [*OURS, "alg"], "option")
        if given.get("temperature") or given.get("alg_temp") or given.get("stochastic_transfer"):
            cannot_replay(self, "its random numbers were not recorded")
        if self.file == "bd3lm":
            return {"attention": "bd3lm"} | given
        if self.kind != "gen":
            given.pop("eps", None)  # dLLM's sampler takes it and does not read it
        if self.is_drawn:
            given = {name: value for name, value in given.items() if name not in ("top_k", "top_p", "alg_temp")}
        schedule = "dream" if self.kind == "gen" else "dllm"
        return {"transfer_schedule": schedule, "remasking": given.pop("alg", "origin")} | given

    def _of_sdar(self, given: dict[str, Any]) -> dict[str, Any]:
        must_know(self, given, [*SDAR_NAMES, "temperature", "top_k", "top_p"], "option")
        if "greedy" not in self.record or given.get("temperature", 1.0) != 1.0:
            cannot_replay(self, "its random numbers were not recorded")
        given = SDAR_DEFAULTS | given
        found = {SDAR_NAMES[name]: value for name, value in given.items() if name in SDAR_NAMES}
        if found["remasking"] != "low_confidence_dynamic":
            del found["threshold"]
        if given.get("top_k") == 1:
            # The recorded choice is the likeliest token; a draw among one is that, too.
            found |= {"top_k": 1, "temperature": 1.0}
        return found

    def job(self, *, infills: bool | None = None, rows: list[Tensor] | None = None, **changes: Any) -> Job:
        """The recorded decoding, by our code."""
        options = {"eos_early_stop": False} | self.options() | changes
        if self.kind not in ("gen", "sample", "infill"):
            cannot_replay(self, f"no kind of decoding is called {self.kind!r}")
        unknown = set(options) - {field.name for field in dataclasses.fields(GenerationConfig)}
        assert not unknown
        tokenizer = load_tokenizer(ROOT / self.family / "checkpoint")
        ids = self.record.get("token_ids", {})
        must_know(self, ids, ["eos", "pad"], "token")
        if "eos" in ids:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids["eos"])
        network = model(self.family)
        if options.get("right_shift_logits") is False and sampler_of(self.family) == "dream":
            # Refused for Dream, which was trained with the shift. The recording needs a network that was not.
            network, options = copy.copy(network), options | {"right_shift_logits": None}
            network.right_shift_logits = False
        decoder = Decoder(network, tokenizer, GenerationConfig(**options))
        infills = self.kind == "infill" if infills is None else infills
        return decoder.prepare(self.rows() if rows is None else rows, infills=infills)

    def canvases(self, job: Job) -> list[list[Tensor]]:
        """The published canvases, [state][row] -> ids, as ours lie. States that changed nothing are left out.

        Published rows are padded on the left (Dream and BD3LM), and may not have grown to their end (BD3LM).
        """
        starts, ends = job.canvas.prompt_lengths.tolist(), job.canvas.lengths.tolist()
        states: list[list[Tensor]] = []
        for canvas in tensors(self.family, f"{self.file}.safetensors")[f"{self.name}/histories"]:
            rows = [self._row(row, start, end, job) for row, start, end in zip(canvas, starts, ends, strict=True)]
            if not states or any(not one.equal(other) for one, other in zip(rows, states[-1], strict=True)):
                states.append(rows)
        return states

    def _row(self, row: Tensor, start: int, end: int, job: Job) -> Tensor:
        if self.file == "bd3lm":
            block = job.canvas.block_size
            width = -(-int(job.canvas.prompt_lengths.max()) // block) * block
            row = row[width - start :][:end]
            return torch.nn.functional.pad(row.where(row >= 0, MASK), (0, end - len(row)), value=MASK)
        return row[len(row) - end :] if sampler_of(self.family) == "dream" else row[:end]


def recordings(file: str) -> list[Recording]:
    """Every recorded decoding of `file` by the samplers of Dream, SDAR and BD3LM."""
    return [
        Recording(family, file, name)
        for family in folders(f"{file}.json")
        for name, record in read_json(family, f"{file}.json").items()
        if isinstance(record, dict)
        and (not name.startswith("train/") if file == "bd3lm" else sampler_of(family) != "mdlm")
    ]


@lru_cache
def decoded(case: Recording, cache: str = "exact", **changes: Any) -> tuple[Job, list[Tensor]]:
    """Our decoding of a recording, and its canvases [B, T] after every step."""
    job = case.job(cache=cache, **changes)
    return job, [step.ids for step in job.steps()]


def difference(job: Job, ours: list[Tensor], theirs: list[list[Tensor]]) -> str | None:
    """Where our canvases first differ from the published states after the first, or None; ties are marked `tie`."""
    ends, before = job.canvas.lengths.tolist(), job.canvas.ids
    for step, (mine, rows) in enumerate(zip(ours, theirs[1:], strict=False)):
        whole = mine.clone()
        for index, (row, end) in enumerate(zip(rows, ends, strict=True)):
            whole[index, :end] = row
        if not whole.equal(mine):
            positions = positions_of(before == MASK)
            with torch.no_grad():
                sureness = Sureness(positions, job._denoiser().logits(before, positions), job.decoder.sampler)
            if job.decoder.options.remasking == "low_confidence" and is_tie(before, mine, whole, sureness):
                return "tie: " + describe(step, mine, whole)
            return f"step {step}: {mine.tolist()} instead of {whole.tolist()}"
        before = mine
    return None
