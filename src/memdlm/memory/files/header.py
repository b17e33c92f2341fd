"""What memory.json may say, checked field by field before anything is built from it."""

from collections.abc import Mapping
from typing import Any

from memdlm.memory.config import FastWeightsConfig
from memdlm.memory.files.fingerprint import Fingerprint
from memdlm.memory.files.packing import Layer
from memdlm.options import names_of, shortened
from memdlm.strict_json import (
    Check,
    check_fields,
    is_digest,
    is_list_of,
    is_object,
    is_text,
    is_whole,
    optional,
)

HEADER_FILE = "memory.json"
FORMAT = 1
MOST_FEATURES, MOST_EXPERTS = 2**24, 2**16


def checked_header(header: Any, files: tuple[str, ...]) -> dict[str, Any]:
    """Return what memory.json says, if every field is of the right kind; `files` have a checksum there.

    Raises ValueError that says what is wrong. The options in `config` are not checked here.
    """
    found = header.get("format") if isinstance(header, dict) else None
    if not is_whole(found, FORMAT, FORMAT):
        raise ValueError(f"it has format {shortened(found)}; this version reads {FORMAT}")
    if not is_object(header.get("sha256")):
        raise ValueError("it lacks the checksums")
    check_fields(
        header,
        {
            "format": lambda value: is_whole(value, FORMAT, FORMAT),
            "fingerprint": is_object,
            "config": is_object,
            "layers": is_list_of(is_object),
            "provenance": is_object,
            "sha256": is_object,
        },
        "it",
    )
    check_fields(header["sha256"], dict.fromkeys((*files, HEADER_FILE), is_digest), "sha256")
    for name in names_of(FastWeightsConfig):
        if name not in header["config"]:
            raise ValueError(f"config lacks {name!r}")
    check_provenance(header["provenance"])
    return dict(header)


def fingerprint_of(header: Mapping[str, Any]) -> Fingerprint:
    """Return the fingerprint; raises ValueError that names a field of the wrong kind."""
    fields = check_fields(
        header["fingerprint"],
        {
            "model": is_text,
            "family": lambda value: is_text(value) and value != "",
            "options": is_object,
            "weights": is_digest,
            "mask_token_id": lambda value: is_whole(value, 0),
            "tokenizer": optional(is_digest),
            "learned": optional(is_digest),
        },
        "fingerprint",
    )
    return Fingerprint(**fields)


def layers_of_header(header: Mapping[str, Any], fingerprint: Fingerprint) -> tuple[Layer, ...]:
    """Return the adapted layers; raises ValueError that names a field of the wrong kind or size."""
    layers = []
    for index, fields in enumerate(header["layers"]):
        where = f"layer {index}"
        check_fields(
            fields,
            {
                "name": lambda value: is_text(value) and value != "",
                "in_features": lambda value: is_whole(value, 1, MOST_FEATURES),
                "out_features": lambda value: is_whole(value, 1, MOST_FEATURES),
                "num_experts": optional(lambda value: is_whole(value, 1, MOST_EXPERTS)),
            },
            where,
        )
        layer = Layer(**fields)
        if layer.name.count("*") != (layer.num_experts is not None):
            raise ValueError(f"{where}: a star stands for the expert's number, and for nothing else")
        known = fingerprint.options.get("num_experts")
        if layer.num_experts is not None and known not in (None, layer.num_experts):
            raise ValueError(
                f"{where} has {layer.num_experts} experts, the model that it was written for {shortened(known)}"
            )
        layers.append(layer)
    if len({layer.name for layer in layers}) < len(layers) or not layers:
        raise ValueError("layers: every adapted projection stands there once, and there is at least one")
    return tuple(layers)


def check_provenance(provenance: Mapping[str, Any]) -> None:
    """Raise ValueError unless what this package reads of it can be read; everything else is free."""
    known: dict[str, Check] = {
        "tokens": lambda value: is_whole(value, 0),
        "source": is_text,
        "source_sha256": is_text,
        "sources": is_list_of(is_object),
        "combined": is_list_of(is_object),
    }
    mine = {name: value for name, value in provenance.items() if name in known}
    check_fields(mine, known, "provenance", may_lack=True)
    try:
        for name in ("sources", "combined"):
            for part in mine.get(name, ()):
                check_provenance(part)
    except RecursionError as error:
        raise ValueError("provenance is nested too deeply") from error
