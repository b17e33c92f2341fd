"""How many pairs of keys and values a memory holds, against the bytes that are kept.

    python benchmarks/study/capacity.py --size small --arms all --seeds 0 1 2
    python benchmarks/study/capacity.py --task letters --arms "rank 8" --steps 1000 --seeds 0

GradMem's question (Kuratov et al. 2026), at its sizes: 4 layers of width 128, up to 96 pairs, the text gone when it is
asked. There a memory is 8 vectors of 128 floats, and 96 pairs are recalled with 88.4 % exact match. `--task letters` is
its task: keys and values of two letters out of 62 each, the same letters for both, and an answer is right when both of
its letters are. In `--task words` they are one word each. A text is nothing but pairs. `--size small` is the network of
the other studies. Per model: recall at 8 to 96 pairs, bytes of the fast weights, and how many of their floats a write
changes. Rows are written as they are measured; those that the file already has are not run again.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from study_rows import Rows

from memdlm.data.documents import plain_ids
from memdlm.data.synthetic import Questions, Task, choose, pick
from memdlm.data.wording import Facts
from memdlm.evaluation import recall
from memdlm.memory import MemoryConfig
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms, closed_book
from memdlm.workflows.studies.recall_study import RecallData, Trained, recall_data, train_arm

SIZES: dict[str, dict[str, Any]] = {
    "gradmem": {
        "network": {
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "initializer_range": 0.1,
        },
        "learning_rate": 3e-3,
    },
    "small": {},
}
FIRST = 8
"""Pairs of the first texts in training; lengths are multiples of it."""
SHOWN = ("size", "task", "arm", "steps")
"""What tells a line of the table from another."""
ARMS: dict[str, dict[str, Any]] = {
    "rank 8": {"inner_rank": 8, "inner_alpha": 16.0},
    "rank 32": {"inner_rank": 32, "inner_alpha": 64.0},
    "rank 96": {"inner_rank": 96, "inner_alpha": 192.0},
    "rank 32, gate and up": {
        "inner_rank": 32,
        "inner_alpha": 64.0,
        "inner_target_modules": "gate_proj,up_proj",
    },
    "rank 32, attention's output": {"inner_rank": 32, "inner_alpha": 64.0, "inner_target_modules": "o_proj"},
    "rank 32, all three": {
        "inner_rank": 32,
        "inner_alpha": 64.0,
        "inner_target_modules": "gate_proj,up_proj,down_proj",
    },
    "rank 16, two blocks": {"inner_rank": 16, "inner_alpha": 32.0, "inner_layer_fraction": 0.5},
}


@final
@dataclass(frozen=True, kw_only=True)
class Pairs(Task):
    """Nothing but "fact KEY VALUE", as many as the context has room for."""

    name: ClassVar[str] = "pairs"
    num_questions: int = 8
    wording: str = "symbols"
    letters: bool = False
    """Keys and values of two letters each; else of one word each, from two lists."""
    num_letters: int = 62
    num_keys: int = 192
    num_values: int = 64

    @property
    def words_of_answer(self) -> int:
        """Words of a value."""
        return 2 if self.letters else 1

    @property
    def words_of_pair(self) -> int:
        """Words of a pair, the record marker included."""
        return 1 + 2 * self.words_of_answer

    @property
    def chance(self) -> float:
        """One value out of all."""
        return 1 / (self.num_letters**2 if self.letters else self.num_values)

    def vocabulary(self) -> list[str]:
        """Keys, values and the record marker."""
        names = self._letters if self.letters else self._keys + self._values
        return ["fact", *names]

    def draw(self, generator: torch.Generator, length: int) -> tuple[Facts, Questions]:
        """Draw different keys with independent values; ask for different keys."""
        count = length // self.words_of_pair
        keys = choose(self._keys, count, generator)
        values = pick(self._values, count, generator)
        asked = torch.randperm(count, generator=generator)[: self.num_questions].tolist()
        facts = [f"fact {key} {value}".split() for key, value in zip(keys, values, strict=True)]
        return facts, [(f"fact {keys[index]}", values[index]) for index in asked]

    @property
    def _letters(self) -> list[str]:
        return [f"c{n}" for n in range(self.num_letters)]

    @property
    def _keys(self) -> list[str]:
        return self._twos if self.letters else [f"k{n}" for n in range(self.num_keys)]

    @property
    def _values(self) -> list[str]:
        return self._twos if self.letters else [f"v{n}" for n in range(self.num_values)]

    @property
    def _twos(self) -> list[str]:
        return [f"{first} {second}" for first in self._letters for second in self._letters]


TASKS = {"words": Pairs(), "letters": Pairs(letters=True)}


def plan_of(size: str, task: Pairs, steps: int) -> RecallPlan:
    """8 pairs first, then 16, 32 and 96: a model learns what a write is from few."""
    return closed_book(
        task=task,
        answer_words=task.words_of_answer,
        train_length=FIRST * task.words_of_pair,
        times=(1, 2, 4, 8, 12),
        steps=steps,
        num_train=16 * steps,
        num_eval=16,
        schedule=((0.4, 1), (0.2, 2), (0.2, 4), (0.2, 12)),
        **SIZES[size],
    )


def memory_of(plan: RecallPlan, arm: str) -> MemoryConfig:
    """The learned memory with the arm's rank, targets and blocks."""
    config = arms(plan)[OURS]
    assert config is not None
    return dataclasses.replace(config, **ARMS[arm])


