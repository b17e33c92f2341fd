"""Controls at their own best: no memory, the published one, first order and ours, each with settings of its own.

    python benchmarks/study/controls.py --search
    python benchmarks/study/controls.py --seeds 30 31 32

`--search` tries settings of every arm on validation conversations: outer learning rate, inner learning rate, rank and
steps, one after the other on the first of `--search-seeds`, then the three best on the other seeds as well. Its rows
stay in the file. The best of them by mean accuracy at the training length, then at four times that, is what the second
command runs on test conversations and seeds. MDLM is also run with as many parameters as ours has with all that is
learned of its write, and with as many CPU seconds as ours took just before, on the same seed. Rows are written as they
are measured; those that the file already has are not run again. `--smoke` runs everything in a tiny size; its figures
say nothing.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from study_rows import SMOKE, SMOKE_STEPS, Rows, on_validation

from memdlm.workflows.studies.plans import MAIN, OURS, RecallPlan, arms, closed_book
from memdlm.workflows.studies.recall_study import (
    RecallData,
    Trained,
    accuracies,
    new_model,
    recall_data,
    train_arm,
)

PLANS: dict[str, Callable[..., RecallPlan]] = {"window": RecallPlan, "gone": closed_book}
PLAIN, WIDE, LONG = "MDLM", "MDLM, equal parameters", "MDLM, equal compute"
TESTED = (OURS, PLAIN, WIDE, LONG, "published", "first order")
"""In this order: the equal ones read what the first two took."""
FINALISTS = 3
ROWS_PER_STEP = 16
"""Training conversations per step, as in both plans: more steps see more of them."""
TIMES = {"search": (1, 4), "test": (1, 4, 16)}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is searched; an arm without memory has neither inner rate nor rank."""

    learning_rate: float
    inner_lr: float | None
    rank: int | None
    steps: int

    def __str__(self) -> str:
        inner = "" if self.inner_lr is None else f"inner {self.inner_lr:g}, rank {self.rank}, "
        return f"rate {self.learning_rate:g}, {inner}{self.steps} steps"


def start_of(base: RecallPlan, arm: str) -> Setting:
    """Return the settings that the arm has in the main comparison: the search begins there."""
    config = arms(base)[arm]
    inner, rank = (None, None) if config is None else (config.inner_lr, config.inner_rank)
    return Setting(learning_rate=base.learning_rate, inner_lr=inner, rank=rank, steps=base.steps)


