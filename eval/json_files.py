"""Writing the JSON files of results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minivlm.files import write_whole


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Write `content` completely or not at all. Raises `UserError` if it cannot be written."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # The name of a file may hold bytes that are no text: "?" stands for each, so that the file is UTF-8.
    data = text.encode(errors="replace")
    write_whole(path, lambda scratch: scratch.write_bytes(data))
