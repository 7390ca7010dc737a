from moe_mamba.errors import LONGEST, RunStopped, UserError, one_line, shown


def test_any_text_becomes_one_line_that_keeps_its_beginning_and_its_end() -> None:
    assert one_line("a\n b\t\0\x1b[31m\udcff") == "a b \\x00\\x1b[31m\\udcff"
    for error in (UserError(f"begin {'x y' * 10**6} end"), RunStopped(f"begin {'x' * 10**6} end")):
        line = str(error)
        assert len(line) <= LONGEST and line.startswith("begin ") and line.endswith(" end")
    path = "/".join("folder" for _ in range(38))
    assert one_line(f"a: {path}: give another") == f"a: {path}: give another", "a path alone is not cut"


def test_any_value_is_shown_in_a_few_characters() -> None:
    deep: object = 1
    for _ in range(10_000):
        deep = [deep]
    for value in ("x" * 10**6, 10**5000, deep, list(range(10**6)), {"a" * 10**6: "b" * 10**6}, b"x" * 10**6, object()):
        assert len(shown(value)) < 200
    assert shown("a\n\udcff") == "'a\\n\\udcff'"
