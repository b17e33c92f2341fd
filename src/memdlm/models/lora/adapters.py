"""The outer LoRA of a model: PEFT's layers on linear projections, our own on stacked experts, in one adapter.

Modules are named here as published code names them (one per expert), because that is what adapter files hold:
`memdlm.models.lora.files` reads and writes those.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memdlm.errors import ConfigError, did_you_mean
from memdlm.models.blocks.dit import Conditioning
from memdlm.models.blocks.experts import Experts
from memdlm.models.lora.experts import ExpertLoRA
from memdlm.models.lora.peft_on_demand import is_lora_layer, is_peft_model, peft
from memdlm.models.quantisation.four_bit import is_four_bit
from memdlm.options import option, validate
from memdlm.randomness import derive, uniform

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
ADAPTER = "default"
"""The name PEFT knows the adapter by; there is one at a time."""


@dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """Which low-rank adapter to train on top of a frozen base model. Defaults: the published recipe's."""

    target_modules: str = option(
        ALL_LINEAR,
        "Projections to adapt, comma-separated; all-linear: every linear layer of the text's path, without the output.",
    )
    r: int = option(32, "Rank of the adapter.", minimum=1, maximum=2**14)
    lora_alpha: float = option(64.0, "The adapter is scaled by alpha / rank.", above=0, maximum=1e6)
    lora_dropout: float = option(0.05, "Dropout on the adapter's input.", minimum=0, maximum=0.999)
    bias: str = option("none", "Which biases to train; only none is supported.", choices=("none",))
    modules_to_save: str | None = option(None, "Modules to train in full; not supported.")
    use_rslora: bool = option(False, "Scale the adapter by alpha / sqrt(rank) instead.")
    use_dora: bool = option(False, "Decompose the weights into magnitude and direction (DoRA); not supported.")

    def __post_init__(self) -> None:
        validate(self)
        for name in ("modules_to_save", "use_dora"):
            if getattr(self, name):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not supported: stacked experts and 4-bit weights have no such "
                    "adapter. Leave it out, or train without lora for whole modules."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A projection that an adapter may change: one linear layer of the published code."""

    path: str
    """Our path of the linear layer, or of the stacked experts that hold it."""
    in_features: int
    out_features: int
    projection: str | None = None
    expert: int | None = None


def adapter_config(model: nn.Module) -> "LoraConfig | None":
    """Return the configuration of the model's outer adapter, in published names, or None when it has none."""
    return getattr(model, "outer_adapter", None)


def published_name(model: nn.Module, path: str) -> str:
    """Return the published name of a module path; models that are not ours are named as they are."""
    rename = getattr(type(model), "published_module_name", None)
    return path if rename is None else rename(path)


def find_targets(model: PreTrainedModel, *, with_head: bool = False) -> dict[str, Target]:
    """Return what can be adapted by published name: all linear layers, experts' too, but not the output's.

    `all-linear` means all of them but maps of a condition (MDLM).
    `with_head` adds the output's, unless it shares its weight with the embedding.
    """
    with_head = with_head and not getattr(model.config, "tie_word_embeddings", False)
    head = None if with_head else model.get_output_embeddings()
    found: dict[str, Target] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            for projection in module.projections:
                wide, narrow = module.sizes(projection)
                for e in range(module.num_experts):
                    found[published_name(model, f"{path}.{e}.{projection}")] = Target(
                        path=path, in_features=wide, out_features=narrow, projection=projection, expert=e
                    )
        elif isinstance(module, nn.Linear) and module is not head:
            found[published_name(model, path)] = Target(
                path=path, in_features=module.in_features, out_features=module.out_features
            )
    return found


def count_outer_lora(model: PreTrainedModel, options: LoRAOptions) -> int:
    """Return how many parameters `add_outer_lora` would add; `model` may be on the meta device.

    Raises ConfigError when a target names nothing.
    """
    targets = find_targets(model)
    chosen = [targets[name] for name in _chosen(model, targets, options.target_modules)]
    return options.r * sum(target.in_features + target.out_features for target in chosen)


