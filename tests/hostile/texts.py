"""Tokenizers and chat templates: escapes from the sandbox, loops without end, bombs, code by name."""

from collections.abc import Callable
from typing import Any

from tests.hostile.case import Case, edited, with_key
from tests.hostile.material import Tree

RUN = "touch outside_ran"
# Ways out of a Jinja sandbox that were published, and what they become once one is forbidden.
ESCAPES = {
    "a class of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.system('" + RUN + "') }}",
    "globals of joiner": "{{ joiner.__init__.__globals__['os'].system('" + RUN + "') }}",
    "globals of namespace": "{{ namespace.__init__.__globals__.os.popen('" + RUN + "').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].system('" + RUN + "') }}",
    "globals of raise_exception": "{{ raise_exception.__globals__['jinja2'] }}",
    "globals of strftime_now": "{{ strftime_now.__globals__ }}",
    "the attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "attr by parts": "{{ ''|attr('__cl' ~ 'ass__') }}",
    "a format string": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "a stored format": "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "the format of a mapped text": "{{ ['{0.__class__.__mro__}']|map('format', 1)|list }}",
    "map by attribute": "{{ ['']|map(attribute='__class__')|list }}",
    "the environment": "{{ self.__init__.__globals__ }}",
    "the template itself": "{{ self._TemplateReference__context.environment }}",
    "the context": "{{ [].append.__self__.__class__ }}",
    "a generator's frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "a code object": "{% macro m() %}{% endmacro %}{{ m.__call__.__func__.__code__ }}",
    "an undefined name": "{{ open('/etc/passwd').read() }}",
    "an import": "{% import 'os' as os %}{{ os.system('" + RUN + "') }}",
    "an include": "{% include '/etc/passwd' %}",
    "an extension": "{% extends '../../outside/secret' %}",
    "changing the messages": "{{ messages.append(1) }}",
    "changing a dictionary": "{{ messages[0].update({'role': 'system'}) }}",
}
EXHAUSTING = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a text of 10 GB": "{{ 'x' * 10**10 }}",
    "a text that doubles": "{% set n = namespace(x='x') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "a list of 10**10": "{{ [0] * 10**10 }}",
    "a width of 10**10": "{{ 'x'|center(10**10) }}",
    "a format of 10**10": "{{ '%010000000000d' % 1 }}",
}
# Each of these takes the five seconds that a template has; one of the kind is enough here.
QUICK = {
    "a huge range": "{{ range(10**9) }}",
    "a recursion without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a division by zero": "{{ 1 / 0 }}",
    "unclosed": "{% for",
    "5000 brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "an unknown filter": "{{ 1|evil }}",
    "an unknown tag": "{% evil %}",
    "an exception of its own": "{{ raise_exception('no') }}",
    "a number with too many digits": "{{ (10**5000)|string }}",
    "a key that is missing": "{{ messages[99]['content']['x'] }}",
}


def template(text: str) -> Callable[[Tree], object]:
    return lambda tree: (tree.merged / "chat_template.jinja").write_text(text)


def in_tokenizer_config(value: Any) -> Callable[[Tree], object]:
    def damage(tree: Tree) -> None:
        (tree.merged / "chat_template.jinja").unlink()
        edited(tree.merged / "tokenizer_config.json", with_key("chat_template", value=value))

    return damage


def tokenizer(change: Callable[[Any], Any]) -> Callable[[Tree], object]:
    return lambda tree: edited(tree.merged / "tokenizer.json", change)


def raw_tokenizer(data: bytes) -> Callable[[Tree], object]:
    return lambda tree: (tree.merged / "tokenizer.json").write_bytes(data)


