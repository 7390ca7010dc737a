"""Tokenizers that panic, refuse or never end: one line, and nothing else on standard error."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from moe_mamba.data import library_tokenizer
from moe_mamba.data.library_calls import DecodingError, EncodingError, LibraryError, call_library, call_within
from moe_mamba.data.tokenizer import LibraryTokenizer
from moe_mamba.errors import UserError, brief
from tests.data.tokenizer_kinds import gpt2_like, llama, named, special, words

HARD = "a" * 26 + "b"  # at which (a+)+$ tries more than the library allows
SLOW = ("a" * 20 + "b") * 20_000  # for each of which it stays below that


def _catastrophic() -> LibraryTokenizer:
    library = Library(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    library.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    library.add_special_tokens(special("</s>"))
    return named(library)


def test_a_panic_is_one_line_that_names_tokenizer_and_text(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = _catastrophic()
    with pytest.raises(EncodingError, match="made for a test: it cannot encode the text that begins 'aaa") as error:
        tokenizer.encode_batch(["b", "ab", HARD, "b"])
    assert error.value.index == 2
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300
    with pytest.raises(EncodingError):
        tokenizer.encode_prompts([HARD])
    assert tokenizer.encode("ab") == [0, 1], "the library goes on"
    assert capfd.readouterr() == ("", "")


def test_the_index_of_a_text_comes_through_a_pipe() -> None:
    again = pickle.loads(pickle.dumps(EncodingError("a line", 3)))
    assert (str(again), again.index) == ("a line", 3)


def test_only_patterns_of_its_own_may_take_for_ever() -> None:
    assert _catastrophic().has_patterns
    assert not any(named(library).has_patterns for library in (gpt2_like(), llama(), words(None)))


def test_a_refusal_is_one_too() -> None:
    library = Library(models.WordLevel({"a": 0, "</s>": 1}, unk_token="missing"))
    library.add_special_tokens(special("</s>"))
    with pytest.raises(EncodingError, match="begins 'b'"):
        named(library).encode_batch(["a", "b"])


def test_a_decoder_that_panics(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = named(words(decoders.Strip(" ", 1, 1)))
    space = tokenizer.library.token_to_id(" ")
    with pytest.raises(DecodingError, match="made for a test: it cannot decode"):
        tokenizer.decode([space])
    assert capfd.readouterr() == ("", "")


def test_a_text_that_never_ends_has_a_limit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = _catastrophic()
    monkeypatch.setattr(library_tokenizer, "PATIENCE", 0.3)
    monkeypatch.setattr(library_tokenizer, "PATIENT_CHARACTERS", 10**9)
    start = time.monotonic()
    with pytest.raises(UserError, match="after 0 s it has not encoded the text that begins 'aaa"):
        tokenizer.encode_prompts([SLOW[: 40 * 21]])  # seconds: the thread is left behind
    assert time.monotonic() - start < 5
    os.write(2, b"seen\n")
    assert capfd.readouterr().err == "seen\n", "standard error is what it was"


@pytest.mark.slow
def test_ctrl_c_ends_a_process_that_encodes_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(_catastrophic().content)
    code = (  # jobs in the background ignore the signal
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moe_mamba.command_line import run_command\n"
        "from moe_mamba.data.tokenizer import load_tokenizer\n"
        f"tokenizer = load_tokenizer({str(tmp_path)!r})\nprint('ready', flush=True)\n"
        f"def main():\n    tokenizer.encode_prompts([{SLOW[:21]!r} * 20000])\n"
        "sys.argv = sys.argv[:1]\nrun_command(main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == b""


def test_what_is_written_meanwhile_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    assert call_library(lambda: os.write(2, b"from elsewhere\n")) == 15
    assert capfd.readouterr().err == "from elsewhere\n"
    with pytest.raises(KeyboardInterrupt):
        call_library(_interrupted)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_two_threads_leave_standard_error_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = os.fstat(2)
    threads = [
        threading.Thread(target=lambda: [call_library(lambda: time.sleep(0.001)) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (os.fstat(2).st_dev, os.fstat(2).st_ino) == (before.st_dev, before.st_ino)


def test_a_closed_standard_error_is_left_closed() -> None:
    code = (
        "import os; os.close(2)\nfrom moe_mamba.data.library_calls import call_library\nprint(call_library(lambda: 3))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout == b"3\n"


def test_errors_are_brief() -> None:
    with pytest.raises(LibraryError) as error:
        call_library(lambda: json.loads("\n" * 50 + "x" * 500))
    assert "\n" not in str(error.value) and len(str(error.value)) <= 100
    assert brief("a\nb" * 100, 20) == "a\\nba\\nba\\n...nba\\nb"
    values: list[Any] = [call_within(lambda: 3, 5.0)]
    with pytest.raises(ZeroDivisionError):
        call_within(lambda: 1 / 0, 5.0)
    assert values == [3]