def add_outer_lora(
    model: PreTrainedModel, options: LoRAOptions | None = None, *, seed: int = 0, base: str | None = None
) -> PreTrainedModel:
    """Freeze `model` and give it a trainable adapter that changes nothing at first; returns the same object.

    A is drawn uniformly from +-1/sqrt(in) from `seed`, B is 0; both are float32 (float64 in a float64 model).
    `base` is the name to be written into the adapter's file, by default the one that the model was loaded by.
    Raises ConfigError when there is an adapter already or a target names nothing; the message lists what is possible.
    """
    options = LoRAOptions() if options is None else options
    check_free(model)
    targets = find_targets(model)
    chosen = _chosen(model, targets, options.target_modules)
    config = peft().LoraConfig(
        r=options.r,
        lora_alpha=_whole(options.lora_alpha),
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        bias="none",
        target_modules=target_patterns(model, chosen),
        base_model_name_or_path=model.name_or_path if base is None else base,
    )
    attach(model, {name: targets[name] for name in chosen}, config)
    for name, a, b in pairs(model):
        drawn = uniform(tuple(a.shape), derive("outer lora", seed, name), a.device).to(a.dtype)
        a.data.copy_((drawn * 2 - 1) * a.shape[-1] ** -0.5)
        b.data.zero_()
    return model


def target_patterns(model: PreTrainedModel, modules: Collection[str]) -> list[str]:
    """Return the `target_modules` of a PEFT configuration that match exactly the published `modules` of `model`."""
    return _shortest_patterns(modules, _other_names(model, find_targets(model), modules))


def plain_config(modules: Collection[str], *, rank: int, alpha: float, base: str) -> "LoraConfig":
    """Return the configuration of a finished adapter without extras, for `base`."""
    return peft().LoraConfig(
        r=rank,
        lora_alpha=_whole(alpha),
        lora_dropout=0.0,
        bias="none",
        target_modules=list(modules),
        base_model_name_or_path=base,
    )


def _whole(alpha: float) -> float:
    # PEFT declares alpha as an integer but takes any number; whole numbers are written as integers.
    return int(alpha) if float(alpha).is_integer() else alpha


def attach(model: PreTrainedModel, chosen: dict[str, Target], config: "LoraConfig") -> None:
    """Put trainable layers on the `chosen` targets; the caller has to set their values.

    Raises ConfigError when a projection is adapted in some experts of a layer and not in all.
    """
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    model.requires_grad_(False)
    linears = sorted(target.path for target in chosen.values() if target.projection is None)
    if linears:
        # PEFT draws starting values from the global generator; they are replaced, and the generator is put back.
        with torch.random.fork_rng(devices=[]):
            peft().inject_adapter_in_model(_for_linears(config, linears), model, adapter_name=ADAPTER)
    for path, projections in _stacked(model, chosen).items():
        experts = model.get_submodule(path)
        if not isinstance(experts, Experts):
            raise AssertionError(f"{path} holds no experts")
        experts.adapter = ExpertLoRA(
            experts, projections, rank=config.r, scale=scale_of(config), dropout=config.lora_dropout, dtype=dtype
        ).train(model.training)
    for _, a, b in pairs(model):
        for tensor in (a, b):
            tensor.data = tensor.data.to(dtype)
            tensor.requires_grad_(True)
    for module in model.modules():
        if is_lora_layer(module):
            module.train(model.training)
    model.outer_adapter = config
    # Tells the Trainer that a quantised base is trained through an adapter.
    model._hf_peft_config_loaded = True


