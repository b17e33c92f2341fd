"""How well a network answers questions about pages: exact match, and the loss of the answers."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from pages import Asked, Reader, answer_spans_of
from transformers import PreTrainedModel

from memdlm.data.chat import Encoded
from memdlm.diffusion.sampling import TokenSampler, denoise_canvas
from memdlm.evaluation.prompts import PaddedBatch, pad_texts
from memdlm.memory.parametric import ParametricMemory
from memdlm.models.border.denoiser import ModelDenoiser
from memdlm.randomness import derive
from memdlm.types import IGNORE_INDEX

MEMORY, IN_SIGHT = "memory", "text in sight"
NO_MEMORY = "without memory"
OTHERS = "memory of a wrong document"


def measured_ways(
    reader: Reader,
    model: PreTrainedModel,
    memory: ParametricMemory | None,
    asked: Sequence[Asked],
    *,
    seed: int,
    decodes: bool,
) -> dict[str, dict[str, Any]]:
    """Measure a model with its text in sight; or with memory, without, and with that of the next document."""
    if memory is None:
        ways: dict[str, tuple[Any, int]] = {IN_SIGHT: (None, 0)}
    else:
        ways = {MEMORY: (memory, 0), NO_MEMORY: (None, 0), OTHERS: (memory, 1)}
    was_training = model.training
    model.eval()
    found = {
        name: measured(reader, model, asked, memory=used, shift=shift, seed=seed, decodes=decodes)
        for name, (used, shift) in ways.items()
    }
    model.train(was_training)
    return found


@torch.no_grad()
def measured(
    reader: Reader,
    model: PreTrainedModel,
    asked: Sequence[Asked],
    *,
    memory: ParametricMemory | None,
    shift: int,
    seed: int,
    decodes: bool,
    batch: int = 32,
) -> dict[str, Any]:
    """Return exact match and loss of the answers; the memory of page i holds the text of page i + `shift`.

    `loss`: nats per token of an answer and its end, all slots masked. `one_shot`: exact match of the likeliest tokens
    then. `exact`: exact match after decoding, the surest tokens first, as many at a step as there are questions.
    `chosen`: of the answers that the document has to questions of that kind, the right one is the likeliest; `guessed`:
    how often a guess among them is right. Both are of `questions_with_choice`, which have more than one such answer.
    `kinds` has it by kind of question (`kinds_one_shot`: the one shot). `among` has it by how many facts of the
    document are of that kind: where it is one, the kind alone tells the answer, and nothing has to be known of the
    name.
    """
    tokenizer, device = reader.corpus.tokenizer, model.device
    pad, mask = tokenizer.pad_token_id, tokenizer.mask_token_id
    written = [asked[(index + shift) % len(asked)].context for index in range(len(asked))]
    right: dict[str, Counter[str]] = {"one_shot": Counter(), "exact": Counter()}
    right_among: Counter[int] = Counter()
    chosen, chances, with_choice = 0, 0.0, 0
    lost, tokens, kinds = 0.0, 0, Counter(kind for each in asked for kind in each.kinds)
    among = Counter(each.kinds.count(kind) for each in asked for kind in each.kinds)
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        shown = pad_texts([each.shown for each in part], pad, device)
        texts = [Encoded(ids, [IGNORE_INDEX] * len(ids), len(ids)) for ids in written[start : start + batch]]
        writes: Any = nullcontext()
        if memory is not None:
            writes = memory.write(*pad_texts(texts, pad, device).prompt(), derive("reading", seed, start))
        with writes:
            logits = model(
                input_ids=shown.ids.masked_fill(shown.is_target, mask), attention_mask=shown.attention_mask.long()
            ).logits.float()
            filled = {"one_shot": logits.argmax(-1).cpu()}
            if decodes:
                filled["exact"] = _decoded(model, shown, mask, reader.corpus.slot).cpu()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), shown.ids, reduction="none").cpu()
        for row, each in enumerate(part):
            spans = answer_spans_of(each, reader.corpus.slot)
            for kind, choices, (first, last) in zip(each.kinds, each.choices, spans, strict=True):
                if len(choices) > 1:
                    chosen += likeliest(logits[row, first:last], choices) == 0
                    chances, with_choice = chances + 1 / len(choices), with_choice + 1
                golden = each.shown.input_ids[first:last]
                end = golden.index(reader.end) + 1
                lost, tokens = lost + float(losses[row, first : first + end].sum()), tokens + end
                for name, ids in filled.items():
                    is_right = reader.said(ids[row, first:last].tolist()) == reader.said(golden)
                    right[name][kind] += is_right
                    right_among[each.kinds.count(kind)] += is_right and name == "exact"
    total = sum(kinds.values())
    found: dict[str, Any] = {"loss": lost / tokens, "questions": total, "one_shot": right["one_shot"].total() / total}
    if with_choice:
        found["questions_with_choice"] = with_choice
        found |= {"chosen": chosen / with_choice, "guessed": chances / with_choice}
    found["kinds_one_shot"] = {kind: right["one_shot"][kind] / count for kind, count in sorted(kinds.items())}
    if decodes:
        found["exact"] = right["exact"].total() / total
        found["kinds"] = {kind: right["exact"][kind] / count for kind, count in sorted(kinds.items())}
        found["among"] = {str(facts): right_among[facts] / count for facts, count in sorted(among.items())}
        found["questions_among"] = {str(facts): count for facts, count in sorted(among.items())}
    return found


def likeliest(logits: torch.Tensor, choices: Sequence[Sequence[int]]) -> int:
    """Return which of the slots is the likeliest, by the sum over its tokens' log-probabilities."""
    logs = logits.log_softmax(-1)
    slots = torch.tensor(choices, device=logs.device)
    return int(logs.gather(-1, slots.t()).sum(0).argmax())


def _decoded(model: PreTrainedModel, batch: PaddedBatch, mask_token_id: int, steps: int) -> torch.Tensor:
    ids = batch.ids.masked_fill(batch.is_target, mask_token_id)
    for step in denoise_canvas(
        ModelDenoiser(model, attention_mask=batch.attention_mask),
        ids,
        batch.is_target,
        [batch.is_target],
        steps_per_block=steps,
        sampler=TokenSampler(mask_token_id=mask_token_id),
    ):
        ids = step.ids
    return ids
