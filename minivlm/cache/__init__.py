"""The KV cache: keys and values of a batch, what a policy evicts of them, and what a decode step reads.

Words, in the order in which a reader needs them:

row         one sequence of the batch.
turn        a prompt and its answer. A conversation has several; the cache stays between them.
entry       the key and value of one token in one layer: in all its key/value heads, or in one head where the heads
            hold different tokens.
position    a token's original place in the sequence. It never changes, whatever is evicted.
slot        a place in a layer's buffers. A slot says nothing about a position; each entry's position is stored.
live        said of an entry that is held, and of its slot.
vision      image tokens and their entries. After prefill no step evicts them.
core        those of the vision entries that take part in every decode step; the others are called secondary.
system      the entries of what comes before the first image (without an image: of the first token); never evicted.
fixed       vision and system together.
tail        all other entries: the text after the image, and the answer as it grows. Under a whole-cache budget (H2O)
            the tail holds everything, vision and system too, and any of it may be evicted.
budget      how many tail entries each head may hold; what exceeds it is evicted. (`kv_budget` is something else: the
            share of the prompt's bytes that a policy may hold.)
victim      the entry that a step evicts in a head.
stored      said of the answer's tokens that the cache holds; the newest token is not among them yet.
active      said of a row whose answer has not ended.
kind        what takes part in a decode step. "core": core, system and tail. "refresh": everything, after which the
            core is chosen anew. "full": everything; the policy has no core.

A layer's slots for one row and one head, through a prefill and three steps. The policy is A-VL with a refresh every
three steps and a text budget of five. v: vision entry, C: one in the core, s: system, a-e: text of the prompt, 1-3:
tokens of the answer, x: the slot of a victim, which the next token overwrites, .: free.

                               tail_start
                                   |
    prefill            . v C v C s s a b c d e . . .   15 image tokens were seen, 4 stay, 2 of them are the core
    step 1, "core"     . v C v C s s a x c d e 1 . .   v takes no part. 1 is written; b has the lowest score and goes
    step 2, "core"     . v C v C s s a 2 c x e 1 . .   2 takes the slot of b, then d goes
    step 3, "refresh"  . C v v C s s a 2 c 3 e x . .   all take part; the core is chosen anew; 1 goes

Evicting is overwriting: no entry moves and no shape changes, so a step can be one compiled graph. Fixed entries end at
`tail_start`, which is the same slot in all rows, so that the tail can grow to the right; what is free to the left of
them is slack. During an answer only the marks of the core change there.

Files, in the order to read them:

policy.py         what a policy may decide: the contract
counts.py         what the host knows of a row, as integers
slots.py          where entries stand: slot arithmetic
buffers.py        the tensors of one layer
state.py          what a cache consists of
cores.py          the choice of cores, and the list of their slots
prefill_pass.py   a prefill: attend, score, choose, compact (one row in one layer: columns.py)
decode_pass.py    a decode step: write, attend, evict
kv_cache.py       the cache's life in turns and steps

Beside them: policies/ (the policies, one file each), settings.py (their numbers), attention.py and ranking.py (the
mathematics; decode_split.py is the kernels of a step's attention on CUDA), accounting.py (entries and bytes),
recorder.py (the history of an answer), storage.py (saving and loading).
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
