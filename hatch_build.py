"""The README as a package index shows it: relative addresses would lead nowhere there, so they become whole ones."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURES = ("png", "svg")


def whole_addresses(text: str, repository: str) -> str:
    """Put the repository in front of the relative addresses of Markdown links and pictures."""
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def whole(match: "re.Match[str]") -> str:
        address = match[2]
        place = f"{raw}/main" if address.endswith(PICTURES) else f"{repository}/blob/main"
        return f"{match[1]}({place}/{address})"

    return re.sub(r"(\]) ?\((?!https?://|#)([^)\s]+)\)", whole, text)


class ReadmeHook(MetadataHookInterface):
    """Sets the long description."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict) -> None:  # type: ignore[type-arg]
        """Called by hatchling."""
        text = (Path(self.root) / "README.md").read_text()
        repository = metadata["urls"]["Repository"]
        metadata["readme"] = {"content-type": "text/markdown", "text": whole_addresses(text, repository)}
