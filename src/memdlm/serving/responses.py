"""A response while it is decoded: its canvas, which of its tokens are final, and how it ends."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from memdlm.diffusion.sampling import Filling, Step
from memdlm.inference.decoder import Job
from memdlm.inference.prompts import visible
from memdlm.serving.live import LiveMemory
from memdlm.serving.requests import GenerationRequest, Response, Settled, Stepped
from memdlm.serving.tickets import Ticket


def rows_of(job: Job) -> int:
    """Return how many rows of a batch a response takes: with guidance, a second one does not see the prompt."""
    return 2 if job.decoder.options.cfg_scale else 1


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a pass says about the positions that a response wanted, on the CPU."""

    token: Tensor
    """[N] int64."""
    confidence: Tensor
    """[N]."""
    is_sound: bool
    """Whether a token could be chosen from all logits."""
    num_positions: int
    """Token positions of this response that went through the network."""


@final
@dataclass(kw_only=True, slots=True, eq=False)
class Running:
    """One response. Its canvas is on the CPU: what a step commits is decided there, after one copy for the batch."""

    ticket: Ticket
    request: GenerationRequest
    job: Job
    memory: LiveMemory | None
    filling: Filling = field(init=False)
    wanted: Tensor | None = field(init=False)
    """[N] the columns that the next step predicts; None: the response is complete."""
    rows: list[int] = field(default_factory=list)
    """Its rows of the batch."""
    settled: list[int] = field(default_factory=list)
    """The tokens that are final and follow each other from the response's beginning."""
    last: tuple[int, Step] | None = None
    """The last step, and the block that it belonged to."""

    def __post_init__(self) -> None:
        self.filling = self.job.filling()
        self.wanted = self.filling.wanted()

    @property
    def num_rows(self) -> int:
        """How many rows of the batch it takes."""
        return rows_of(self.job)

    def shown(self) -> list[Tensor]:
        """Return the ids [T] of every row, as the network sees them."""
        ids = self.filling.ids[0]
        if self.num_rows == 1:
            return [ids]
        given = self.job.is_given[0]
        return [ids, ids.masked_fill(given, self.job.decoder.special.mask)]

    def take(self, found: Predicted) -> Settled | None:
        """Commit what the step's rules allow; returns what is final since."""
        assert self.wanted is not None
        block = self.filling.block
        self.job.meter.passes += self.num_rows
        self.job.meter.positions += found.num_positions
        self.last = (block, self.filling.commit(self.wanted, found.token, found.confidence))
        self.wanted = self.filling.wanted()
        new = self._final()[len(self.settled) :]
        if not new:
            return None
        self.settled += new
        return Settled(block=block, ids=tuple(new))

    def stepped(self) -> Stepped:
        """Return what the last step changed in the response."""
        assert self.last is not None
        (block, step), canvas = self.last, self.job.canvas
        part = slice(int(canvas.prompt_lengths[0]), int(canvas.response_ends[0]))
        changed = (step.is_new | step.is_edited)[0, part].nonzero()[:, 0].tolist()
        ids = step.ids[0, part].tolist()
        return Stepped(block=block, changes=tuple((place, ids[place]) for place in changed))

    def _final(self) -> list[int]:
        """Return the tokens that no later step changes, from the response's beginning to the first that is not known.

        Where committed tokens may be edited, the block that is being filled is not final.
        """
        mask, stops, canvas = self.job.decoder.special.mask, self.job.decoder.stops, self.job.canvas
        first, last = int(canvas.prompt_lengths[0]), int(canvas.response_ends[0])
        if self.filling.edit is not None and self.wanted is not None:
            here = canvas.blocks[self.filling.block][0]
            last = min(last, int(here.int().argmax()))
        response: list[int] = self.filling.ids[0, first:last].tolist()
        for end, token in enumerate(response):
            if token == mask:
                return response[:end]
            if token in stops:
                return response[: end + 1]
        return response

    def stop_text(self) -> str | None:
        """Return the text before the first of the request's stop texts; None: there is none so far."""
        if not self.request.stop:
            return None
        text = self.text()
        end = end_before(text, self.request.stop)
        return None if end is None else text[:end]

    def text(self) -> str:
        """Return the text of the settled tokens."""
        ids = visible(torch.tensor(self.settled, dtype=torch.int64), self.job.decoder.text_ends)
        return str(self.job.decoder.tokenizer.decode(ids, skip_special_tokens=True))

    def response(self, text: str | None = None) -> Response:
        """Return the result: that of the whole canvas, or of the settled tokens, whose `text` a stop text ended."""
        generation = self.job.result(self.filling.ids)
        prompt = self.job.rows[0]
        ids = generation.sequences[0][len(prompt) :]
        finish = "stop" if bool(torch.isin(ids, torch.tensor(self.job.decoder.stops)).any()) else "length"
        if text is not None:
            ids, finish = torch.tensor(self.settled, dtype=torch.int64), "text"
            generation = replace(
                generation, sequences=[torch.cat((prompt, ids))], texts=[text], num_tokens=len(ids), unresolved=0
            )
        waiting, running = self.ticket.seconds()
        return Response(
            ids=tuple(ids.tolist()),
            text=generation.texts[0],
            finish=finish,
            generation=generation,
            num_prompt_tokens=len(prompt),
            seconds_waiting=waiting,
            seconds_running=running,
        )


def end_before(text: str, stops: Sequence[str]) -> int | None:
    """Return where the stop text begins that is complete first in `text`, of several the longest; None without any.

    The answer is then the same however many tokens settle at once.
    """
    found = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found)[1] if found else None
