"""Templates that misbehave: each fails with one line, within limits, and reaches no internals of Python."""

import faulthandler
import sys

import pytest

from chat_templates import PARTS, template, user
from minivlm.errors import UserError
from minivlm.inputs import template_process, template_sandbox
from minivlm.inputs.template_sandbox import MAX_CHARACTERS

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ lipsum.__globals__['os'].system('true') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ self._TemplateReference__context }}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% set x %}{% endset %}{{ x.__html__.__func__ }}",
    "{{ messages | attr('__class__') | string }}",
    "{% for i in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
]
# A hundred times, a value becomes twice as long, or holds the last one twice.
DOUBLING = "{{% set ns = namespace(a=[1], b=[1], n=3, s='x') %}}{{% for i in range(100) %}}{}{{% endfor %}}"
SHARED = "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}"
NESTED = (
    "{% set ns = namespace(a=[], b=[]) %}"
    "{% for i in range(9999) %}{% set ns.a = [ns.a] %}{% set ns.b = [ns.b] %}{% endfor %}"
)
LONG_LOOP = "{{% for i in range(99999) %}}{{% for j in range(99999) %}}{}{{% endfor %}}{{% endfor %}}"
TOO_LARGE = {
    "center": "{{ 'x' | center(999999999) }}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "zfill": "{{ '1'.zfill(9999999999) }}",
    "expandtabs": "{{ ('\t' * 9999).expandtabs(9999999) }}",
    "percent format": "{{ '%999999999d' % 1 }}",
    "percent format with a star": "{{ '%*d' % (999999999, 1) }}",
    "percent format with a precision": "{{ '%.999999999f' % 1 }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "format method": "{{ '{:999999999}'.format(1) }}",
    "format method, nested": "{{ '{:{}}'.format('x', 999999999) }}",
    "format_map": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "product": "{{ 'a' * 10000000000 }}",
    "product of a list": "{{ 10000000000 * [1] }}",
    "product in a constant": "{{ 'x' * 99999999 ~ 'y' * 99999999 ~ 'z' * 99999999 }}",
    "doubling by ~": DOUBLING.format("{% set ns.s = ns.s ~ ns.s %}"),
    "doubling by +": DOUBLING.format("{% set ns.s = ns.s + ns.s %}"),
    "doubling a list": DOUBLING.format("{% set ns.a = ns.a + ns.a %}"),
    "doubling without a loop": "{% set s = (s or 'x') ~ (s or 'x') %}" * 100,
    "indent": "{{ 'x\nx' | indent(999999999) }}",
    "tojson indent": "{{ [1] | tojson(indent=999999999) }}",
    "replace": "{{ ('x' * 100000) | replace('x', 'y' * 100000) }}",
    "replace method": "{{ ('x' * 100000).replace('', 'y' * 100000) }}",
    "translate": "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "join": "{{ (['x'] * 10000) | join('y' * 100000) }}",
    "map and join": "{{ (messages * 99999999) | map(attribute='role') | join }}",
    "batch": "{{ [1] | batch(999999999, 'x') | list }}",
    "list": "{{ (range(100000) | list * 100000) | length }}",
    "sort": "{{ (range(99999) | list * 100) | sort(reverse=true) | length }}",
    "split": "{{ ('x ' * 50000000).split() | length }}",
    "encode": "{{ ('x' * 90000000).encode('utf-32') }}",
    "to_bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "joiner": "{% set j = joiner('x' * 9999999) %}{% for i in range(9999) %}{{ j() }}{% endfor %}",
    "filter block": "{% filter center(999999999) %}x{% endfilter %}",
    "raise_exception": "{{ raise_exception('x' * 99999999 ~ 'y' * 99999999) }}",
}
TOO_LONG = {
    "text": "x" * 1000 + "{% for i in range(99999) %}" + "x" * 100 + "{% endfor %}",
    "product": "{{ 'x' * " + str(MAX_CHARACTERS) + " }}",
    "striptags": "{{ ('<' * 2999999) | striptags }}",
    "escape": "{{ ('&' * 999999) | escape }}",
    "strftime_now": "{{ strftime_now('%%' * 2999999) }}",
    "lipsum": "{{ lipsum(n=1, min=300000, max=300001) }}",
    "wordwrap": "{{ ('ab' * 10000) | wordwrap(1, wrapstring='y' * 1000) }}",
}
TOO_SLOW = {
    "loops": LONG_LOOP.format(""),
    "power": "{{ 10 ** 999999999 }}",
    "comparison": DOUBLING.format(SHARED) + "{{ ns.a == ns.b }}",
}
TOO_SLOW_TOO = {
    "loop with another take_step": "{% set take_step = 1 %}" + LONG_LOOP.format(""),
    "three loops": "{% set r = range(9999) | list %}"
    "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "macro in a loop": "{% macro f() %}xxxxxxxx{% endmacro %}" + LONG_LOOP.format("{{ f() }}"),
    "macro as a tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "cycler": "{% set c = cycler('x', 'y') %}" + LONG_LOOP.format("{{ c.next() }}"),
    "random": LONG_LOOP.format("{{ [1, 2] | random }}"),
    "big integers": DOUBLING.format("{% set ns.n = ns.n * ns.n %}"),
    "lipsum": "{{ lipsum(n=999999) }}",
    "long words of lipsum": "{{ lipsum(n=1, min=99999999, max=999999999) }}",
    "wordwrap": "{{ ('x ' * 9000000) | wordwrap(1) }}",
    "slice": "{{ [1] | slice(999999999) | list }}",
    "slices": "{% set s = 'x' * 50000000 %}{% for i in range(99999) %}{% set y = s[1:] %}{% endfor %}",
    "search in a text": "{% set s = 'a' * 5000000 %}{% for i in range(99999) %}{{ 'b' in s }}{% endfor %}",
    "search in a list": "{% set l = range(99999) | list %}{% for i in range(99999) %}{{ -1 in l }}{% endfor %}",
    "sort in a loop": "{% for i in range(9999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "unique in a loop": "{% for i in range(9999) %}{{ range(99999) | unique | list | length }}{% endfor %}",
    "sum of lists": "{{ ([[1] * 1000] * 99999) | sum(start=[]) | length }}",
    "shared lists as JSON": DOUBLING.format(SHARED) + "{{ ns.a | tojson }}",
    "shared lists as text": DOUBLING.format(SHARED) + "{{ ns.a | string }}",
    "shared lists in a message": DOUBLING.format(SHARED) + "{{ raise_exception(ns.a) }}",
    "shared lists printed": DOUBLING.format(SHARED) + "{{ ns.a | pprint }}",
    "urlencode": "{{ ('é' * 30000000) | urlencode }}",
    "wordcount": "{{ ('a ' * 30000000) | wordcount }}{{ ('a ' * 30000000) | wordcount }}",
    "compiling a chain": "{{ 1" + "~1" * 120000 + " }}",
}
NOT_COMPUTED = {
    "range": "{{ range(10 * 100000) }}",
    "digits of a number": "{{ (10 ** 100000) | string }}",
    "digits in the source": "{{ " + "9" * 200000 + " }}",
    "number too large for a float": "{{ (10 ** 400) | filesizeformat }}",
    "macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "call without an end": "{% macro f() %}{{ caller() }}{% call f() %}{% endcall %}{% endmacro %}"
    "{% call f() %}{% endcall %}",
    "recursive loop": "{% for a in [[[[]]]] recursive %}{{ loop(a) }}{{ loop([a, a]) }}{% endfor %}",
    "nested lists as JSON": NESTED + "{{ ns.a | tojson }}",
    "nested lists as text": NESTED + "{{ ns.a | string }}",
    "nested lists compared": NESTED + "{{ ns.a == ns.b }}",
    "brackets": "{{ " + "(" * 100000 + "1" + ")" * 100000 + " }}",
    "brackets of lists": "{{ " + "[" * 5000 + "1" + "]" * 5000 + " }}",
    "not": "{{ " + "not " * 60000 + "1 }}",
    "minus": "{{ " + "-" * 200000 + "1 }}",
    "ifs": "{% if 1 %}" * 10000 + "{% endif %}" * 10000,
    "fors": "{% for i in range(9) %}" * 25 + "{% endfor %}" * 25,
    "macros": "{% macro f() %}" * 3000 + "{% endmacro %}" * 3000,
    "generation tags": "{% generation %}" * 2000,
    "strftime_now with a number": "{{ strftime_now(3) }}",
    "strftime_now with a surrogate": "{{ strftime_now('\\ud800') }}",
    "surrogate": "\ud800",
    "surrogate as an escape": "{{ '\\ud800' }}",
    "raise_exception": "{{ raise_exception('on purpose') }}",
    "raise_exception with many lines": "{{ raise_exception('a\\nb\\rc\\u2028d\\x85e\\x0bf\\x1cg') }}",
    "raise_exception without words": "{{ raise_exception('') }}",
    "raise_exception with a surrogate": "{{ raise_exception('\\ud800') }}",
    "raise_exception with long words": "{{ raise_exception('x' * 9999999) }}",
    "undefined with a long name": "{{ messages['z' * 9999999].a }}",
    "division by zero": "{{ 1 / 0 }}",
    "break outside of a loop": "{% break %}",
    "not a template": "{% if %}",
    "comments without an end": "{#" * 100000,
    "undefined": "{{ messages[0].content.nothing.more }}",
}


