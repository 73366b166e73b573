"""Chat templates are programs from a checkpoint: they reach nothing of Python's, and end in bounded time and memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from litgpt.errors import UserError
from litgpt.prompts import ChatTemplate
from litgpt.templates import FILTERS, MAX_SECONDS, Sandbox
from tests.helpers.places import Place, bounded, check_message, run, tree

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
RUN = "os.popen('touch sprung').read()"

# Ways out of jinja2 that have been published, and their relatives.
ESCAPES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "base": "{{ ().__class__.__base__.__subclasses__()[0] }}",
    "globals of a global": f"{{{{ cycler.__init__.__globals__.{RUN} }}}}",
    "globals of namespace": f"{{{{ namespace.__init__.__globals__.{RUN} }}}}",
    "globals of joiner": f"{{{{ joiner.__init__.__globals__.{RUN} }}}}",
    "globals of lipsum": f"{{{{ lipsum.__globals__.{RUN} }}}}",
    "globals of our function": "{{ raise_exception.__globals__ }}",
    "code of our function": "{{ raise_exception.__code__.co_consts }}",
    "self of our function": "{{ strftime_now.func.__globals__ }}",
    "arguments of our function": "{{ strftime_now.args[0].__class__.__init__ }}",
    "builtins": "{{ cycler.__init__.__builtins__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "self's context": "{{ self._TemplateReference__context.environment.globals }}",
    "an undefined name": f"{{{{ nothing.__class__.__init__.__globals__.{RUN} }}}}",
    "an undefined attribute": "{{ messages[0].nothing.__class__.__init__.__globals__ }}",
    "brackets": "{{ ''['__class__']['__mro__'] }}",
    "escaped brackets": "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "joined name": "{{ ''['__cla' ~ 'ss__'] }}",
    "computed name": "{{ ''[['__', 'class', '__']|join] }}",
    "full-width name": "{{ ''.__ｃlass__ }}",
    "attr": "{{ ''|attr('__class__') }}",
    "attr of attr": "{{ ('{0.__class__}'|attr('format'))(self) }}",
    "map attr": "{{ ['']|map('attr', '__class__')|list }}",
    "map attribute": "{{ ['']|map(attribute='__class__')|list }}",
    "map deep attribute": "{{ [cycler]|map(attribute='__init__.__globals__')|list }}",
    "selectattr": "{{ ['']|selectattr('__class__')|list }}",
    "sort attribute": "{{ ['', 'a']|sort(attribute='__class__') }}",
    "groupby": "{{ ['']|groupby('__class__') }}",
    "sum attribute": "{{ ['']|sum(attribute='__class__') }}",
    "min attribute": "{{ ['', 'a']|min(attribute='__class__.__mro__') }}",
    "format": "{{ '{0.__class__.__init__}'.format(messages) }}",
    "format index": "{{ '{0[__class__]}'.format(messages[0]) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "format kept": "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "format in a loop": "{% for f in ['{0.__class__}'.format] %}{{ f('') }}{% endfor %}",
    "format by map": "{{ ['{0.__class__}']|map('format', '')|list }}",
    "markup format": "{{ ('{0.__class__}'|safe).format('') }}",
    "markup format_map": "{{ ('{a.__class__}'|escape).format_map({'a': ''}) }}",
    "format through a macro": "{% macro m(f) %}{{ f('') }}{% endmacro %}{{ m('{0.__class__}'.format) }}",
    "format by call": "{{ ''.format.__call__('') }}",
    "str.format_map of a global": "{{ dict.__class__ }}",
    "type": "{{ dict.mro() }}",
    "dict subclasses": "{{ dict.__subclasses__() }}",
    "range": "{{ range.__self__ }}",
    "a generator's frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "a macro's function": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "a macro's environment": "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "caller": "{% macro m() %}{{ caller.__globals__ }}{{ caller._func }}{% endmacro %}{% call m() %}{% endcall %}",
    "loop": "{% for x in [1] %}{{ loop._iterator }}{{ loop.__init__.__globals__ }}{% endfor %}",
    "a namespace's attribute": "{% set ns = namespace() %}{% set ns.__class__ = 'x' %}{{ ns.__class__ }}",
    "a namespace by keyword": "{{ namespace(**{'__class__': 'x'}).__class__ }}",
    "import": "{% import 'os' as os %}{{ os.system('touch sprung') }}",
    "from import": "{% from 'os' import system %}{{ system('touch sprung') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "include of a list": "{% include ['/etc/passwd', 'setup.py'] ignore missing %}",
    "append": "{{ messages.append({'role': 'x'}) }}",
    "update": "{{ messages[0].update({'role': 'x'}) }}",
    "pop": "{{ messages.pop() }}",
    "setdefault": "{{ messages[0].setdefault('a', 1) }}",
    "clear": "{{ messages.clear() }}",
    "the environment of a filter": "{{ messages|map('map', 'x').environment }}",
    "our own filters": "{{ ''|_made|_each|_joined }}",
    "a bound method": "{{ ''.join.__self__.__class__ }}",
    "an exception": "{{ raise_exception(cycler.__init__.__globals__) }}",
    "encode": "{{ 'x'.encode('rot13') }}",
    "translate": "{{ 'x'.translate({120: 'y' * 99}) }}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_no_way_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused, or prints nothing of Python's; none runs anything or changes the messages."""
    monkeypatch.chdir(tmp_path)
    messages = [dict(message) for message in MESSAGES]
    try:
        text = ChatTemplate(ESCAPES[name]).render(messages)
    except UserError as error:
        text = str(error)
        assert "chat template failed" in text
    for sign in ("<class", "<function", "<built-in", "<module", "<jinja2.environment", "object at 0x", "root:", "site-packages"):
        assert sign not in text.replace(ESCAPES[name], ""), text
    assert not list(tmp_path.iterdir()) and messages == MESSAGES


