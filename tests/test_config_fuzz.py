"""Any text, any value: a config whose every number is finite and in its range, or one line; seeded and bounded."""

import datetime
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_mamba.config import Config
from moe_mamba.config_file import keys, load_config, parse_config, save_config
from moe_mamba.errors import LONGEST, UserError, shown
from tests import ROOT

SECONDS = 2.0  # for one input; most take a millisecond
KEYS = [name for name, _, _ in keys()]
load_config()  # loads torch
DEEP: Any = "leaf"
for _ in range(3000):
    DEEP = [DEEP]

WORDS = """null none ~ true True off yes nan NaN inf -inf Infinity 1e999 -1 -0 0 -0.0 0.0 1 2 7 1.5 1e3 1e9 1e18 2e-3
5e-324 1e308 +4 1e-31 0x10 0b11 010 1:30 2026-01-01 1_000 1__0 _1 1,000 １２ ٣ 1/2 1. .5 . e5 1e 日本 é 🙂 \u202e [ { []
{} {"a":NaN} {"a":1e999} {"a":-1} {"a":true} {"a":1,"a":2} [null] [1,1] a,a a,,b , a.b,a_b [[1]] {"a":{"b":1}} {"":"x"}
[1 {"a":""} gate,gate conv,x M *- ME (ME) (( .. / ../../../.. %s%n{0} ' " - E bf16 8 16 64 4096 65536 1000000 1000000000
9223372036854775808"""
TEXTS = [
    *WORDS.split(),
    *("", " ", "1 2", "a\nb", "a\rb", "a\0b", "a\tb", "\udcff", "\ud800", "\u2028", "\x1b[31m", "\x7f"),
    *("M" * 5000, "M" * 4097, "M" * 4096, "(" * 4000, "(M" * 2000, "x" * 1_000_000, "[" * 100_000, '{"a":' * 100_000),
    *("9" * 5000, "-" + "9" * 5000, "1." + "0" * 5000, "a," * 60_000, "[" + "9" * 5000 + "]"),
    "{" + "".join(f'"{number}": 1, ' for number in range(1000)) + '"a": 1}',
]
VALUES: list[Any] = [
    *TEXTS,
    *(True, False, None, 0, 1, -1, 2, 10**9, 10**18, 2**63, 2**64, 10**400, 10**5000, -(10**5000)),
    *(0.0, -0.0, 1.5, 1e9, 1e300, 5e-324, math.nan, math.inf, -math.inf, 1e-31),
    *([], {}, [[]], [1], ["a", "a"], [None], [True], [math.nan], [10**5000], {1: 2}, {None: None}, DEEP, {"a": DEEP}),
    *({"a": math.nan}, {"a": True}, {"a": "0"}, {"a\nb": 1}, {"a\0": "b"}, {"a": 10**5000}, {"a": {"b": 1}}),
    *({"x" * 10**6: 1}, b"ab", b"\xff", datetime.date(2026, 1, 1), {1, 2}, (1, 2), 1 + 2j, object(), Config, len, ...),
]


def outcome(load: Callable[[], Config], what: str) -> Config | str:
    """The config, or the line that it ends in; anything else is a failure."""
    begun = time.process_time()
    try:
        result: Config | str = load()
    except UserError as error:
        result = str(error)
    assert time.process_time() - begun < SECONDS, what
    if isinstance(result, Config):
        for key, value in leaves(result.model_dump()):
            assert is_plausible(value), f"{what}: {key}={value!r:.100}"
    else:
        assert 0 < len(result) <= LONGEST, (what, len(result))
        assert "\n" not in result and result.isprintable(), (what, result)
    return result


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield f"{key} (name)", name
            yield from leaves(value, f"{key}.{name}")
    elif isinstance(tree, list):
        for value in tree:
            yield from leaves(value, key)
    else:
        yield key, tree


