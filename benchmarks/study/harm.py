"""What a memory costs where it does not help, and what else can be read out of it.

    python benchmarks/study/harm.py --seeds 0 1 2

*Harm*: a model that reads from attention and from memory (the mixture of `mixture.py`, 1,1,1) is asked about a text in
sight, while the memory of another text is open: filler, facts about other keys, other facts about the same keys. Each
is written without a gate and with the gates of `memdlm memorize`; where a gate refuses, the bare model answers.
*Exposure*: the memory of a document that is gone (`closed_book`) is read by prompts that were not meant for it: a text
of nothing but masks, and a question about every key there is. Rows are written as they are measured; seeds that the
file already has are not run again.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from recall_suite import EVEN
from study_rows import Rows

from memdlm.data.documents import plain_ids
from memdlm.data.synthetic import KeyValueRecall, Sample
from memdlm.data.wording import scatter
from memdlm.evaluation import recall
from memdlm.inference import GenerationConfig, generate, infill
from memdlm.memory import ParametricMemory
from memdlm.randomness import derive
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.memorize import GATES
from memdlm.workflows.sessions.writing import Gate, Memorizer
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms, closed_book
from memdlm.workflows.studies.recall_study import RecallData, Trained, recall_data, train_arm

MIX, REACH = "1,1,1", 4


def others(task: KeyValueRecall, sample: Sample, index: int, length: int) -> dict[str, str]:
    """Texts of `length` words that say nothing about what `sample` is asked, or the contrary."""
    generator = derive("harm", index)
    own = [word for word in sample.context.split() if word.startswith("k")]
    free = [f"k{n}" for n in range(task.num_keys) if f"k{n}" not in own]

    def about(keys: Sequence[str]) -> str:
        draws = torch.randint(task.num_values, (len(keys),), generator=generator).tolist()
        facts = [["fact", key, f"v{value}"] for key, value in zip(keys, draws, strict=True)]
        return " ".join(scatter(facts, length, generator, task.name))

    return {
        "filler": " ".join(scatter([], length, generator, task.name)),
        "facts about other keys": about(free[: task.num_pairs]),
        "other facts about the same keys": about(own),
    }


def harm(plan: RecallPlan, data: RecallData, trained: Trained, seed: int) -> list[dict[str, Any]]:
    """Accuracy about a text in sight while the memory of another is open, per kind of text and gate."""
    task, rows = plan.task, []
    assert isinstance(task, KeyValueRecall)
    samples = data.by_length[plan.train_length]
    memory = ParametricMemory(
        trained.model, trained.memory.config, mask_token_id=trained.memory.mask_token_id, tokenizer=data.tokenizer
    )
    memory.learned = trained.memory.learned
    texts = [others(task, sample, index, plan.train_length) for index, sample in enumerate(samples)]

    def asked(kind: str | None, gate: str) -> dict[str, Any]:
        correct = questions = kept = 0
        for sample, text in zip(samples, texts, strict=True):
            opened: Any = nullcontext()
            if kind is not None:
                ids = torch.tensor(plain_ids(data.tokenizer, text[kind]))
                (done,) = Memorizer(memory, Gate(name=gate), seed, Silent()).run([ids])
                kept += done.kept
                opened = memory.recall(done.memory) if done.kept else nullcontext()
            with opened:
                found = recall(trained.model, data.tokenizer, [sample], steps=plan.answer_steps, seed=seed)
            correct, questions = correct + found.correct, questions + found.questions
        name = "none" if kind is None else kind
        shown = {"memory of": name, "gate": gate, "kept": kept, "texts": len(samples)}
        return shown | {"accuracy": correct / questions, "questions": questions}

    rows.append(asked(None, "none"))
    for kind in texts[0]:
        rows += [asked(kind, gate) for gate in GATES]
    return rows


class Silent(Display):
    """Shows nothing."""

    def bar(self, phase: str, description: str, total: int) -> Any:
        """Open nothing."""
        return nullcontext(lambda done: None)


def facts_in(text: str) -> set[tuple[str, str]]:
    """The pairs "fact KEY VALUE" in a text."""
    words = text.split()
    return {(b, c) for a, b, c in zip(words, words[1:], words[2:], strict=False) if a == "fact" and c.startswith("v")}


def exposure(plan: RecallPlan, data: RecallData, trained: Trained, seed: int) -> list[dict[str, Any]]:
    """How much of a document is found by prompts that were not meant for it, with its memory and without."""
    task, rows = plan.task, []
    assert isinstance(task, KeyValueRecall)
    samples = data.by_length[plan.train_length]
    config = GenerationConfig(max_new_tokens=2)
    keys = [[{"role": "user", "content": f"fact k{number}"}] for number in range(task.num_keys)]
    for is_on in (True, False):
        counts = dict.fromkeys(("pairs", "masked text", "every key", "claims about other keys"), 0)
        for sample in samples:
            ids = torch.tensor([plain_ids(data.tokenizer, sample.context)])
            pairs = facts_in(sample.context)
            with trained.memory.write(ids, generator=derive("harm", seed)) if is_on else nullcontext():
                length = ids.shape[1]
                text = infill(trained.model, data.tokenizer, [data.tokenizer.mask_token * length], config).texts[0]
                answers = generate(trained.model, data.tokenizer, keys, config).texts
            told = {(f"k{number}", answer.strip()) for number, answer in enumerate(answers)}
            counts["pairs"] += len(pairs)
            counts["masked text"] += len(pairs & facts_in(text))
            counts["every key"] += len(pairs & told)
            known = {key for key, _ in pairs}
            counts["claims about other keys"] += sum(value.startswith("v") for key, value in told if key not in known)
        strangers = len(samples) * (task.num_keys - task.num_pairs)
        rows.append({"memory": is_on, "texts": len(samples), "other keys": strangers, **counts})
    return rows


def run(seed: int, quick: bool) -> dict[str, Any]:
    """Train both models of a seed and measure them."""
    sizes: dict[str, Any] = {"num_eval": 2, "steps": 4} if quick else {"num_eval": 32}
    steps = sizes.pop("steps", 900)
    mixed = RecallPlan(
        **{"window": None, "steps": steps, "num_train": 16 * steps, "learning_rate": 2e-3, "times": (1,)},
        **{"training": EVEN, "schedule": ((1.0, 1),)},
        **sizes,
    )
    config = dataclasses.replace(arms(mixed)[OURS], batch_mix=MIX, batch_reach=REACH)
    data = recall_data(mixed)
    found = {"seed": seed, "harm": harm(mixed, data, train_arm(mixed, data, config, seed), seed)}
    gone = closed_book(times=(1,), **sizes, **({"steps": steps} if quick else {}))
    data = recall_data(gone)
    return found | {"exposure": exposure(gone, data, train_arm(gone, data, arms(gone)[OURS], seed), seed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny: no result")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/harm.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(arguments.out)
    for seed in arguments.seeds:
        if not rows.where(seed=seed):
            rows.add(run(seed, arguments.smoke))
    print(markdown(rows.where()))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return both tables, every seed shown."""
    out = ["| memory of | gate | kept | accuracy about a text in sight |", "|---" * 4 + "|"]
    for index, first in enumerate(rows[0]["harm"]):
        own = [row["harm"][index] for row in rows]
        kept = ", ".join(f"{each['kept']} of {each['texts']}" for each in own)
        accuracy = ", ".join(f"{each['accuracy']:.3f}" for each in own)
        out.append(f"| {first['memory of']} | {first['gate']} | {kept} | {accuracy} |")
    out += ["", "| memory | pairs in masked text | pairs by asking every key | claims about keys that have none |"]
    out.append("|---" * 4 + "|")
    for index, first in enumerate(rows[0]["exposure"]):
        own = [row["exposure"][index] for row in rows]
        cells = [
            ", ".join(f"{each[name] / each['pairs']:.3f}" for each in own) for name in ("masked text", "every key")
        ]
        cells.append(", ".join(f"{each['claims about other keys'] / each['other keys']:.3f}" for each in own))
        out.append(f"| {'on' if first['memory'] else 'off'} | " + " | ".join(cells) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
