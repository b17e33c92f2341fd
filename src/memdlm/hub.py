"""Ask the hub once, and briefly, whether it answers, before anything is looked up there."""

import functools
import logging
import os
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

from huggingface_hub import constants

log = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds in which the hub must answer."""


def look_for(name: str | Path) -> None:
    """Call before `name` is looked for on the hub; nothing happens for a path that exists.

    If the hub does not answer, the rest of the process works offline, from the cache. Otherwise every single file would
    be tried for about half a minute. If HF_HUB_OFFLINE is set, to 0 or 1, it decides and the hub is not asked.
    """
    if not Path(name).exists() and not constants.is_offline_mode() and "HF_HUB_OFFLINE" not in os.environ:
        _ask()


def is_offline(name: str | Path) -> bool:
    """Whether `name` would have to come from the hub while this process works offline."""
    return not Path(name).exists() and constants.is_offline_mode()


@functools.cache
def _ask() -> None:
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return  # an error status is an answer too
    except OSError as error:
        # A rejected certificate is an answer too: the hub's own client may trust it.
        if not isinstance(getattr(error, "reason", error), ssl.SSLError):
            _go_offline(error)


def _go_offline(error: OSError) -> None:
    log.warning(
        "%s does not answer (%s): only cached files are used. Set HF_HUB_OFFLINE=0 in the environment to keep trying.",
        constants.ENDPOINT,
        " ".join(str(error).split()) or type(error).__name__,
    )
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by processes that start later, and by datasets if it is not imported yet
    constants.HF_HUB_OFFLINE = True
    datasets = sys.modules.get("datasets.config")
    if datasets is not None:
        datasets.HF_HUB_OFFLINE = datasets.HF_DATASETS_OFFLINE = True  # type: ignore[attr-defined]
