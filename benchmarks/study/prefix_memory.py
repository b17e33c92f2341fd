"""GradMem's memory beside ours: vectors before the text of an autoregressive network, written by gradient steps.

    python benchmarks/study/prefix_memory.py --search
    python benchmarks/study/prefix_memory.py --seeds 0 1 2
    python benchmarks/study/prefix_memory.py --smoke      # everything once, tiny: no result

Written from the published description (Kuratov et al. 2026): a decoder of 4 layers and width 128; 8 learned vectors
stand before the text, and two steps of SGD on its next-token loss, read from a head of its own, change them alone; the
answer is read from the vectors and the question; all is trained through the writes (second order), and half of the
write's last loss is added. The task, the schedule of lengths, the batch size and the texts of the test are those of
`capacity.py --task letters`; `--seconds` is the CPU time of a training. `text in context` is the same decoder with the
text before the question and no memory. `--search` tries learning rates on another seed, in a sixth of the time; the
loss of the answers over the last tenth of the steps tells which is best.

What is not the same: the network of `capacity.py` sees both neighbours of a word before its attention, and its keys
start equal to its queries. A stock decoder has neither, and here it has minutes, where the paper has up to a million
steps. Questions of a text stand one after the other; a later one sees the true answers of those before it.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any, final

import torch
from capacity import FIRST, TASKS, Pairs, plan_of
from study_rows import Rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from memdlm.data.documents import plain_ids
from memdlm.data.synthetic import Sample
from memdlm.data.tokenizer import build_word_tokenizer
from memdlm.randomness import derive
from memdlm.workflows.studies.plans import RecallPlan

PREFIX, IN_CONTEXT = "8 vectors", "text in context"
ARMS = (PREFIX, IN_CONTEXT)
VECTORS, WRITES, WRITE_LOSS = 8, 2, 0.5
RATES: dict[str, list[tuple[float, float]]] = {
    PREFIX: list(itertools.product((1e-3, 3e-3), (0.04, 1.0))),
    IN_CONTEXT: [(rate, 0.0) for rate in (1e-3, 3e-3)],
}
"""Outer and inner learning rates of the search."""
CHOSEN = {PREFIX: (1e-3, 0.04), IN_CONTEXT: (1e-3, 0.0)}
"""The published inner rate, and an outer one for a short training. No search was run before."""
SEARCH_SEED = 10
TRIAL_STEPS = 4


@final
class Decoder(nn.Module):
    """A decoder that answers from vectors which a write made of the text, or from the text itself."""

    def __init__(self, vocabulary: int, *, writes: int, inner_lr: float) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
        )
        # Fused attention has no second derivative.
        self.decoder = LlamaForCausalLM._from_config(config, attn_implementation="eager")
        self.start = nn.Parameter(0.02 * torch.randn(VECTORS, config.hidden_size))
        self.write_head = nn.Linear(config.hidden_size, vocabulary, bias=False)
        self.writes, self.inner_lr = writes, inner_lr

    def embedded(self, ids: Tensor) -> Tensor:
        """Return the embeddings [B, L, D] of ids [B, L]."""
        found: Tensor = self.decoder.get_input_embeddings()(ids)
        return found

    @torch.enable_grad()
    def write(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors [B, 8, D] of texts [B, L], and the loss per token that the last step lowered."""
        vectors, written = self.start.expand(len(texts), -1, -1), self.embedded(texts)
        for _ in range(self.writes):
            hidden = self.decoder.model(inputs_embeds=torch.cat([vectors, written], 1)).last_hidden_state
            logits = self.write_head(hidden[:, VECTORS - 1 : -1])
            loss = cross_entropy(logits.flatten(0, 1), texts.flatten())
            # The loss is a mean over texts. Times their number, each text takes a step on its own loss.
            (slope,) = torch.autograd.grad(len(texts) * loss, vectors, create_graph=self.training)
            vectors = vectors - self.inner_lr * slope
        return vectors, loss

    def answers(self, texts: Tensor, asked: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return next-token logits [B, n, V] of the questions and answers `asked` [B, n], and the write's loss."""
        before, loss = self.write(texts) if self.writes else (self.embedded(texts), 0.0)
        logits = self.decoder(inputs_embeds=torch.cat([before, self.embedded(asked)], 1)).logits
        return logits[:, before.shape[1] - 1 : -1], loss


@final
class Conversations:
    """Texts and questions as ids."""

    def __init__(self, plan: RecallPlan) -> None:
        assert isinstance(plan.task, Pairs)
        self.plan, self.task = plan, plan.task
        self.tokenizer: PreTrainedTokenizerBase = build_word_tokenizer(plan.task.words())
        each = torch.arange(plan.task.num_questions * plan.task.words_of_pair) % plan.task.words_of_pair
        self.is_answer = each >= plan.task.words_of_pair - plan.task.words_of_answer
        """[n]: which of the words that are asked are answers."""

    def encoded(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """Return texts [B, L], and their questions with answers [B, n]."""
        asked = [" ".join(turn["content"] for turn in sample.without_context()) for sample in samples]
        texts = [plain_ids(self.tokenizer, sample.context) for sample in samples]
        return torch.tensor(texts), torch.tensor([plain_ids(self.tokenizer, each) for each in asked])

    def batch(self, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Draw one batch of the training."""
        return self.encoded(self.task.records(self.plan.batch_size, length, seed=f"prefix memory {seed} {step}"))


def step(model: Decoder, optimizer: torch.optim.Optimizer, data: Conversations, batch: tuple[Tensor, Tensor]) -> float:
    """Take one step; returns the loss of the answers, per token."""
    texts, asked = batch
    logits, written = model.answers(texts, asked)
    answered = cross_entropy(logits[:, data.is_answer].flatten(0, 1), asked[:, data.is_answer].flatten())
    (answered + WRITE_LOSS * written).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(answered.detach())


def new(data: Conversations, arm: str, rates: tuple[float, float], seed: int) -> tuple[Decoder, torch.optim.Optimizer]:
    """Build a model and its optimizer."""
    torch.manual_seed(int(derive("prefix memory", seed).initial_seed() % 2**31))
    model = Decoder(len(data.tokenizer), writes=WRITES if arm == PREFIX else 0, inner_lr=rates[1])
    return model, torch.optim.AdamW(model.parameters(), lr=rates[0], betas=(0.9, 0.95), weight_decay=0.05)


def steps_in(data: Conversations, arm: str, seconds: float) -> int:
    """Return how many steps `seconds` of CPU time hold, from a trial of every stage."""
    per_step = 0.0
    for share, times in data.plan.schedule:
        model, optimizer = new(data, arm, CHOSEN[arm], 0)
        batch, took = data.batch(times * data.plan.train_length, -1, 0), []
        for _ in range(TRIAL_STEPS):
            start = time.process_time()
            step(model, optimizer, data, batch)
            took.append(time.process_time() - start)
        per_step += share * min(took)
    return max(20, int(seconds / per_step))


def run(data: Conversations, arm: str, rates: tuple[float, float], seed: int, steps: int) -> dict[str, Any]:
    """Train and measure one model; returns its row."""
    model, optimizer = new(data, arm, rates, seed)
    ends = list(itertools.accumulate(share for share, _ in data.plan.schedule))
    losses, seconds = [], 0.0
    for index in range(steps):
        done = index / steps
        times = next(times for end, (_, times) in zip(ends, data.plan.schedule, strict=True) if done < end + 1e-9)
        warm, late = min(1.0, 4 * (index + 1) / steps), max(0.0, (done - 0.25) / 0.75)
        fall = 0.55 + 0.45 * float(torch.cos(torch.tensor(torch.pi * late)))
        optimizer.param_groups[0]["lr"] = rates[0] * warm * fall
        batch = data.batch(times * data.plan.train_length, seed, index)
        start = time.process_time()
        losses.append(step(model, optimizer, data, batch))
        seconds += time.process_time() - start
    tenth = max(1, steps // 20)
    return {
        "outer_lr": rates[0],
        "inner_lr": rates[1],
        "steps": steps,
        "cpu_seconds": seconds,
        "parameters": sum(each.numel() for each in model.parameters()),
        "written_floats": model.start.numel() if model.writes else 0,
        "curve": [sum(losses[at : at + tenth]) / len(losses[at : at + tenth]) for at in range(0, steps, tenth)],
        "last_loss": sum(losses[-2 * tenth :]) / len(losses[-2 * tenth :]),
        "measured": measured(model.eval(), data),
    }


@torch.no_grad()
def measured(model: Decoder, data: Conversations) -> list[dict[str, Any]]:
    """Return the share of answers of which every word is right, at every number of pairs, and of single words."""
    found = []
    for times in data.plan.times:
        length = times * data.plan.train_length
        samples = data.task.records(data.plan.conversations(times), length, seed=data.plan.draws["held out"])
        texts, asked = data.encoded(samples)
        right = (model.answers(texts, asked)[0].argmax(-1) == asked)[:, data.is_answer]
        exact = right.unflatten(1, (-1, data.task.words_of_answer)).all(-1).float()
        found.append(
            {"pairs": FIRST * times, "exact": float(exact.mean()), "words": float(right.float().mean())}
            | {"questions": exact.numel()}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=1500.0, help="CPU time of a training; the search has a sixth")
    parser.add_argument("--search", action="store_true", help="try the learning rates instead")
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny: no result")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/prefix_memory.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = Conversations(plan_of("gradmem", TASKS["letters"], 20))
    if arguments.smoke:
        for arm in ARMS:
            print(arm, run(data, arm, CHOSEN[arm], 0, 3)["measured"][0])
        return
    rows = Rows(arguments.out)
    for arm in arguments.arms:
        seconds = arguments.seconds / 6 if arguments.search else arguments.seconds
        todo = [(SEARCH_SEED, rates) for rates in RATES[arm]]
        if not arguments.search:
            todo = [(seed, CHOSEN[arm]) for seed in arguments.seeds]
        for seed, rates in todo:
            key = {"arm": arm, "seed": seed, "part": "search" if arguments.search else "test"}
            key |= {"seconds": arguments.seconds, "outer_lr": rates[0], "inner_lr": rates[1]}
            if rows.where(**key):
                continue
            row = rows.add(key | run(data, arm, rates, seed, steps_in(data, arm, seconds)))
            shown = " ".join(f"{each['pairs']}: {each['exact']:.3f}" for each in row["measured"])
            print(f"{key}, {row['steps']} steps, last loss {row['last_loss']:.2f}, exact match {shown}", flush=True)


if __name__ == "__main__":
    main()