def refusal(source: str) -> str:
    """What is said of a template. The bad part stands before a good one, so that nothing else can be what fails."""
    with pytest.raises(UserError) as excinfo:
        template(source + PARTS)
    message = str(excinfo.value)
    assert message.startswith("test.jinja: the chat template ") and len(message.splitlines()) == 1
    assert len(message) < 300 and message.isprintable()
    return message


def cases(sources: dict[str, str], *marks: pytest.MarkDecorator) -> list:
    return [pytest.param(source, id=name, marks=marks) for name, source in sources.items()]


@pytest.fixture(autouse=True)
def no_hang():
    """A template that takes the machine must not take the tests' machine."""
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("source", ESCAPES)
def test_templates_do_not_reach_python(source):
    refusal(source)
    # They fail in the sandbox itself, which is all that protects from a template known to be harmless.
    with pytest.raises(template_sandbox.TemplateFailure):
        template_sandbox.Template(source).render({"messages": [user("hi")]})


@pytest.mark.parametrize("source", cases(TOO_LARGE))
def test_memory_is_limited(source):
    # On a slow machine, the time may be over before the memory is used up.
    assert refusal(source).endswith(("fails: it takes too much memory", "fails: it takes longer than 1 second"))


@pytest.mark.parametrize("source", cases(TOO_SLOW) + cases(TOO_SLOW_TOO, pytest.mark.slow))
def test_time_is_limited(source):
    assert refusal(source).endswith("fails: it takes longer than 1 second")


