"""Finds a checkpoint: a folder, the bundled demo, or a repository on the Hugging Face hub.

From the hub, only the files that loading needs are downloaded, all from the same commit. They go
into the cache of the huggingface-hub package, which reads its usual settings: HF_HOME, HF_TOKEN,
HF_ENDPOINT, and HF_HUB_OFFLINE, with which the hub is never asked. If the hub cannot be reached, a
complete cached copy is used.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from minivlm.errors import UserError
from minivlm.files import exists, is_folder, user_path
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
    """The folder of a checkpoint.

    `model` is a path, a hub id (`owner/name`), or None for the bundled demo. An existing folder is
    preferred to a hub id of the same name. Raises `UserError` for a path that does not exist and
    for a download that cannot be completed.
    """
    if model is None:
        return DEMO
    folder = user_path(model)
    if is_folder(folder):
        return folder
    if exists(folder):
        raise UserError(f"{model}: is no folder (expected a checkpoint folder or a hub id)")
    if isinstance(model, Path) or not _is_hub_id(model):
        raise UserError(f"{model}: no such folder, and not a hub id (expected owner/name)")
    # The index, if there is one, says which files hold the weights. They are taken from the commit
    # of the index.
    folder = _fetch(model, None, _SMALL_FILES)
    files = [WEIGHTS]
    if exists(folder / INDEX):
        files = sorted(set(shard_names(folder / INDEX).values()))
    folder = _fetch(model, folder.name, files)
    if missing := [file for file in ["config.json", *files] if not exists(folder / file)]:
        raise UserError(
            f"{model}: the hub repository, or its cached copy, has no {', '.join(missing)} (commit {folder.name})"
        )
    return folder


def _is_hub_id(model: str) -> bool:
    """Whether the hub could have a repository of this name; only then is it asked."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model, re.ASCII):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _fetch(repo: str, commit: str | None, files: list[str]) -> Path:
    """Download files of a repository and return the folder of the cached snapshot.

    `commit` None is the newest commit of the main branch.
    """
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
        raise UserError(f"{repo}: {_answer(error)}") from None
    except LocalEntryNotFoundError as error:
        raise UserError(f"{repo}: not complete in the local cache, and {_reason(error)}") from None
    except Exception as error:  # of the HTTP library, which depends on huggingface-hub's version
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"{repo}: download failed: {reason}") from error


def _reason(error: LocalEntryNotFoundError) -> str:
    """Why the hub was not asked or did not answer."""
    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _answer(cause)
    if cause is None or type(cause).__name__ == "OfflineModeIsEnabled":
        return "offline mode is on (HF_HUB_OFFLINE)"
    return f"the hub cannot be reached ({_first_line(cause)})"


def _answer(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    hint = " (check HF_TOKEN and its permissions)" if status in (401, 403) else ""
    return f"the hub answered {status}{hint}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
