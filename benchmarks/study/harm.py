"""What a memory costs where it does not help, and what else can be read out of it.

    python benchmarks/study/harm.py --mixes 1,1,1 1,1,1,1 --seeds 0 1 2

*Harm*: a model that reads from attention and from memory (the mixtures of `mixture.py`, 300 steps per kind; the fourth
kind has the text in sight and the memory of another row) is asked about a text in sight, while the memory of another
text is open: filler, facts about other keys, other facts about the same keys. Each is written without a gate and with
the gates of `memdlm memorize`; where a gate refuses, the bare model answers. Its own memory alone, and both, are
measured too. *Exposure*: the memory of a document that is gone (`closed_book`) is read by prompts that were not meant
for it: a text of nothing but masks, and a question about every key there is. Rows are written as they are measured;
those that the file already has are not run again.
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
from memdlm.models.blocks.masks import SlidingWindow
from memdlm.randomness import derive
from memdlm.workflows.display import Display
from memdlm.workflows.sessions.memorize import GATES
from memdlm.workflows.sessions.writing import Gate, Memorizer
from memdlm.workflows.studies.plans import OURS, RecallPlan, arms, closed_book
from memdlm.workflows.studies.recall_study import RecallData, Trained, recall_data, train_arm

REACH, STEPS_PER_KIND = 4, 300
SKILLS = {"memory alone": (True, SlidingWindow(REACH)), "text alone": (False, None), "both": (True, None)}


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


def skills(plan: RecallPlan, data: RecallData, trained: Trained, seed: int) -> dict[str, float]:
    """Accuracy with the text's own memory alone, with the text alone, and with both."""
    found = {}
    for skill, (is_on, pattern) in SKILLS.items():
        result = recall(
            trained.model,
            data.tokenizer,
            data.by_length[plan.train_length],
            steps=plan.answer_steps,
            seed=seed,
            memory=trained.memory if is_on else None,
            attention_pattern=pattern,
        )
        found[skill] = result.accuracy
    return found


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


def run_harm(mix: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train the model that reads from both, and ask it beside memories of other texts."""
    steps = 4 if quick else STEPS_PER_KIND * len(mix.split(","))
    sizes: dict[str, Any] = {"num_eval": 2 if quick else 32}
    mixed = RecallPlan(
        **{"window": None, "steps": steps, "num_train": 16 * steps, "learning_rate": 2e-3, "times": (1,)},
        **{"training": EVEN, "schedule": ((1.0, 1),)},
        **sizes,
    )
    config = dataclasses.replace(arms(mixed)[OURS], batch_mix=mix, batch_reach=REACH)
    data = recall_data(mixed)
    trained = train_arm(mixed, data, config, seed)
    found = {"seed": seed, "mix": mix, "steps": steps, "skills": skills(mixed, data, trained, seed)}
    return found | {"harm": harm(mixed, data, trained, seed)}


def run_exposure(seed: int, quick: bool) -> dict[str, Any]:
    """Train the model whose document is gone, and read its memories."""
    gone = closed_book(times=(1,), **({"num_eval": 2, "steps": 4} if quick else {"num_eval": 32}))
    data = recall_data(gone)
    return {"seed": seed, "exposure": exposure(gone, data, train_arm(gone, data, arms(gone)[OURS], seed), seed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixes", nargs="+", default=["1,1,1", "1,1,1,1"], help="of the models asked beside a text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny: no result")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/harm.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(arguments.out)
    for seed in arguments.seeds:
        for mix in arguments.mixes:
            if not rows.where(seed=seed, mix=mix):
                rows.add(run_harm(mix, seed, arguments.smoke))
        if not any("exposure" in row for row in rows.where(seed=seed)):
            rows.add(run_exposure(seed, arguments.smoke))
    for mix in arguments.mixes:
        print(harm_table(mix, rows.where(mix=mix)), "\n")
    print(exposure_table([row for row in rows.where() if "exposure" in row]))


def harm_table(mix: str, rows: list[dict[str, Any]]) -> str:
    """Return the accuracies of one mixture, every seed shown."""
    out = [f"| {mix}: memory of | gate | kept | accuracy about a text in sight |", "|---" * 4 + "|"]
    # The first rows of the mixture 1,1,1 were measured without; mixture.json has its skills.
    for skill in SKILLS if all("skills" in row for row in rows) else ():
        out.append(f"| the same text | {skill} | | " + ", ".join(f"{row['skills'][skill]:.3f}" for row in rows) + " |")
    for index, first in enumerate(rows[0]["harm"]):
        own = [row["harm"][index] for row in rows]
        kept = ", ".join(f"{each['kept']} of {each['texts']}" for each in own)
        accuracy = ", ".join(f"{each['accuracy']:.3f}" for each in own)
        out.append(f"| {first['memory of']} | {first['gate']} | {kept} | {accuracy} |")
    return "\n".join(out)


def exposure_table(rows: list[dict[str, Any]]) -> str:
    """Return what memories give away, every seed shown."""
    out = ["| memory | pairs in masked text | pairs by asking every key | claims about keys that have none |"]
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
