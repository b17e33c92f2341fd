"""checkpoint -> numbers: exact-match recall, exposure bias, and the report."""

from memdlm.evaluation.exposure_bias import ExposureBias, exposure_bias
from memdlm.evaluation.prompts import PaddedBatch, pad_texts
from memdlm.evaluation.recall import Recall, encode_samples, recall
from memdlm.report.build import summary_rows, write_report

__all__ = [
    "ExposureBias",
    "PaddedBatch",
    "Recall",
    "encode_samples",
    "exposure_bias",
    "pad_texts",
    "recall",
    "summary_rows",
    "write_report",
]
