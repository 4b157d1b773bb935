"""What users and checkpoints write: prompts, conversations on standard input, chat templates."""

from __future__ import annotations

import json
from random import Random

from fuzzer.case import Box, Case, Expect
from fuzzer.checkpoints import ask, link_checkpoint, same_answer, some_answer
from fuzzer.child import Ran
from fuzzer.world import LLAVA, NEXT

_PIECES = (
    *("What is it?", "the", " ", "\n", "\t", "0", "é", "漢字", "🙂", "👩‍👩‍👧"),
    *("\u202e", "\u200b", "\ufeff", "\ufffd", "\x07", "\x1b[2J"),
    *("</s>", "<s>", "<unk>", "<pad>", "[INST]", "[/INST]", "<<SYS>>", "<0x0A>", "<image", "image>"),
    *("{{ 7 * 7 }}", "{% raw %}", "USER: ", "ASSISTANT:", "/image ", "a" * 200, "\ue000minivlm-answer\ue001"),
)
_SURROGATES = ("\udcff", "a\udc80b")


def _text(rng: Random, most: int = 8) -> str:
    return "".join(rng.choice(_PIECES) for _ in range(rng.randint(1, most)))


def make_prompt(box: Box) -> Case:
    """`generate.py` on an odd prompt with up to three images."""
    rng, images = box.rng, box.rng.choice((0, 1, 1, 1, 2, 3))
    text, placeholders = _text(rng), rng.choice((0, 0, 1, 2, images, images, 40))
    for _ in range(placeholders):
        place = rng.randint(0, len(text))
        text = text[:place] + "<image>" + text[place:]
    kind = rng.random()
    if kind < 0.1:
        text += rng.choice(_SURROGATES)
    elif kind < 0.2:
        text = rng.choice(((text * 2000)[:100_000], "", " ", "\n" * 5))
    return prompt_case(box, text, images)


def prompt_case(box: Box, text: str, images: int, expect: Expect = Expect.EITHER) -> Case:
    """A question with images: its `<image>` have to be as many as those, or none."""
    placed = text.count("<image>")
    hopeless = placed not in (0, images) or any("\ud800" <= char <= "\udfff" for char in text) or len(text) > 5000
    flags = ["--image", *[box.shared / "wide.png"] * images] if images else []
    arguments = ["--model", box.shared / NEXT, *flags, f"--prompt={text}", "--max_new_tokens", 3]
    return Case("generate.py", arguments, Expect.REFUSAL if hopeless else expect, check=some_answer)


def make_chat(box: Box) -> Case:
    """A conversation: questions, images, blank lines and nonsense on standard input."""
    rng = box.rng
    good = box.shared / "tall.png"
    bad = box.write("bad.png", b"\x89PNG\r\n\x1a\n nothing")
    lines: list[bytes] = []
    for _ in range(rng.randint(0, 6)):
        lines.append(
            rng.choice(
                (
                    _text(rng, 3).replace("\n", " ").encode(errors="surrogatepass"),
                    b"What is it?",
                    b"/image %s" % str(good).encode(),
                    b"/image %s" % str(bad).encode(),
                    b"/image",
                    b"/image /dev/zero",
                    b"/image no\x00name",
                    b"/image " + b"x" * 5000,
                    b"   ",
                    b"\x00",
                    b"word " * 2000,
                    b"<image>",
                )
            )
        )
    if rng.random() < 0.15:
        lines.append(rng.choice((b"\xff\xfe binary", rng.randbytes(50), b"\xed\xa0\x80")))
    stdin = rng.choice((b"\n", b"\n", b"\r\n")).join(lines) + rng.choice((b"", b"\n"))
    return chat_case(box, None if rng.random() < 0.1 else stdin)


def chat_case(box: Box, stdin: bytes | None, *more: object, expect: Expect = Expect.EITHER) -> Case:
    """A chat: each question gets an answer on stdout or one `error: ` on stderr."""
    lines = [line.split() for line in (stdin or b"").splitlines()]
    asked = [words for words in lines if words and words[0] != b"/image"]

    def check(ran: Ran) -> None:
        refused = ran.err.count("error: ")
        answered = ran.out.count("\n")
        assert answered + refused >= len(asked), f"{len(asked)} questions, {answered} answers, {refused} errors"

    flags = ["--model", box.shared / NEXT, "--image", box.shared / "wide.png", "--max_new_tokens", 3, "--chat"]
    return Case("generate.py", [*flags, *more], expect, check=check, stdin=stdin)