def split_by(pattern: str) -> Callable[[Any], Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return with_key("pre_tokenizer", value=step)


TOKENIZERS: dict[str, Callable[[Any], Any]] = {
    "a model of an unknown type": with_key("model", value={"type": "Evil"}),
    "no model": lambda document: {"version": "1.0"},
    "a vocabulary that is a list": with_key("model", "vocab", value=[1, 2]),
    "a vocabulary of text": with_key("model", "vocab", value={"a": "b"}),
    "ids below zero": with_key("model", "vocab", value={"a": -1}),
    "ids of 2**63": with_key("model", "vocab", value={"a": 1 << 63}),
    "ids of NaN": with_key("model", "vocab", value={"a": float("nan")}),
    "merges of unknown tokens": with_key("model", "merges", value=["evil token"]),
    "merges that are numbers": with_key("model", "merges", value=[1, 2]),
    "an added token that is text": with_key("added_tokens", value=["x"]),
    "an added token of id -1": with_key("added_tokens", value=[{"id": -1, "content": "x"}]),
    "a decoder of an unknown type": with_key("decoder", value={"type": "Evil", "code": RUN}),
    "a normalizer with a broken pattern": with_key(
        "normalizer", value={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}
    ),
    "a pattern that is broken": split_by("("),
    "a pre-tokenizer that nests": with_key(
        "pre_tokenizer", value={"type": "Sequence", "pretokenizers": [{"type": "Evil"}]}
    ),
}
BYTES = {
    "nothing": b"",
    "a list": b"[]",
    "bytes": b"\xff\xfe\x00",
    "100000 levels": b"[" * 100_000,
    "code": b"__import__('os').system('touch outside_ran')",
    "half a surrogate pair": b'{"version": "\\ud800"}',
}


def vocabulary_files(**files: bytes) -> Callable[[Tree], object]:
    """A tokenizer of 2023: vocab.json and merges.txt, from which tokenizer.json is built."""

    def damage(tree: Tree) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (tree.base / name).unlink(missing_ok=True)
        defaults = {"vocab": b'{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}', "merges": b"#version: 0.2\na b\n"}
        for name, data in (defaults | files).items():
            suffix = ".txt" if name == "merges" else ".json"
            (tree.base / f"{name}{suffix}").write_bytes(data)

    return damage


def by_name(**keys: Any) -> Callable[[Tree], object]:
    """Code that the tokenizer's configuration names, beside it."""

    def damage(tree: Tree) -> None:
        for directory in (tree.base, tree.adapter, tree.merged):
            (directory / "evil.py").write_text("import os\nos.system('touch outside_ran')\n")
            path = directory / "tokenizer_config.json"
            path.write_text("{}") if not path.exists() else None
            for key, value in keys.items():
                edited(path, with_key(key, value=value))

    return damage


INSTRUCT = ("generate",)
CASES = [
    # Some render as nothing, which is a prompt of no tokens.
    *(Case(f"template escapes: {name}", template(text), INSTRUCT, codes=(0, 2, 4)) for name, text in ESCAPES.items()),
    *(Case(f"template exhausts: {name}", template(text), INSTRUCT, says="chat template")
      for name, text in EXHAUSTING.items()),
    *(Case(f"template: {name}", template(text), INSTRUCT, says="chat template") for name, text in QUICK.items()),
    Case("template: bytes", lambda tree: (tree.merged / "chat_template.jinja").write_bytes(b"\xff\xfe"), INSTRUCT),
    *(
        Case(f"template in tokenizer_config: {name}", in_tokenizer_config(value), INSTRUCT)
        for name, value in {
            "a number": 7, "an object": {"x": 1}, "a list of numbers": [1], "nested lists": [[[]]],
            "an escape": ESCAPES["a class of a text"], "named by a list": [{"name": ["default"], "template": "x"}],
            "a default that is a number": [{"name": "default", "template": 7}],
        }.items()
    ),
    *(Case(f"tokenizer: {name}", tokenizer(change), ("generate prompt",)) for name, change in TOKENIZERS.items()),
    *(Case(f"tokenizer: {name}", raw_tokenizer(data), ("generate prompt",)) for name, data in BYTES.items()),
    *(
        Case(f"tokenizer: pattern {pattern!a}", tokenizer(split_by(pattern)), ("generate prompt",), codes=(0, 4))
        for pattern in ("(a+)+$", "(x*)*y", "(?:(?:a{1,9}){1,9}){9}", r"\p{Evil}", "a{99999999999}", "(?<=a*)b")
    ),
    *(
        Case(f"vocabulary: {name}", vocabulary_files(**files), ("merge", "export"))
        for name, files in {
            "a list": {"vocab": b"[]"}, "nothing": {"vocab": b""}, "ids of text": {"vocab": b'{"a": "b"}'},
            "ids below zero": {"vocab": b'{"a": -1}'}, "bytes": {"vocab": b"\xff"},
            "unknown merges": {"merges": b"#version\nx y\n"}, "merges of bytes": {"merges": b"\xff\xfe\xff\n"},
            "another class": {"tokenizer_config": b'{"tokenizer_class": "EvilTokenizer"}'},
            "a class that is a list": {"tokenizer_config": b'{"tokenizer_class": ["x"]}'},
        }.items()
    ),
    *(
        Case(f"code by name: {name} in tokenizer_config.json", by_name(**keys),
             ("inspect", "merge", "export", "generate", "capture"), codes=(0, 4))
        for name, keys in {
            "auto_map": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "trust_remote_code": True},
            "tokenizer_class": {"tokenizer_class": "evil.Evil"},
            "tokenizer_file": {"tokenizer_file": "../../outside/secret"},
        }.items()
    ),
]  # fmt: skip
