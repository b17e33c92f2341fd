"""Many requests, one model: continuous batching with a memory per request. No HTTP here."""

from memdlm.serving.engine import Engine
from memdlm.serving.requests import (
    Done,
    Event,
    Failed,
    Figures,
    GenerationRequest,
    Memorized,
    MemoryId,
    Progress,
    Response,
    Settled,
    Started,
    Stepped,
    WriteRequest,
)
from memdlm.serving.store import MemoriesInProcess, MemoryFolder, MemoryStore
from memdlm.serving.tickets import Ticket

__all__ = [
    "Done",
    "Engine",
    "Event",
    "Failed",
    "Figures",
    "GenerationRequest",
    "MemoriesInProcess",
    "Memorized",
    "MemoryFolder",
    "MemoryId",
    "MemoryStore",
    "Progress",
    "Response",
    "Settled",
    "Started",
    "Stepped",
    "Ticket",
    "WriteRequest",
]