DOUBLE = "{{% set ns = namespace(x='xxxxxxxx', y=['x'], z=9) %}}{{% for i in range(99) %}}{0}{{% endfor %}}{{{{ ns.y }}}}".format
MUCH = "{% set x = 'x' * 4000000 %}"
ENDLESS = {
    "~": DOUBLE("{% set ns.x = ns.x ~ ns.x %}"),
    "+": DOUBLE("{% set ns.x = ns.x + ns.x %}"),
    "*": DOUBLE("{% set ns.x = ns.x * 2 %}"),
    "lists in lists": DOUBLE("{% set ns.y = [ns.y, ns.y] %}"),
    "tuples in tuples": DOUBLE("{% set ns.y = (ns.y, ns.y) %}"),
    "objects in objects": DOUBLE("{% set ns.y = {'a': ns.y, 'b': ns.y} %}"),
    "dict()": DOUBLE("{% set ns.y = dict(a=ns.y, b=ns.y) %}"),
    "arguments": "{% macro f() %}{% set ns.y = varargs %}{% endmacro %}" + DOUBLE("{{ f(ns.y, ns.y) }}"),
    "numbers": DOUBLE("{% set ns.z = ns.z * ns.z %}"),
    "sums": DOUBLE("{% for j in range(999) %}{% set ns.z = ns.z + ns.z %}{% endfor %}"),
    "separators": "{{ ([1] * 3000)|tojson(separators=('x' * 1000000, ':')) }}",
    "join": DOUBLE("{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}"),
    "join filter": DOUBLE("{% set ns.x = [ns.x, ns.x]|join %}"),
    "replace": DOUBLE("{% set ns.x = ns.x.replace('x', 'xx') %}"),
    "replace filter": DOUBLE("{% set ns.x = ns.x|replace('x', 'xx') %}"),
    "format": DOUBLE("{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    "format filter": DOUBLE("{% set ns.x = '%s%s'|format(ns.x, ns.x) %}"),
    "percent": DOUBLE("{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    "tojson": DOUBLE("{% set ns.x = [ns.x, ns.x]|tojson %}"),
    "set block": DOUBLE("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLE("{% set ns.x = f(ns.x) %}"),
    "call block": (
        "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
        + DOUBLE("{% set ns.x %}{% call f() %}{{ ns.x }}{% endcall %}{% endset %}")
    ),
    "filter block": DOUBLE("{% set ns.x %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}"),
    "sum of lists": DOUBLE("{% set ns.y = [ns.y, ns.y]|sum(start=[]) %}"),
    "escape": DOUBLE("{% set ns.x = (ns.x ~ '&')|escape|string %}{% set ns.x = ns.x ~ ns.x %}"),
    "output": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "width": "{{ '%099999999d' % 1 }}",
    "starred width": "{{ '%*d' % (2000000000, 1) }}",
    "format width": "{{ '{:>9999999999}'.format(1) }}",
    "nested width": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "named width": "{{ '{a:>{b}}'.format(a=1, b=9999999999) }}",
    "mapped width": "{{ '{a:>{b}}'.format_map({'a': 1, 'b': 9999999999}) }}",
    "filtered width": "{{ '%9999999999s'|format(1) }}",
    "center": "{{ 'x'.center(10000000000) }}",
    "center of markup": "{{ ('x'|safe).center(10000000000) }}",
    "zfill": "{{ 'x'.zfill(10000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10000000000) }}",
    "indent": "{{ ('\\n' * 999999)|indent(9999) }}",
    "indented JSON": "{{ range(9999)|list|tojson(indent=9999) }}",
    "batch": "{{ range(9)|batch(99999999, 'x')|list }}",
    "slice": "{{ range(9)|slice(99999999)|list }}",
    "round": "{{ 1.5|round(999999999) }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "range": "{{ range(10 ** 9)|list }}",
    "bytes": "{{ (5).to_bytes(3000000000, 'big') }}",
    "fromkeys": "{{ dict.fromkeys(range(99999), 'x' * 9999) }}",
    "lipsum": "{{ lipsum(n=100000000) }}",
    "date": "{{ strftime_now('%Y' * 999999) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops of filters": "{% for i in range(99999) %}{% set x = range(99999)|map('string')|list %}{% endfor %}",
    "loops of a global": (
        "{% set c = cycler(1, 2) %}{% for i in range(99999) %}{% for j in range(99) %}{{ c.next() }}{% endfor %}{% endfor %}"
    ),
    "lists of ranges": "{{ ([range(99999)] * 99999)|map('sum')|list }}",
    "search": MUCH + "{% for i in range(99999) %}{% if 'y' in x %}{% endif %}{% endfor %}",
    "find": MUCH + "{% for i in range(99999) %}{% set y = x.find('y') %}{% endfor %}",
    "compare": MUCH + "{% set y = x ~ '' %}{% for i in range(99999) %}{% if x == y %}{% endif %}{% endfor %}",
    "upper": MUCH + "{% for i in range(99999) %}{% set y = x|upper %}{% endfor %}",
    "slices": MUCH + "{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "kept texts": "{% set ns = namespace() %}" + "".join(f"{{% set ns.a{i} = 'x' * 9999999 %}}" for i in range(900)),
    "kept slices": MUCH + "{% set ns = namespace() %}" + "".join(f"{{% set ns.a{i} = x[{i}:] %}}" for i in range(900)),
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "a block in itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "nots": "{{ " + "not " * 20_000 + "1 }}",
    "dots": "{{ a" + ".a" * 40_000 + " }}",
    "pipes": "{{ a" + "|e" * 40_000 + " }}",
    "plusses": "{{ 1" + "+1" * 40_000 + " }}",
    "ifs": "{% if 1 %}" * 4_000 + "{% endif %}" * 4_000,
    "fors": "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,
    "digits": "{{ " + "1" * 90_000 + " }}",
    "comments": "{#" * 40_000,
    "a template of megabytes": "x" * 2_000_000,
}
SLOW = (
    "search",
    "find",
    "compare",
    "dots",
    "pipes",
    "plusses",
    "loops",
    "loops of filters",
    "loops of a global",
    "kept texts",
    "kept slices",
    "tuples in tuples",
    "objects in objects",
    "dict()",
    "arguments",
    "lists in lists",
    "sum of lists",
    "branching recursion",
    "upper",
    "slices",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ENDLESS])
def test_no_endless_template(name: str) -> None:
    """Each ends with a message, within the bound on time and 1 GiB of memory."""
    start = time.monotonic()
    with bounded(8 * MAX_SECONDS, 2**30), pytest.raises(UserError) as caught:
        ChatTemplate(ENDLESS[name], source="the folder").render(MESSAGES)
    assert str(caught.value).startswith("the folder: the chat template ") and len(str(caught.value)) < 500
    assert time.monotonic() - start < 8 * MAX_SECONDS


def test_the_clock_ends_what_takes_long_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litgpt.templates.MAX_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(UserError, match="it takes more than 0 seconds"):
        ChatTemplate(MUCH + "{% for i in range(99999) %}{% if 'y' is in x %}{% endif %}{% endfor %}").render(MESSAGES)
    assert time.monotonic() - start < 10


def test_each_rendering_has_its_own_budget() -> None:
    style = ChatTemplate("{% for i in range(90000) %}{% endfor %}{{ messages[0].content }}")
    assert [style.render(MESSAGES) for _ in range(4)] == ["Hello"] * 4


def test_a_command_ends_with_one_message(place: Place) -> None:
    import json

    base = place.base()
    settings = base / "tokenizer_config.json"
    for name in ("globals of a global", "numbers", "width", "include"):
        template = {**ESCAPES, **ENDLESS}[name]
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
        before = tree(place.folder)
        check_message(run(["generate", base]), f"{base}: the chat template failed", "Choose another prompt style, for example chatml", 1)
        assert tree(place.folder) == before


# What real templates do still works

USED = {
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join(', ') }}": "Hello",
    "{{ messages|rejectattr('role', 'equalto', 'user')|list|length }}": "1",
    "{{ (messages|first).content|trim|upper }}{{ (messages|last)['content'][:4] }}": "HELLOGood",
    "{{ '%s-%03d' % ('a', 7) }}{{ '{}:{b:>4}'.format('a', b=1) }}{{ '%5.1f'|format(2.25) }}": "a-007a:   1  2.2",
    (
        "{{ {'b': 1, 'a': [1, 2]}|tojson(indent=2)|length }}{{ {'b': 1}.items()|list }}{{ {'b': 2, 'a': 1}|dictsort }}"
    ): "39[('b', 1)][('a', 1), ('b', 2)]",
    (
        "{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'assistant' %}{% set ns.found = true %}"
        "{% endif %}{% endfor %}{{ ns.found }}"
    ): "True",
    "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.cycle('a', 'b') }}{% endfor %}": "0Falsea1Trueb",
    (
        "{{ 'a,b'.split(',')[-1] }}{{ ' x '.strip() }}{{ 'x'.startswith('x') }}{{ 'abc'.replace('b', 'xx') }}{{ 'b' in 'abc' }}"
        "{{ 'x' not in ['y'] }}"
    ): "bxTrueaxxcTrueTrue",
    (
        "{{ range(5)|batch(2)|map('join', '+')|join(' ') }}{{ [3, 1]|sort }}{{ [1, 2, 3]|sum }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}"
    ): "0+1 2+3 4[1, 3]6331024",
    (
        "{{ messages[0].content.split('l')|join('L') }}{{ missing|default('d') }}{{ messages is iterable }}{{ messages[0] is mapping }}"
    ): "HeLLodTrueTrue",
    "{{ messages[::-1][0].role }}{{ (1, 2)|length }}{{ none }}{{ 'a' ~ 1 ~ none }}": "assistant2Nonea1None",
    "{% macro m(x, y=2) %}<{{ x }}{{ y }}{{ caller() if caller }}>{% endmacro %}{{ m(1) }}{% call m(3, y=4) %}c{% endcall %}": "<12><34c>",
}


@pytest.mark.parametrize("template", USED)
def test_what_real_templates_use(template: str) -> None:
    assert ChatTemplate(template).render(MESSAGES) == USED[template]


def test_filters_are_those_of_the_list() -> None:
    from datetime import datetime

    sandbox: Any = Sandbox(datetime.now())
    assert {name for name in sandbox.filters if not name.startswith("_")} == FILTERS