def is_plausible(value: Any) -> bool:
    if isinstance(value, str):
        value.encode("utf-8")
        return len(value) <= 4096 and not any(ord(letter) < 32 or ord(letter) == 127 for letter in value)
    return value is None or (isinstance(value, int | float) and math.isfinite(value) and abs(value) <= 2**63)


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_every_key_takes_every_odd_value_or_names_itself(tmp_path: Path, stride: int) -> None:
    tried = refused = 0
    for place, key in enumerate(KEYS):
        for value in VALUES[place % stride :: stride]:
            what = f"{key}={shown(value)}"
            result = outcome(partial(load_config, None, {key: value}), what)
            tried += 1
            if isinstance(result, str):
                refused += 1
                assert key in result, (what, result)
            elif tried % 10 == 0:
                save_config(result, tmp_path / "config.yaml")
                assert load_config(tmp_path / "config.yaml") == result, what
    print(f"{tried} values of {len(KEYS)} keys, {refused} refused")
    assert tried >= len(KEYS) * (len(VALUES) // stride) and refused > tried / 2, (tried, refused)


def test_a_flag_without_its_value_is_no_number_and_no_text() -> None:
    for key, default, _ in keys():
        if default not in ("true", "false"):
            with pytest.raises(UserError, match=f"{re.escape(key)}=True: .*give"):
                load_config(None, {key: True})


def test_random_trees() -> None:
    chance = random.Random(15)
    tried, built = 3000, 0
    for number in range(tried):
        tree = _tree(chance)
        built += isinstance(outcome(partial(parse_config, tree), f"tree {number}: {shown(tree)}"), Config)
    print(f"{tried} trees, {built} of them make a config")
    assert 0 < built < tried


PLAIN = [default for _, default, _ in keys()]


def _tree(chance: random.Random) -> dict[Any, Any]:
    """A few keys with odd values, some at wrong depths or of no name."""
    tree: dict[Any, Any] = {}
    for _ in range(chance.randint(1, 4)):
        section, _, name = chance.choice(KEYS).partition(".")
        value = chance.choice(VALUES if chance.random() < 0.3 else PLAIN)
        match chance.randrange(12):
            case 0:
                tree[section] = value
            case 1:
                tree[chance.choice(("", "..", "x\n", "modle", "train.steps", "\udcff", "y" * 10**5))] = value
            case 2:
                _section(tree, section)[
                    chance.choice(("", "..", "stpes", name + ".x", "kernels", "z" * 10**5, "\0"))
                ] = value
            case 3:
                _section(tree, section)[name] = {"inner": {chance.choice(("experts", "expert", "x")): value}}
            case _:
                place = _section(tree, section)
                *outer, name = name.split(".")
                if outer:
                    place = _section(place, outer[0])
                place[name] = value
    return tree


def _section(tree: dict[Any, Any], name: str) -> dict[Any, Any]:
    if not isinstance(tree.get(name), dict):
        tree[name] = {}
    return tree[name]


INSERTED = """--- | ... | \t | : | - | ? | & a | *a | &a [*a, *a] | <<: *a | !!python/object:os.system x | !!set {a, b}
 | ~ | !!binary aGk= | %YAML 9.9 | | | > | ' | " | # | { | } | [ | ] | , | \0 | \ufeff | \x85 | \udc80 | null | 1:30
 | 2026-01-01 | 010 | .inf | .nan | - - - - - - - - - - - | [[[[[[[[[[[[ | {a: {b: {c: {d: {e: {f: {g: {h: {i: {j: k
 | true | train: | é | model: {} | steps: 3 | d_model: 1e9 | x: y | 1: 2 | [a]: b | pattern: *- | ? [a, b]"""


def test_damaged_files(tmp_path: Path) -> None:
    chance = random.Random(16)
    texts = [path.read_text() for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    file = tmp_path / "config.yaml"
    tried, built = 600, 0
    for number in range(tried):
        lines = chance.choice(texts).splitlines()
        for _ in range(chance.randint(1, 3)):
            _damage(lines, chance)
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        if chance.random() < 0.2:
            place = chance.randrange(len(content))
            content = content[:place] + bytes([chance.randrange(256)]) * chance.randint(1, 3) + content[place + 1 :]
        file.write_bytes(content)
        result = outcome(partial(load_config, file), f"file {number}: {content!r}")
        built += isinstance(result, Config)
    print(f"{tried} damaged files, {built} of them make a config")
    assert 0 < built < tried


def _damage(lines: list[str], chance: random.Random) -> None:
    place = chance.randrange(len(lines))
    match chance.randrange(6):
        case 0:
            lines.insert(chance.randrange(len(lines)), lines[place])
        case 1:
            del lines[place + 1 :]
        case 2:
            lines[place] = " " * chance.randint(0, 5) + lines[place].strip()
        case 3:
            lines[place] = lines[place].partition(":")[0] + ": " + str(chance.choice(TEXTS))
        case 4:
            lines.insert(place, " " * chance.randint(0, 3) + chance.choice(INSERTED.split(" | ")))
        case 5:
            column = chance.randint(0, len(lines[place]))
            lines[place] = lines[place][:column] + chance.choice(INSERTED.split(" | ")) + lines[place][column:]
