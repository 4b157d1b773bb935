"""Statistics of a turn as a few lines of text."""

from __future__ import annotations

from minivlm.generation.vlm import Stats


def describe(stats: Stats) -> str:
    """Times, KV bytes by class against the full cache, and what took part in a decode step."""
    total = sum(stats.live_entries.values())
    by_class = ", ".join(f"{name} {count / total:.0%}" for name, count in stats.live_entries.items() if count)
    attended = sum(stats.entries_attended_per_step.values())
    parts = ", ".join(f"{name} {count:.1f}" for name, count in stats.entries_attended_per_step.items() if count)
    if not stats.live_entries["vision secondary"]:  # then nothing sets the core apart
        by_class, parts = (text.replace("vision core", "vision") for text in (by_class, parts))
    lines = [
        f"prefill {stats.prefill_s * 1000:.1f} ms for {stats.prompt_tokens} tokens ({stats.vision_tokens} of images)",
        f"decode {stats.tokens_per_s:.1f} tokens/s ({stats.decoded_tokens} tokens in {stats.decode_s * 1000:.1f} ms)",
        f"KV cache {size(stats.live_bytes)} after prefill, {stats.live_bytes / stats.full_bytes:.1%} of the full cache's "
        f"{size(stats.full_bytes)} ({by_class}); {size(stats.nbytes)} allocated with room for the answer",
    ]
    if stats.decode_steps:
        lines.append(f"{attended:.1f} entries a layer and head took part in a decode step on average ({parts})")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")