# Chat templates. What a template may cost is bounded, whatever it does.

ATTACKS = (
    "{{ 'x'|center(999999999) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ 'x' * 999999999 }}",
    "{{ [0] * 999999999 }}",
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}",
    "{{ ('x' * 9999)|indent(999999) }}",
    "{{ ('a ' * 99999)|wordwrap(1)|wordwrap(1)|length }}",
    "{{ lipsum(n=99999) }}",
    "{% macro f() %}{% for i in range(9**6) %}{% for j in range(9**6) %}x{%endfor%}{%endfor%}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 2 ** 99999999 }}",
    "{{ range(999999999)|list|length }}",
    "{{ range(999999999)|sum }}",
    "{{ (range(99999)|list * 99)|sort|length }}",
    "{{ 'x'.join(range(99999999)|map('string')) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch /tmp/pwned') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(messages) }}{{ messages }}",
    "{{ messages|tojson(indent=99999999) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ raise_exception('no\nway') }}",
    "{{ strftime_now('%Y') }}",
    "{% set x = '(a+)+$' %}{{ ('a' * 50 ~ 'b')|replace('a', x)|length }}",
    "{{ undefined.attribute.of.nothing }}",
    "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{" * 50_000,
    "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "{% if " + "not " * 5_000 + "1 %}{% endif %}",
    "\ud800",
    "",
)
_FRAGMENTS = (
    *("'x'", "messages", "bos_token", "7", "range(9)", "namespace(a=1)", "messages[0]['content']", "none", "[1, 2]"),
    *("{'a': 1}", "dict(a=1)", "lipsum(n=1)", "joiner()", "true"),
)
_FILTERS = (
    *("length", "upper", "list", "tojson", "join(',')", "trim", "reverse", "string", "int", "first", "default(1)"),
    *("center(9)", "sort", "items", "indent(2)", "pprint"),
)


def make_template(box: Box) -> Case:
    """A checkpoint whose chat template is hostile, nonsense, or only written otherwise."""
    rng, model = box.rng, box.rng.choice((NEXT, LLAVA))
    clean = json.loads((box.shared / NEXT / "chat_template.json").read_bytes())["chat_template"]
    if rng.random() < 0.2:
        nothing = rng.choice(("{# a comment #}", "{% if false %}x{% endif %}", "{{ '' }}"))
        return template_case(box, model, nothing + clean, same=True)
    if rng.random() < 0.5:
        hostile = rng.choice(ATTACKS)
        return template_case(box, model, rng.choice((hostile, hostile + clean, clean + hostile)))
    return template_case(box, model, _composed(rng, depth=3) + rng.choice(("", clean)))


def _composed(rng: Random, depth: int) -> str:
    """A random template."""
    value = rng.choice(_FRAGMENTS) + "".join(f"|{rng.choice(_FILTERS)}" for _ in range(rng.randint(0, 3)))
    if depth == 0:
        return f"{{{{ {value} }}}}"
    inner = "".join(_composed(rng, depth - 1) for _ in range(rng.randint(1, 2)))
    return rng.choice(
        (
            f"{{% for x in {value} %}}{inner}{{% endfor %}}",
            f"{{% if {value} %}}{inner}{{% else %}}y{{% endif %}}",
            f"{{% set y = {value} %}}{inner}{{{{ y }}}}",
            f"{{% macro m(x) %}}{inner}{{% endmacro %}}{{{{ m(1) }}}}",
            f"{{% filter {rng.choice(_FILTERS)} %}}{inner}{{% endfilter %}}",
            f"{{{{ {value} + {rng.choice(_FRAGMENTS)} }}}}{inner}",
            f"{{% {inner}",
        )
    )


def template_case(box: Box, model: str, template: str, same: bool = False, expect: Expect = Expect.EITHER) -> Case:
    """`generate.py` on a checkpoint with this template, in one of the three files that may have it."""
    folder = link_checkpoint(box, model)
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    place = box.rng.choice(("chat_template.json", "chat_template.jinja", "tokenizer_config.json"))
    if place.endswith(".jinja"):
        box.write(f"{model}/{place}", template.encode(errors="surrogatepass"))
    else:
        content = json.loads((folder / place).read_bytes()) if place == "tokenizer_config.json" else {}
        box.write(f"{model}/{place}", json.dumps({**content, "chat_template": template}).encode())
    check = same_answer(box, model) if same else some_answer
    return Case("generate.py", ask(box, folder), Expect.ANSWER if same else expect, check=check)
