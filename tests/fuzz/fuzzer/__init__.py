"""A fuzzer for every command: thousands of hostile inputs, one rule. docs/fuzzing.md says how to run it.

The rule: a command either answers correctly with status 0, or ends with status 2 and exactly one line on stderr that
begins `error: `. No traceback, no second line, no hang, nothing half-written, nothing outside of the case's folder.

To read it, begin with `case.py` (what a case is), `rule.py` (what is demanded of it) and `child.py` (how it is run).
`world.py` makes the good inputs that are shared, `mutate_*.py` damage them, and one file per subject makes cases of
both: `flags.py`, `checkpoints.py`, `pictures.py`, `paths.py`, `texts.py`, `caches.py`, `data.py`, `runs.py`. `named.py`
has the defects of the past, `planted.py` defects that the harness must notice.
"""
