"""Which splits and columns a run uses, and what it says of the others."""

import io
import json

import datasets
import pytest
from rich.console import Console

from memdlm.cli.main import main
from memdlm.data.sources import EVALUATION_SPLITS
from memdlm.errors import ConfigError, DataError
from memdlm.models import load_tokenizer
from memdlm.workflows.display import Display
from memdlm.workflows.runs.datasets import load_data
from memdlm.workflows.runs.options import DataOptions


@pytest.fixture(autouse=True)
def _own_index(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMDLM_CACHE", str(tmp_path / "index"))


def rows_of(word, count):
    return [{"prompt": word, "response": word, "id": place} for place in range(count)]


def saved(folder, **splits):
    found = {name: datasets.Dataset.from_list(rows_of(f"w{index}", 2)) for index, name in enumerate(splits)}
    datasets.DatasetDict(found).save_to_disk(folder)
    return str(folder)


def loaded(tokenizer, *, evaluates=True, **options):
    out = io.StringIO()
    found = load_data(
        DataOptions(**options), tokenizer, evaluates=evaluates, display=Display(Console(file=out, width=500))
    )
    return found, out.getvalue()


def words(tokenizer, rows):
    return {tokenizer.decode(row["input_ids"]).split()[1] for row in rows}


@pytest.mark.parametrize("name", EVALUATION_SPLITS)
def test_a_split_to_evaluate_on_is_used_by_its_name(name, word_tokenizer, tmp_path):
    args = saved(tmp_path / "d", train=1, **{name: 1})
    found, said = loaded(word_tokenizer, dataset_args=args)
    assert words(word_tokenizer, found.train) == {"w0"}
    assert words(word_tokenizer, found.evaluation) == {"w1"}
    assert "splits that are not used" not in said
    assert "columns that are not used: id" in said
    found, said = loaded(word_tokenizer, dataset_args=args, evaluates=False)
    assert f"splits that are not used: {name} (2 rows)" in said
    assert found.evaluation is None


def test_a_validation_split_is_preferred_and_others_are_named(word_tokenizer, tmp_path):
    args = saved(tmp_path / "d", train=1, test=1, validation=1, extra=1)
    found, said = loaded(word_tokenizer, dataset_args=args)
    assert words(word_tokenizer, found.evaluation) == {"w2"}
    assert "splits that are not used: test (2 rows), extra (2 rows)" in said.replace(
        "extra (2 rows), test (2 rows)", "test (2 rows), extra (2 rows)"
    )
    found, said = loaded(word_tokenizer, dataset_args=args, eval_dataset_args=saved(tmp_path / "e", dev=1))
    assert words(word_tokenizer, found.evaluation) == {"w0"}
    assert "validation (2 rows)" in said
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        loaded(word_tokenizer, dataset_args=saved(tmp_path / "f", train=1, extra=1))
    with pytest.raises(DataError, match="has no validation or test split: a, b"):
        loaded(word_tokenizer, dataset_args=args, eval_dataset_args=saved(tmp_path / "g", a=1, b=1))


def test_another_map_is_another_dataset(word_tokenizer, tmp_path, capsys):
    path, model = tmp_path / "x.jsonl", tmp_path / "model"
    path.write_text("".join(json.dumps({"q": "w1", "a": "w2", "b": "w3"}) + "\n" for _ in range(3)))
    word_tokenizer.save_pretrained(model)
    command = ["preprocess", "--model", str(model), "--dataset_args", str(path), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--column_map", "q=prompt,a=response"]) == 0
    assert "columns that are not used: b" in " ".join(capsys.readouterr().err.split())
    assert main([*command, "--column_map", "q=prompt,b=response"]) == 2
    assert "column_map: made with q=prompt,a=response, wanted q=prompt,b=response" in capsys.readouterr().err
    assert main(command) == 2
    assert main([*command, "--column_map", "q=prompt,b=answers"]) == 2
    options = {"dataset_args": str(path), "load_preprocessed_data": True, "preprocessed_dir": str(tmp_path)}
    word_tokenizer = load_tokenizer(model)
    loaded(word_tokenizer, evaluates=False, column_map="q=prompt,a=response", **options)
    with pytest.raises(DataError, match="column_map: made with"):
        loaded(word_tokenizer, evaluates=False, column_map="q=prompt,b=response", **options)
