"""Remove what may be wrapped around a network: data parallelism, torch.compile, an outer adapter."""

from torch import nn

from memdlm.models.lora.peft_on_demand import is_peft_model


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """Return the model inside DDP and torch.compile wrappers: calls of it exchange no gradients between ranks."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network itself, inside parallel wrappers and an outer PEFT adapter."""
    model = unwrap_parallel(model)
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
