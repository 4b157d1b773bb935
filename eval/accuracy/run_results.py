"""The schema of results.json: what a finished run says about itself."""

from __future__ import annotations

import msgspec

from eval.accuracy.outcomes import Amount, CodeHash, Count, Summary
from eval.accuracy.run_settings import RunSettings, expect_format
from minivlm.schema import decode


class MeanCost(msgspec.Struct, frozen=True):
    """What the answered samples cost on average.

    `prefill_ms` is per page, and `decode_ms_per_token` per token after the first. `kv_bytes_mean`
    is what the policy holds per page after prefill, and `kv_share` is its ratio to the full cache.
    `kv_bytes_peak` is the most memory allocated for a batch, including room for the answer and
    bookkeeping; `kv_full_bytes_peak` counts only the entries of the largest full cache.
    """

    prefill_ms: Amount
    decode_ms_per_token: Amount
    prompt_tokens: Amount
    vision_tokens: Amount
    new_tokens: Amount
    kv_bytes_mean: Amount
    kv_full_bytes_mean: Amount
    kv_share: Amount
    kv_bytes_peak: Count
    kv_full_bytes_peak: Count
    entries_attended_per_step: Amount


class RunResults(msgspec.Struct, frozen=True, kw_only=True):
    """The content of results.json."""

    results: dict[str, Summary]  # by task or group of tasks: see `summarise`
    by_type: dict[str, dict[str, Summary]]  # by task and question type
    cost: dict[str, MeanCost]  # by task
    samples: dict[str, Count]  # by task: how many of its first samples these results are about
    failed: list[str]
    settings: RunSettings
    code: CodeHash  # see `eval.accuracy.identity`
    data: dict[str, str]  # by task: where its data came from
    prompts: dict[str, str]  # by task: the first sample's prompt as the model reads it
    template: str | None
    notes: list[str]
    versions: dict[str, str]
    seconds: Amount
    processes: Count


class _Format(msgspec.Struct):
    format: int | None = None


class _Versioned(msgspec.Struct):
    settings: _Format | None = None


def decode_results(data: bytes, name: str) -> RunResults:
    """The content of results.json. Raises `UserError`, beginning with `name`, for damage and for another format."""
    versioned = decode(data, _Versioned, name)
    expect_format(versioned.settings.format if versioned.settings else None, name)
    return decode(data, RunResults, name)
