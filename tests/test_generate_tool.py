"""The command that writes text: one prompt and many, stop strings, JSON, and what it refuses."""

import io
import json
import re
from pathlib import Path

import pytest

from moe_mamba.errors import UserError
from tools.generate import main

LENGTH = 24
PROMPTS = ["1 plus", "20 plus 6 is", "3"]


@pytest.fixture
def run(plain: Path, capsys: pytest.CaptureFixture[str]):
    """Call the command on a small run; returns what it prints."""

    def call(**flags: object) -> str:
        main(str(plain), **{"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, **flags})
        return capsys.readouterr().out

    return call


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def many(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return str(path)


def test_many_prompts_are_written_as_each_by_itself(run, many: str) -> None:
    alone = [objects(run(prompt=prompt, seed=5 + row, json=True))[0] for row, prompt in enumerate(PROMPTS)]
    assert [one["prompt"] for one in alone] == PROMPTS
    assert all(one["text"].startswith(one["prompt"]) and one["ended_by"] == "length" for one in alone)
    for batch in (1, 2, 16):
        assert objects(run(prompts_file=many, seed=5, json=True, batch=batch)) == alone
        expected = "".join(f"[{number}] {one['text']}\n" for number, one in enumerate(alone, 1))
        assert run(prompts_file=many, seed=5, batch=batch) == expected


def test_prompts_as_json_lines_and_from_standard_input(
    run, many: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(prompts_file=many)
    lines = "".join(json.dumps({"prompt": prompt, "id": 3}) + "\n" for prompt in PROMPTS)
    (tmp_path / "prompts.jsonl").write_text(lines)
    assert run(prompts_file=str(tmp_path / "prompts.jsonl")) == expected
    for content in (lines, "\n".join(PROMPTS)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        assert run(prompts_file="-") == expected


def test_a_byte_order_mark_is_no_prompt(run, many: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(prompts_file=many)
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    for name, content in (("a.jsonl", lines), ("a.txt", "\n".join(PROMPTS))):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert run(prompts_file=str(tmp_path / name)) == expected
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(("\ufeff" + content).encode())))
        assert run(prompts_file="-") == expected


def test_stop_strings(run, many: str) -> None:
    (whole,) = objects(run(prompt="1", seed=1, json=True))
    new = whole["text"][1:]
    for stop in (new[6:8], json.dumps(["never", new[6:8]])):
        (stopped,) = objects(run(prompt="1", seed=1, json=True, stop=stop))
        assert stopped["text"] == "1" + new[: new.index(new[6:8])] and stopped["ended_by"] == "stop"
        assert stopped["tokens"] == whole["tokens"][: len(stopped["tokens"])] and len(stopped["tokens"]) < LENGTH
        assert run(prompt="1", seed=1, stop=stop) == stopped["text"] + "\n"
    stops = [text["text"][len(text["prompt"]) + 5] for text in objects(run(prompts_file=many, seed=1, json=True))]
    for text in objects(run(prompts_file=many, seed=1, json=True, stop=json.dumps(stops))):
        assert not set(stops) & set(text["text"].removeprefix(text["prompt"])) and text["ended_by"] == "stop"


def test_speed_is_told_beside_the_text(plain: Path, many: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(str(plain), prompts_file=many, max_new_tokens=5, min_new_tokens=5, timing=True, batch=2)
    told = capsys.readouterr().err
    number = r"[\d,.]+"
    assert re.fullmatch(
        rf"read {sum(map(len, PROMPTS))} tokens in {number} s: {number} tokens/s\n"
        rf"wrote 12 tokens in {number} s: {number} tokens/s\n",
        told,
    )


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        ({}, None, "^give --prompt, or --prompts_file"),
        ({"prompt": "a", "prompts_file": "b"}, None, "^give --prompt, or --prompts_file"),
        ({"prompts_file": "{folder}/a.jsonl"}, b'{"prompt": "\\ud800"}', r'line 1: write {"prompt"'),
        ({"prompts_file": "{folder}/none.txt"}, None, r"none.txt cannot be read \(No such file"),
        ({"prompts_file": "{folder}/a.txt"}, b"\n \n", "a.txt has no prompts"),
        ({"prompts_file": "{folder}/a.txt"}, b"\xff", r"a.txt cannot be read \(it is not UTF-8"),
        ({"prompts_file": "{folder}/a.jsonl"}, b'{"prompt": "a"}\n\n{"text": "a"}', r'line 3: write {"prompt"'),
        ({"prompts_file": "{folder}/a.jsonl"}, b"a prompt", r'line 1: write {"prompt"'),
        ({"prompt": ""}, None, "the prompt has no tokens"),
        ({"prompt": "a", "stop": ""}, None, "--stop is empty"),
        ({"prompt": "a", "top_p": 2}, None, "top_p=2 is not a probability"),
    ],
)
def test_bad_input_is_one_line(
    run, tmp_path: Path, flags: dict[str, object], content: bytes | None, message: str
) -> None:
    if content is not None:
        for name in ("a.txt", "a.jsonl"):
            (tmp_path / name).write_bytes(content)
    flags = {key: str(value).format(folder=tmp_path) if key != "top_p" else value for key, value in flags.items()}
    with pytest.raises(UserError, match=message) as error:
        run(**flags)
    assert "\n" not in str(error.value)