def options_of(start: Setting, arm: str) -> dict[str, list[Any]]:
    """Return, in the order of the search, what else is tried of each setting; steps last, because they cost most."""
    tried: dict[str, list[Any]] = {"learning_rate": [2e-3, 1e-2]}
    if start.inner_lr is not None and start.rank is not None:
        # The published rate is a hundredth of ours: what is tried of it lies between the two.
        factors = (10, 100) if arm == "published" else (0.3, 3)
        tried["inner_lr"] = [start.inner_lr * factor for factor in factors]
        tried["rank"] = [start.rank // 2, start.rank * 2]
    tried["steps"] = [start.steps * 2, start.steps * 4]
    return tried


@dataclass
class Study:
    rows: Rows
    plan: str
    stage: str
    conversations: int
    smoke: bool
    run: str
    """When this process began: only seconds of one run are compared."""

    def __post_init__(self) -> None:
        self._data: dict[int, RecallData] = {}

    def base(self) -> RecallPlan:
        return PLANS[self.plan](**(SMOKE | {"steps": SMOKE_STEPS, "rank": 2} if self.smoke else {}))

    def plan_of(self, setting: Setting, network: dict[str, Any]) -> RecallPlan:
        changes: dict[str, Any] = {
            "num_eval": self.conversations,
            **(SMOKE if self.smoke else {}),
            "times": TIMES[self.stage],
            "learning_rate": setting.learning_rate,
            "steps": setting.steps,
            "num_train": ROWS_PER_STEP * setting.steps,
            "network": network,
        }
        if setting.rank is not None:
            changes["rank"] = setting.rank
        plan = PLANS[self.plan](**changes)
        return on_validation(plan) if self.stage == "search" else plan

    def data(self, plan: RecallPlan) -> RecallData:
        # The conversations depend on the steps alone.
        if plan.steps not in self._data:
            self._data = {plan.steps: recall_data(plan)}
        return self._data[plan.steps]

    def measured(
        self, name: str, setting: Setting, seed: int, *, arm: str | None = None, network: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the row of a trained arm; it is trained if the file has none."""
        key = {
            "stage": self.stage,
            "plan": self.plan,
            "arm": name,
            "seed": seed,
            "setting": dataclasses.asdict(setting),
        }
        there = self.rows.where(**key)
        if there:
            return there[0]
        plan = self.plan_of(setting, {} if network is None else network)
        data = self.data(plan)
        config = arms(plan)[name if arm is None else arm]
        if config is not None:
            config = dataclasses.replace(config, inner_lr=setting.inner_lr)
        trained = train_arm(plan, data, config, seed)
        row = self.rows.add(
            key
            | {
                "run": self.run,
                "network": dict(plan.network),
                "parameters": parameters(trained),
                "cpu_seconds": trained.cpu_seconds,
                "accuracy": accuracies(plan, data, trained, seed),
            }
        )
        print(line(row), flush=True)
        return row


def parameters(trained: Trained) -> int:
    """Count the network's parameters and those of its write: start, rates and gate."""
    learned = [] if trained.memory.learned is None else trained.memory.learned.parameters()
    return trained.model.num_parameters() + sum(each.numel() for each in learned)


def figures(row: dict[str, Any], is_on: bool = True) -> list[float]:
    """Return the accuracy at every length, the shortest first."""
    return [each["accuracy"] for each in row["accuracy"] if each["memory"] == is_on]


def search(study: Study, arm: str, seeds: Sequence[int]) -> None:
    """Try one setting after the other from the best so far; the best of all on the other seeds too."""
    first, *others = seeds
    best = start_of(study.base(), arm)
    tried: dict[Setting, list[float]] = {}
    most = 1 if study.smoke else None
    for name, values in options_of(best, arm).items():
        for setting in (best, *(dataclasses.replace(best, **{name: value}) for value in values[:most])):
            tried[setting] = figures(study.measured(arm, setting, first))
        # Of equals the one that was tried first.
        best = max(tried, key=lambda setting: tried[setting])
    for setting in sorted(tried, key=lambda setting: tried[setting], reverse=True)[: most or FINALISTS]:
        for seed in others:
            study.measured(arm, setting, seed)


def chosen(rows: Rows, plan: str, arm: str) -> Setting:
    """Return the best setting among those that were measured on most seeds: at 1x, then at 4x, then the first."""
    found: dict[Setting, list[list[float]]] = {}
    for row in rows.where(stage="search", plan=plan, arm=arm):
        found.setdefault(Setting(**row["setting"]), []).append(figures(row))
    if not found:
        raise SystemExit(f"{rows.path} has no search of {arm!r} in the plan {plan!r}; run with --search first.")
    most = max(len(each) for each in found.values())
    means = {
        setting: [statistics.fmean(column) for column in zip(*each, strict=True)]
        for setting, each in found.items()
        if len(each) == most
    }
    return max(means, key=lambda setting: means[setting])


def at_an_end(rows: Rows, plan: str, arm: str, setting: Setting) -> list[str]:
    """Return the settings chosen at the greatest or smallest value that was tried: a better one may lie beyond."""
    ends = []
    for name, value in dataclasses.asdict(setting).items():
        tried = {row["setting"][name] for row in rows.where(stage="search", plan=plan, arm=arm)}
        # Fewer steps than those of the main comparison are not what a control lacks.
        if len(tried) > 1 and (value == max(tried) or (value == min(tried) and name != "steps")):
            ends.append(name)
    return ends


def wide(study: Study, setting: Setting, least: int) -> dict[str, Any]:
    """Return the sizes of the narrowest network with at least so many parameters, in our proportions."""
    plan = study.plan_of(setting, {})
    data = study.data(plan)
    config: Any = new_model(plan, data, 0).config
    width, ratio = config.hidden_size, config.intermediate_size / config.hidden_size
    while True:
        sizes = {"hidden_size": width, "intermediate_size": round(ratio * width)}
        if new_model(study.plan_of(setting, sizes), data, 0).num_parameters() >= least:
            return sizes
        width += config.num_attention_heads


def test(study: Study, names: Sequence[str], seed: int) -> None:
    """Run the chosen settings; what is to be equal to ours is made so from this seed's own rows."""
    # The equal ones read rows of these two.
    needed = {*names, *((OURS, PLAIN) if {WIDE, LONG} & {*names} else ())}
    settings = {arm: chosen(study.rows, study.plan, arm) for arm in MAIN if arm in needed}
    if LONG in names:
        of_one_run(study, {arm: settings[arm] for arm in (OURS, PLAIN)}, seed)
    for name in names:
        if name in settings:
            study.measured(name, settings[name], seed)
        elif not study.rows.where(stage="test", plan=study.plan, arm=name, seed=seed):
            ours, plain = (study.measured(arm, settings[arm], seed) for arm in (OURS, PLAIN))
            setting, network = settings[PLAIN], None
            if name == WIDE:
                network = wide(study, setting, ours["parameters"])
            else:
                ratio = ours["cpu_seconds"] / plain["cpu_seconds"]
                setting = dataclasses.replace(setting, steps=max(1, round(setting.steps * ratio)))
            study.measured(name, setting, seed, arm=PLAIN, network=network)


def of_one_run(study: Study, settings: dict[str, Setting], seed: int) -> None:
    """Before compute is made equal, forget the rows of these arms unless one run has measured all of them.

    Seconds of two runs say nothing about each other.
    """
    key = {"stage": "test", "plan": study.plan, "seed": seed}
    if study.rows.where(**key, arm=LONG):
        return
    own = [{**key, "arm": arm, "setting": dataclasses.asdict(setting)} for arm, setting in settings.items()]
    found = [row for each in own for row in study.rows.where(**each)]
    if len(found) < len(own) or len({row["run"] for row in found}) > 1:
        for each in own:
            study.rows.drop(**each)


def warm_up() -> None:
    """Train a little: a process's first training also pays for what Python loads on the way."""
    plan = RecallPlan(**SMOKE, steps=SMOKE_STEPS, num_train=8, rank=2)
    train_arm(plan, recall_data(plan), arms(plan)[OURS], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="choose settings, on validation seeds and conversations")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--arms", nargs="+", choices=TESTED, help="default: all; a search knows those of four settings")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--seeds", type=int, nargs="+", default=[30, 31, 32], help="of the test")
    parser.add_argument("--conversations", type=int, default=32, help="per length, of 8 questions each")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, search and test")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/study/results/controls.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, run = Rows(arguments.out), datetime.now().isoformat(timespec="seconds")
    names = TESTED if arguments.arms is None else [name for name in TESTED if name in arguments.arms]
    seeds = arguments.seeds[:1] if arguments.smoke else arguments.seeds
    warm_up()
    for plan in arguments.plans:
        if arguments.search or arguments.smoke:
            study = Study(rows, plan, "search", arguments.conversations, arguments.smoke, run)
            for arm in (name for name in MAIN if arguments.smoke or name in names):
                search(study, arm, arguments.search_seeds)
        if arguments.smoke or not arguments.search:
            study = Study(rows, plan, "test", arguments.conversations, arguments.smoke, run)
            for seed in seeds:
                test(study, names, seed)
    print(searched(rows))
    print(tested(rows))


def line(row: dict[str, Any]) -> str:
    shown = " ".join(f"{value:.3f}" for value in figures(row))
    head = f"{row['stage']} {row['plan']}, {row['arm']}, seed {row['seed']}, {Setting(**row['setting'])}"
    return f"{head}: {shown}  {row['cpu_seconds']:.0f} CPU s"


def searched(rows: Rows) -> str:
    """Return a table: what was chosen for every arm, after how many trainings, and how it did on each seed."""
    out = ["| plan | arm | trainings | chosen | at an end of what was tried | 1x, 4x of every seed |", "|---" * 6 + "|"]
    for plan, arm in dict.fromkeys((row["plan"], row["arm"]) for row in rows.where(stage="search")):
        every, setting = rows.where(stage="search", plan=plan, arm=arm), chosen(rows, plan, arm)
        own = [row for row in every if row["setting"] == dataclasses.asdict(setting)]
        shown = "; ".join(", ".join(f"{value:.3f}" for value in figures(row)) for row in own)
        ends = ", ".join(at_an_end(rows, plan, arm, setting)) or "none"
        out.append(f"| {plan} | {arm} | {len(every)} | {setting} | {ends} | {shown} |")
    return "\n".join(out)


def tested(rows: Rows) -> str:
    """Return a table: one line per plan and arm, every seed shown; the last accuracy is 1x with the memory off."""
    heads = [f"{times}x" for times in TIMES["test"]]
    out = [f"| plan | arm | steps | {' | '.join(heads)} | 1x, memory off | parameters | CPU s |", "|---" * 9 + "|"]
    for plan, arm in dict.fromkeys((row["plan"], row["arm"]) for row in rows.where(stage="test")):
        own = rows.where(stage="test", plan=plan, arm=arm)
        columns = [*zip(*(figures(row) for row in own), strict=True), [figures(row, False)[0] for row in own]]
        cells = [", ".join(f"{value:.3f}" for value in column) for column in columns]
        steps = ", ".join(dict.fromkeys(str(row["setting"]["steps"]) for row in own))
        seconds = ", ".join(f"{row['cpu_seconds']:.0f}" for row in own)
        out.append(f"| {plan} | {arm} | {steps} | {' | '.join(cells)} | {own[0]['parameters']} | {seconds} |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
