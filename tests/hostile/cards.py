"""Model cards: YAML that nests, doubles, goes on and on or says something else than a name. None states a licence."""

from collections.abc import Callable

from tests.hostile.case import DONE, Case
from tests.hostile.material import Tree

FRONT_MATTER = {
    "100000 brackets": b"license: " + b"[" * 100_000,
    "30000 brackets": b"license: " + b"[" * 30_000,
    "30000 brackets elsewhere": b"x: " + b"[" * 30_000,
    "300 brackets": b"license: " + b"[" * 300 + b"]" * 300,
    "30000 levels of lists": b"license:\n" + b"- " * 30_000,
    "aliases that double": b"a0: &a0 [mit]\n"
    + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 64))
    + b"license: *a63",
    "merge keys that double": b"a0: &a0 {x: 1}\n"
    + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 64))
    + b"<<: *a63",
    "a merge key": b"<<: {license: mit}",
    "an alias of itself": b"license: &a [*a]",
    "8 MB": b"x: y\n" * (8 << 20 >> 2) + b"license: mit",
    "60000 empty lines": b"\n" * 60_000 + b"license: [",
    "a name of 60000 letters": b"license: " + b"x" * 60_000,
    "bytes that are not UTF-8": b"license: m\xff\xfet",
    "UTF-16": "license: mit".encode("utf-16"),
    "a zero byte": b"license: m\0it",
    "no YAML": b"license: {",
    "code": b"license: !!python/object/apply:os.system ['touch outside_ran']",
    "half a surrogate pair": b'license: "\\ud800"',
    "a letter beyond Unicode": b'license: "\\UFFFFFFFF"',
    "a terminal's escape": b'license: "\\e[2J"',
    "two lines": b'license: "mit\\n\\n# Terms"',
    "a list": b"license: [mit]",
    "a mapping": b"license: {name: mit}",
    "a number": b"license: 7",
    "a number to the base of 60": b"license: " + b"59:" * 190 + b"59.0",
    "a number of 5000 digits": b"license: " + b"9" * 5000,
    "null": b"license: null",
    "a day that is none": b"license: 2001-02-30",
    "a list in place of a mapping": b"- license: mit",
}
CARDS = {name: b"---\n" + front + b"\n---\n" for name, front in FRONT_MATTER.items()} | {
    "nothing": b"",
    "a front matter without end": b"---\nlicense: mit\n",
    "a front matter after 1 MB of spaces": b" " * (1 << 20) + b"---\nlicense: mit\n---\n",
}


def card(data: bytes) -> Callable[[Tree], object]:
    """Beside the base and beside the adapter."""

    def damage(tree: Tree) -> None:
        for directory in (tree.base, tree.adapter):
            (directory / "README.md").write_bytes(data)

    return damage


CASES = [
    Case(f"card: {name}", card(data), ("inspect", "merge", "export int8-exact"), codes=DONE)
    for name, data in CARDS.items()
]
