"""A server's parts, made from its options: the model is loaded here, and nothing is started."""

from collections.abc import Callable

from memdlm.inference import Decoder, GenerationConfig
from memdlm.inference.loading import loaded
from memdlm.memory import MemoryConfig, ParametricMemory
from memdlm.models.hub.loading import line_of
from memdlm.serving.engine import Engine
from memdlm.serving.http.options import Secret, ServeOptions
from memdlm.serving.http.service import Service
from memdlm.serving.http.shelf import Shelf
from memdlm.serving.http.url_store import store_at

MIB = 2**20


def service_of(
    options: ServeOptions,
    config: GenerationConfig,
    memory: MemoryConfig | None,
    say: Callable[[str], None],
    key: Secret | None,
) -> Service:
    """Load the model, and return the server's parts, not yet started."""
    # A place that cannot be opened is told before the model is loaded.
    store = None if options.memories is None else store_at(options.memories)
    model, tokenizer = loaded(options)
    say(line_of(model))
    written = ParametricMemory(model, memory, mask_token_id=tokenizer.mask_token_id, tokenizer=tokenizer)
    engine = Engine(
        Decoder(model, tokenizer, config),
        slots=options.slots,
        memory_bytes=options.memory_mib * MIB,
        prefix_bytes=options.prefix_mib * MIB,
        queue_limit=options.queue,
        store=store,
    )
    if store is not None:
        say(f"{len(store.names())} memories in {store.where}")
    return Service(
        engine=engine,
        options=options,
        base=options.name,
        root=str(options.model),
        key=key,
        shelf=None if store is None else Shelf(store, engine, options.name),
        memory=written.config,
    )
