"""Evaluation: exact-match recall, exposure bias, benchmarks."""

from memdlm.evaluation.exposure_bias import ExposureBias, exposure_bias
from memdlm.evaluation.prompts import PaddedBatch, pad_texts
from memdlm.evaluation.recall import Recall, encode_samples, recall

__all__ = [
    "ExposureBias",
    "PaddedBatch",
    "Recall",
    "encode_samples",
    "exposure_bias",
    "pad_texts",
    "recall",
]
