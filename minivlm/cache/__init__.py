"""The KV cache: keys and values of a batch, what a policy evicts of them, and what a decode step reads.

Words, in the order in which a reader needs them:

row         one sequence of the batch.
turn        a prompt and its answer. A conversation has several; the cache stays between them.
entry       the key and value of one token in one layer (and in all its key/value heads, or in one head where the
            heads hold different tokens).
position    a token's original place in the sequence. It never changes, whatever is evicted.
slot        a place in a layer's buffers. A slot says nothing about a position; each entry's position is stored.
vision      the entries of image tokens; after prefill no step evicts them.
core        those of the vision entries that take part in every decode step; the others are called secondary.
system      the entries of what comes before the first image (without an image: of the first token); never evicted.
tail        all other entries: the text after the image and the answer as it grows. Under a whole-cache budget (H2O)
            the tail holds everything, vision and system too.
budget      how many tail entries each head may hold; what exceeds it is evicted.
kind        what takes part in a decode step.  "core": core, system and tail.  "refresh": everything, after which the
            core is chosen anew.  "full": everything; the policy has no core.

A layer's slots for one row, through a prefill and three steps. The policy is A-VL with a refresh every three steps
and a text budget of five.  v: vision entry, C: in the core, s: system, a-e: text of the prompt, 1-3: tokens of the
answer, .: free.

                               tail_start
                                   |
    prefill            . v C v C s s a b c d e . . .      15 image tokens were seen, 4 stay, 2 of them are the core
    step 1, "core"     . v C v C s s a b c d e 1 . .      1 is written, then b has the lowest score: its slot is free
    step 2, "core"     . v C v C s s a 2 c d e 1 . .      2 takes that slot; d goes next.  v takes no part
    step 3, "refresh"  . C v v C s s a 2 c 3 e 1 . .      all take part; the core is chosen anew, nothing moves

Evicting is overwriting: no entry moves and no shape changes, so a step can be one compiled graph. What stands left of
`tail_start` never changes during an answer; only the marks of the core do.

Files, in the order to read them:

policy.py         what a policy may decide: the contract
counts.py         what the host knows of a sequence, as integers
slots.py          where entries stand: slot arithmetic
buffers.py        the tensors of one layer, and the choice of cores
prefill_pass.py   a prefill: attend, score, choose, compact (one row in one layer: columns.py)
decode_pass.py    a decode step: write, attend, evict
kv_cache.py       the cache's life in turns and steps (its data: state.py)

Beside them: policies/ (the policies, one file each), settings.py (their numbers), attention.py and ranking.py (the
mathematics), accounting.py (entries and bytes), recorder.py (the history of an answer), storage.py (saving and
loading).
"""

from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import PRESETS, Preset, preset
from minivlm.cache.policy import (
    Candidates,
    Entries,
    InputFilter,
    Policy,
    Prompt,
    PromptFilter,
    TokenBudget,
    VisionCounts,
    VisionSelection,
    vision_within,
)
from minivlm.cache.settings import CacheSettings, setting

__all__ = [
    "PRESETS",
    "CacheSettings",
    "Candidates",
    "Entries",
    "InputFilter",
    "KVCache",
    "Policy",
    "Preset",
    "Prompt",
    "PromptFilter",
    "TokenBudget",
    "VisionCounts",
    "VisionSelection",
    "preset",
    "setting",
    "vision_within",
]