def pairs(model: nn.Module) -> Iterable[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yield (name, A, B) of every adapted module, in model order: [R, in] and [out, R], for experts [E, ...].

    The name is our path of the linear layer, or that of the experts and the projection.
    """
    for path, module in model.named_modules():
        if is_lora_layer(module):
            yield path, module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        elif isinstance(module, ExpertLoRA):
            for projection, a in module.lora_A.items():
                yield f"{path.removesuffix('.adapter')}.{projection}", a, module.lora_B[projection]


def slots(model: nn.Module) -> Iterable[tuple[str, nn.Parameter, nn.Parameter, int | None]]:
    """Yield (published name, A, B, expert) of every adapted projection; an expert e owns only A[e] and B[e]."""
    for path, a, b in pairs(model):
        if a.dim() == 2:
            yield published_name(model, path), a, b, None
        else:
            experts, _, projection = path.rpartition(".")
            for e in range(a.shape[0]):
                yield published_name(model, f"{experts}.{e}.{projection}"), a, b, e


def scale_of(config: "LoraConfig") -> float:
    """Return the factor by which B A x is multiplied."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


@torch.no_grad()
def merge_outer_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Fold the adapter into the weights and remove it; sums are taken in float32 or wider and rounded once.

    Returns the same object, all of it trainable again. Raises ConfigError for a model without an adapter, or in 4-bit.
    """
    config = adapter_config(model)
    if config is None:
        raise ConfigError("there is no outer adapter to merge; load one with load_model(..., adapter=FOLDER).")
    if is_four_bit(model):
        raise ConfigError("an adapter cannot be merged into a 4-bit base; load the base without load_in_4bit.")
    for path, module in list(model.named_modules()):
        if is_lora_layer(module):
            base = module.get_base_layer()
            delta: Tensor = module.lora_B[ADAPTER].weight @ module.lora_A[ADAPTER].weight * scale_of(config)
            base.weight.copy_(base.weight.to(delta.dtype) + delta)
            model.set_submodule(path, base)
        elif isinstance(module, Experts) and isinstance(module.adapter, ExpertLoRA):
            module.adapter.merge_into(module)
            module.adapter = None
    model.outer_adapter = None
    model._hf_peft_config_loaded = False
    return model.requires_grad_(True)


def check_free(model: nn.Module) -> None:
    """Raise ConfigError when `model` has an adapter already."""
    if is_peft_model(model):
        raise ConfigError("the model is wrapped by PEFT already; pass the model that load_model returned.")
    if adapter_config(model) is not None:
        raise ConfigError("the model has an outer adapter already; merge it first, or load the base without one.")


def _chosen(model: PreTrainedModel, targets: dict[str, Target], wanted: str) -> list[str]:
    """Return the published names that `wanted` (comma-separated leaf names or path ends, ours or published) means."""
    if wanted == ALL_LINEAR:
        return [
            name for name, target in targets.items() if not isinstance(model.get_submodule(target.path), Conditioning)
        ]
    ends = [part.strip() for part in wanted.split(",") if part.strip()]
    chosen, used = [], set()
    for name, target in targets.items():
        ours = target.path if target.projection is None else f"{target.path}.{target.expert}.{target.projection}"
        hits = [end for end in ends if any(f".{each}".endswith(f".{end}") for each in (name, ours))]
        used.update(hits)
        if hits:
            chosen.append(name)
    leaves = sorted({name.rpartition(".")[2] for name in targets})
    for end in ends:
        if end not in used:
            raise ConfigError(
                f"target_modules: {end!r} is no projection of {type(model).__name__}. "
                f"Possible: {ALL_LINEAR}, or some of {', '.join(leaves)}.{did_you_mean(end, leaves)}"
            )
    if not chosen:
        raise ConfigError(f"target_modules: {wanted!r} names nothing; use {ALL_LINEAR} or some of {', '.join(leaves)}.")
    return chosen


def _stacked(model: nn.Module, chosen: dict[str, Target]) -> dict[str, list[str]]:
    """Return, by path of the experts, the projections to adapt; a projection is adapted in all experts or in none."""
    counts: dict[str, dict[str, int]] = {}
    for target in chosen.values():
        if target.projection is not None:
            layer = counts.setdefault(target.path, {})
            layer[target.projection] = layer.get(target.projection, 0) + 1
    for path, projections in counts.items():
        total = model.get_submodule(path).num_experts
        for projection, count in projections.items():
            if count != total:
                raise ConfigError(
                    f"{published_name(model, path)}: {projection} is adapted in {count} of {total} experts; "
                    "it must be all or none."
                )
    return {path: list(projections) for path, projections in counts.items()}


def _for_linears(config: "LoraConfig", paths: list[str]) -> "LoraConfig":
    return peft().LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        bias="none",
        target_modules=paths,
        # Models of other families are saved by transformers, which writes this.
        base_model_name_or_path=config.base_model_name_or_path,
    )


def _other_names(model: nn.Module, targets: dict[str, Target], chosen: Collection[str]) -> list[str]:
    """Return the published names of everything that is not chosen."""
    names = {published_name(model, path) for path, _ in model.named_modules() if path} | set(targets)
    return sorted(names - set(chosen))


def _shortest_patterns(chosen: Collection[str], others: Collection[str]) -> list[str]:
    """Return path ends that PEFT matches with all of `chosen` and none of `others`, as short as can be.

    Example: chosen blocks.0.ff_out, blocks.1.ff_out and not transformer.ff_out -> ["0.ff_out", "1.ff_out"].
    """
    taken = {end for name in others for end in _ends(name)}
    patterns: dict[str, None] = {}
    for name in chosen:
        patterns[next((end for end in _ends(name) if end not in taken), name)] = None
    return list(patterns)


def _ends(name: str) -> list[str]:
    """Return the ends of a dotted name, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
