"""Where a checkpoint is: a folder, the bundled demo, or a repository of the Hugging Face hub.

From the hub only the files that loading needs are fetched, in one commit, into huggingface-hub's own
cache; its settings hold (HF_HOME, HF_TOKEN, HF_ENDPOINT, and HF_HUB_OFFLINE, with which nothing is asked).
When the hub cannot be reached, a complete cached copy is used.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from minivlm.errors import UserError
from weights.read import INDEX, WEIGHTS, shard_names

DEMO = Path(__file__).parent / "demo"
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    INDEX,
]


def find_checkpoint(model: str | Path | None = None) -> Path:
    """The folder of a checkpoint: `model` as a path, as a hub id (`owner/name`), or None for the bundled demo.

    A folder that exists wins over a hub id of the same name.  Raises `UserError`, one line, for a path that
    is not there and for whatever keeps a download from being complete.
    """
    if model is None:
        return DEMO
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{model}: is a file (expected a checkpoint folder or a hub id)")
    if isinstance(model, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model, re.ASCII):
        raise UserError(f"{model}: no such folder, and not a hub id (expected owner/name)")
    folder = _fetch(model, None, _SMALL_FILES)
    files = sorted(set(shard_names(folder / INDEX).values())) if (folder / INDEX).is_file() else [WEIGHTS]
    folder = _fetch(model, folder.name, files)
    if missing := [file for file in ["config.json", *files] if not (folder / file).is_file()]:
        raise UserError(
            f"{model}: the hub repository, or its cached copy, has no {', '.join(missing)} (commit {folder.name})"
        )
    return folder


def _fetch(repo: str, commit: str | None, files: list[str]) -> Path:
    """Download some files of a repository (of its main branch, or of one commit) -> the cached snapshot folder."""
    try:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=files))
    except GatedRepoError:
        raise UserError(
            f"{repo}: gated on the hub (accept its terms on its page there, then log in or set HF_TOKEN)"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repo}: no such folder, and no such repository on the hub (or a private one: set HF_TOKEN)"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = " (check HF_TOKEN and its permissions)" if status in (401, 403) else ""
        raise UserError(f"{repo}: the hub answered {status}{hint}") from None
    except LocalEntryNotFoundError as error:
        raise UserError(f"{repo}: not complete in the local cache, and {_reason(error)}") from None
    except Exception as error:  # the HTTP library's own errors, which differ from one huggingface-hub to the next
        raise UserError(f"{repo}: download failed: {type(error).__name__}: {_line(error)}") from error


def _reason(error: LocalEntryNotFoundError) -> str:
    """Why the hub was not asked, or did not answer; huggingface-hub keeps it as the error's cause."""
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        return f"the hub answered {status}" + (" (check HF_TOKEN and its permissions)" if status in (401, 403) else "")
    if cause is None or type(cause).__name__ == "OfflineModeIsEnabled":
        return "offline mode is on (HF_HUB_OFFLINE)"
    return f"the hub cannot be reached ({_line(cause)})"


def _line(error: BaseException) -> str:
    """The first line of a message."""
    return next(iter(str(error).strip().splitlines()), "no message")
