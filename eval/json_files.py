"""Reading and writing the JSON files of results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.files import write_whole


def write_json(path: Path, content: Mapping[str, Any] | list[Any]) -> None:
    """Write `content` to `path` completely or not at all. Raises `UserError` if the file cannot be written."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def load_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises `UserError` if there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
