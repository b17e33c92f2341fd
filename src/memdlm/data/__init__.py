"""Data: records, chat templates, collation into token batches, and the synthetic long-context tasks."""

from memdlm.data.chat import Encoded, encode_chat
from memdlm.data.collate import Collator
from memdlm.data.encoding import EncodingOptions, TokenRows, fit
from memdlm.data.records import read_records, write_jsonl
from memdlm.data.sources import load_conversations
from memdlm.data.specs import DatasetSpec, parse_specs
from memdlm.data.synthetic import TASKS, KeyValueRecall, Sample, Task, exact_match
from memdlm.data.tokenizer import build_word_tokenizer

__all__ = [
    "TASKS",
    "Collator",
    "DatasetSpec",
    "Encoded",
    "EncodingOptions",
    "KeyValueRecall",
    "Sample",
    "Task",
    "TokenRows",
    "build_word_tokenizer",
    "encode_chat",
    "exact_match",
    "fit",
    "load_conversations",
    "parse_specs",
    "read_records",
    "write_jsonl",
]
