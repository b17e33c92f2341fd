"""The base of the published families' configurations, which are told apart by content, not by `model_type`.

Published files disagree with themselves: LLaDA-MoE calls itself `llada` like the dense LLaDA, and LLaDA2.1 has three
model types for one network.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

_CLASSES: list["type[PublishedConfig]"] = []
PREFIXES = ("llada", "dream", "sdar", "a2d")
"""Beginnings of the names of the families' classes; copies of the published code vary the rest."""


class PublishedConfig(PreTrainedConfig):
    """A configuration that reads published files unedited and writes back the `model_type` that it came with."""

    keys_to_ignore_at_inference: ClassVar[tuple[str, ...]] = ()
    published_architectures: ClassVar[tuple[str, ...]] = ()
    """Names that published files give the network's class, compared without case."""
    telling_fields: ClassVar[tuple[frozenset[str], ...]] = ()
    """Sets of fields; a file that has all of one set describes this family."""
    telling_tensors: ClassVar[tuple[str, ...]] = ()
    """Parts of tensor names that only this family has."""
    telling_model_types: ClassVar[tuple[str, ...]] = ()
    """Model types that no other family states."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "published_architectures" in vars(cls):
            _CLASSES.append(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        self.published_model_type = str(kwargs.pop("published_model_type", type(self).model_type))
        super().__post_init__(**kwargs)
        # transformers does not do this for a class that only declares fields.
        self.validate()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration of the family that `config_dict` describes, which may be another class."""
        target = config_class_for(config_dict) or _canonical(cls)
        if target is not cls:
            return target.from_dict(config_dict, **kwargs)
        named = config_dict.get("model_type") or cls.model_type
        # transformers looks conversions up by the instance's model_type, which therefore stays the family's.
        fields = {**config_dict, "model_type": cls.model_type, "published_model_type": named}
        return super().from_dict(fields, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a published file has them."""
        out = super().to_dict()
        out["model_type"] = out.pop("published_model_type", type(self).model_type)
        return out


def config_class_for(fields: Mapping[str, Any], tensor_names: Iterable[str] = ()) -> "type[PublishedConfig] | None":
    """Return the configuration class of the family that a file describes, or None for a foreign one.

    Looks at `architectures`, then at the fields, then at the model type, then at the names of the checkpoint's tensors.
    """
    named = {str(name).lower() for name in fields.get("architectures") or ()}
    for cls in _CLASSES:
        if named & {name.lower() for name in cls.published_architectures}:
            return cls
    if named and not any(name.startswith(PREFIXES) for name in named):
        return None  # it names its architecture, which is none of ours
    present = {key for key, value in fields.items() if value is not None}
    for cls in _CLASSES:
        if any(telling <= present for telling in cls.telling_fields):
            return cls
    for cls in _CLASSES:
        if fields.get("model_type") in cls.telling_model_types:
            return cls
    return config_class_of_tensors(tensor_names)


def config_class_of_tensors(tensor_names: Iterable[str]) -> "type[PublishedConfig] | None":
    """Return the configuration class of the family whose tensors these are, or None."""
    names = list(tensor_names)
    for cls in _CLASSES:
        if any(part in name for part in cls.telling_tensors for name in names):
            return cls
    return None


def _canonical(cls: type[PublishedConfig]) -> type[PublishedConfig]:
    """Return the class itself, or the family's class if `cls` only gives it another model type."""
    return next(each for each in cls.__mro__ if each in _CLASSES)