@pytest.mark.parametrize("source", cases(TOO_LONG))
def test_text_is_limited(source):
    assert refusal(source).endswith(f"fails: it renders more than {MAX_CHARACTERS} characters")


@pytest.mark.parametrize("source", cases(NOT_COMPUTED))
def test_templates_that_fail(source):
    refusal(source)


def test_templates_without_an_image():
    for source in ("an answer for everything", ""):
        with pytest.raises(UserError, match=r"test.jinja: the chat template does not render an image and a text$"):
            template(source)


def test_a_huge_source_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(template_process, "_Worker", None)
    assert "at most 262144" in refusal("x" * 50_000_000)


def test_words_of_a_template_cannot_steer_a_terminal():
    assert refusal("{{ raise_exception('\\x1b[2Jerror:\\0é') }}").endswith(r"fails: \x1b[2Jerror:\x00é")


@pytest.mark.parametrize("character", ["x", "é", "\0", "\U0001f600"])
def test_texts_may_have_exactly_the_limit(character):
    made = template(
        "{% if messages[0].content[1].text == 'long' %}{{ character * n }}{% else %}" + PARTS + "{% endif %}",
        {"character": character, "n": MAX_CHARACTERS},
    )
    assert made.render([user("<image>", "long")]) == character * MAX_CHARACTERS


def test_memory_that_is_not_much_is_allowed():
    assert template("{{ ('x' * 100000000) | length }}" + PARTS).render([user("Why?")]).startswith("100000000USER: Why?")
