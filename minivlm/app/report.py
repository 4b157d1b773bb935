"""The statistics of a turn as a few lines of text."""

from __future__ import annotations

from minivlm.generation.answers import Stats


def describe_stats(stats: Stats) -> str:
    """Times, KV bytes by class compared to the full cache, and the entries a decode step used."""
    live = stats.live_entries
    used = stats.entries_attended_per_step
    total = sum(live.values())
    by_class = ", ".join(f"{name} {count / total:.0%}" for name, count in live.items() if count)
    per_step = ", ".join(f"{name} {count:.1f}" for name, count in used.items() if count)
    if not stats.live_entries["vision secondary"]:
        # Without secondary entries there is no core to tell apart from them.
        by_class = by_class.replace("vision core", "vision")
        per_step = per_step.replace("vision core", "vision")
    lines = [
        f"prefill {stats.prefill_s * 1000:.1f} ms for {stats.prompt_tokens} tokens ({stats.vision_tokens} of images)",
        f"decode {stats.tokens_per_s:.1f} tokens/s ({stats.decoded_tokens} tokens in {stats.decode_s * 1000:.1f} ms)",
        f"KV cache {binary_size(stats.live_bytes)} after prefill, "
        f"{stats.live_bytes / stats.full_bytes:.1%} of the full cache's {binary_size(stats.full_bytes)} "
        f"({by_class}); {binary_size(stats.nbytes)} allocated with room for the answer",
    ]
    if stats.decode_steps:
        lines.append(
            f"{sum(used.values()):.1f} entries per layer and head took part in a decode step on average ({per_step})"
        )
    return "\n".join(lines)


def binary_size(count: float) -> str:
    """A number of bytes in binary units, such as "1.5 MiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"