def kept(data: RecallData, trained: Trained, text: str) -> dict[str, int]:
    """Bytes of a memory's fast weights, and how many of its floats a write of `text` changes."""
    memory = trained.memory
    ids = torch.tensor([plain_ids(data.tokenizer, text)])
    assert memory.learned is not None
    start = memory.learned.start()
    assert start is not None
    with torch.no_grad(), memory.write(ids):
        after = [tensor.squeeze(-3) for tensor in memory.fast.tensors()]
        moved = sum(int((new != old).sum()) for new, old in zip(after, (s.squeeze(-3) for s in start), strict=True))
        floats = sum(tensor.numel() for tensor in after)
    return {"bytes": 4 * floats, "written_floats": moved}


def measure(plan: RecallPlan, data: RecallData, trained: Trained, seed: int) -> list[dict[str, Any]]:
    """Recall at every number of pairs, and at the first without memory."""
    found = []
    for is_on, times in ((True, plan.times), (False, plan.times[:1])):
        for each in times:
            result = recall(
                trained.model,
                data.tokenizer,
                data.by_length[each * plan.train_length],
                steps=plan.answer_steps,
                seed=seed,
                memory=trained.memory if is_on else None,
                context=plan.context,
            )
            found.append(
                {"pairs": FIRST * each, "memory": is_on, "accuracy": result.accuracy, "questions": result.questions}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="gradmem")
    parser.add_argument("--task", choices=list(TASKS), default="words")
    parser.add_argument("--arms", nargs="+", default=["rank 8", "rank 32", "rank 96"], help="names, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/capacity.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(arguments.out)
    plan = plan_of(arguments.size, TASKS[arguments.task], arguments.steps)
    data = recall_data(plan)
    for arm in list(ARMS) if arguments.arms == ["all"] else arguments.arms:
        for seed in arguments.seeds:
            key = {
                "size": arguments.size,
                "task": arguments.task,
                "arm": arm,
                "seed": seed,
                "steps": arguments.steps,
            }
            if rows.where(**key):
                continue
            trained = train_arm(plan, data, memory_of(plan, arm), seed)
            row = key | {
                "parameters": trained.model.num_parameters(),
                "cpu_seconds": trained.cpu_seconds,
                "measured": measure(plan, data, trained, seed),
                **kept(data, trained, data.by_length[plan.lengths[0]][0].context),
                "curve": trained.curve,
            }
            rows.add(row)
            print(key, [f"{each['pairs']}: {each['accuracy']:.3f}" for each in row["measured"]], flush=True)
    print(markdown(rows.where()))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return a table: one line per size and arm, every seed shown."""
    pairs = sorted({each["pairs"] for row in rows for each in row["measured"]})
    heads = ["network", "task", "memory", "bytes", "floats that a write changes", *(f"{n} pairs" for n in pairs)]
    out = ["| " + " | ".join([*heads, f"{pairs[0]} pairs, memory off"]) + " |"]
    out.append("|---" * (len(pairs) + 6) + "|")
    for about in dict.fromkeys(tuple(row[name] for name in SHOWN) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in SHOWN) == about]
        cells = [
            ", ".join(
                f"{each['accuracy']:.3f}"
                for row in own
                for each in row["measured"]
                if (each["pairs"], each["memory"]) == (count, is_on)
            )
            for count, is_on in [*((count, True) for count in pairs), (pairs[0], False)]
        ]
        sizes = f"{own[0]['bytes']:,} | {own[0]['written_floats']:,}"
        network = f"{own[0]['size']}, {own[0]['steps']} steps"
        out.append(" | ".join(["", network, own[0]["task"], own[0]["arm"], sizes, *cells, ""]).strip())
    return "\n".join(out)


if __name__ == "__main__":
    main()
