"""One page that compares the cards that were measured, from their JSON files alone.

python benchmarks/gpu/page.py [--out benchmarks/results/gpu]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

Row = dict[str, Any]
Show = Callable[[Row], str]

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>memdlm on GPUs</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
 table { border-collapse: collapse; margin: .5rem 0 2rem; } div { overflow-x: auto; }
 td, th { padding: .2rem .8rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap; }
 td:first-child, th:first-child { text-align: left; } .bad { color: #c00; }
</style>
<h1>memdlm on GPUs</h1>
{% if is_quick %}<p class="bad">Sizes are tiny in at least one folder: nothing here is a result.</p>{% endif %}
{% if not cards %}<p>No card has been measured yet: <code>make gpu</code>.</p>{% endif %}
{% for table in tables %}
<h2>{{ table.title }}</h2>{% if table.note %}<p>{{ table.note }}</p>{% endif %}
<div><table><tr><th></th>{% for card in cards %}<th>{{ card }}</th>{% endfor %}</tr>
{% for name, cells in table.rows %}<tr><td>{{ name }}</td>
{%- for cell in cells %}<td{% if cell.startswith("failed") %} class="bad"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
</html>
"""


def tera(value: float) -> str:
    return f"{value / 1e12:.3g}"


def giga(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f} GB"


def peak(row: Row) -> str:
    return f"{tera(row['flop_per_s'])} TFLOP/s" if "flop_per_s" in row else f"{row['bytes_per_s'] / 1e9:.4g} GB/s"


def written(row: Row) -> str:
    depth = "" if row["layers"] == row["of_layers"] else f" ({row['layers']} of {row['of_layers']} layers)"
    share = f"{100 * row['share_of_peak']:.0f} % of the peak"
    return f"{1e3 * row['median_s']:.1f} ms, {share}, {giga(row['peak_bytes'])}{depth}"


def step(row: Row) -> str:
    depth = "" if row["layers"] == row["of_layers"] else f" ({row['layers']} of {row['of_layers']} layers)"
    ours, bare = row["memdlm"], row["mdlm"]
    return (
        f"{ours['median_s']:.3f} s over {bare['median_s']:.3f} s: {row['time_over_mdlm']:.2f}, "
        f"{giga(ours['peak_bytes'])}{depth}"
    )


def decoded(row: Row) -> str:
    ours, plain = row["ours"], row["plain"]
    return (
        f"{ours['tokens_per_s']:.1f} tokens/s, {ours['ms_per_pass']:.1f} ms a pass; plain {plain['tokens_per_s']:.1f}, "
        f"{plain['ms_per_pass']:.1f} ms: {row['plain_over_ours']:.2f} times less time"
    )


def profiled(row: Row) -> str:
    first = ", ".join(f"{each['name'][:40]} {100 * each['share']:.0f} %" for each in row["top"][:3])
    return f"idle {100 * row['idle_share']:.0f} %; {first}"


def studied(row: Row) -> str:
    if "measured" in row:
        exact = ", ".join(f"{way}: {each['exact']:.3f}" for way, each in row["measured"].items())
        return f"{exact} ({row['steps']} steps)"
    return ", ".join(f"{each['length']}: {each['accuracy']:.3f}" for each in row["accuracy"] if each["memory"])


SECTIONS: dict[str, tuple[str, str, Show]] = {
    "tests": ("Tests", "Passed, and skipped.", lambda row: f"{row['passed']} passed, {len(row['skipped'])} skipped"),
    "peaks": ("Peaks", "Square and grouped products; copies count bytes read and written.", peak),
    "writes": ("Writes", "Rows x tokens. The share is of the card's own bfloat16 matrix peak.", written),
    "steps": ("Training steps", "With memory over without, taking turns.", step),
    "decoding": ("Decoding", "LLaDA2.x's shape, beside the published loop.", decoded),
    "profile": ("What bounds a slow write", "", profiled),
    "study": (
        "Recall study",
        "Accuracy with memory, by length; of English, exact match by what is asked with.",
        studied,
    ),
}


def read(out: Path) -> dict[str, dict[str, Row]]:
    """Return card -> part -> record, of all folders in `out`."""
    found: dict[str, dict[str, Row]] = {}
    for path in sorted(out.glob("*/*.json")):
        found.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text())
    return found


def cell(record: Row | None, name: str, show: Show) -> str:
    row = None if record is None else record["rows"].get(name)
    if row is None:
        return "not measured"
    return f"failed: {row['failed'][:80]}" if "failed" in row else show(row)


def machine(parts: dict[str, Row], key: str) -> str:
    """Return what the card's parts say of `key`, each value once."""
    return ", ".join(dict.fromkeys(str(record["machine"].get(key)) for record in parts.values()))


def made_of(found: dict[str, dict[str, Row]]) -> str:
    """Return the page for the records of `read`."""
    rows = [(key, [machine(parts, key) for parts in found.values()]) for key in ("driver", "torch", "date", "commit")]
    tables: list[Row] = [{"title": "Machines", "note": "", "rows": rows if found else []}]
    for part, (title, note, show) in SECTIONS.items():
        records = [parts.get(part) for parts in found.values()]
        names = dict.fromkeys(name for record in records if record for name in record["rows"])
        if names:
            rows = [(name, [cell(record, name, show) for record in records]) for name in names]
            tables.append({"title": title, "note": note, "rows": rows})
    is_quick = any(record["is_quick"] for parts in found.values() for record in parts.values())
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(PAGE).render(cards=list(found), tables=tables, is_quick=is_quick)


def write(out: Path) -> Path:
    """Write `page.html` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "page.html"
    path.write_text(made_of(read(out)))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu")
    print(write(parser.parse_args().out))
