"""What exported models must do under any Transformers, run as a script under the one that is imported first.

``python -m tests.hf.class_under_version EXPORTED SCRATCH`` takes the folders that the test of this exported, an
empty folder to write to, and prints a JSON object: the version, and for each check null or why it failed. The trainer's
own model, stepped without any state by loops of this file, says what is right.
"""

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from tests.hf.conftest import SHARED, make_pair, their_name

Check = tuple[str, Callable[[], None]]
FAMILIES: dict[str, dict[str, Any]] = {
    "M": {},
    "ME": {"moe": {"router": "top_k", "top_k": 2, "renormalize": True}},
    "ME*-": {"moe": {"router": "top_k", "top_k": 2, "balance": "bias"}, "mamba_norms": True},
    "*E": {"tied_head": True},
    "(ME)M": {"moe": {"inner": SHARED | {"top_k": 2, "every": 2, "balance": "none"}}},
}
TOKENS = torch.arange(2, 20).view(2, 9)
STEPS = 6
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}


def greedy(ours: Any, tokens: Tensor, steps: int = STEPS) -> Tensor:
    """The most probable token after each text (batch, length), ``steps`` times; the texts with them."""
    for _ in range(steps):
        tokens = torch.cat((tokens, ours(tokens).logits[:, -1:].argmax(-1)), 1)
    return tokens


def log_probabilities(ours: Any, tokens: Tensor) -> Tensor:
    """Of the token after each text (batch, length), (batch, vocab)."""
    return ours(tokens).logits[:, -1].log_softmax(-1)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    """Fail unless both are equal but for rounding."""
    torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance)


def returned_cache(output: Any) -> Any:
    """What a pass or ``generate`` kept, by the name that this version gives it."""
    name = "cache" if "cache" in output else "past_key_values"
    return output[name]


def check_logits(ours: Any, theirs: Any, folder: Path) -> None:
    close(theirs(TOKENS).logits, ours(TOKENS).logits)
    close(theirs(TOKENS, use_cache=False).logits, ours(TOKENS).logits)


def check_greedy(ours: Any, theirs: Any, folder: Path) -> None:
    expected = greedy(ours, TOKENS)
    for use_cache in (True, False):
        assert theirs.generate(TOKENS, **GREEDY, use_cache=use_cache).tolist() == expected.tolist(), use_cache
    assert theirs.generate(TOKENS, **GREEDY).tolist() == expected.tolist(), "by default"


def check_beams(ours: Any, theirs: Any, folder: Path) -> None:
    width = 3
    found = theirs.generate(TOKENS, **GREEDY, num_beams=width, num_return_sequences=width)
    for row, prompt in enumerate(TOKENS):
        texts, totals = prompt[None], torch.zeros(1)
        for _ in range(STEPS):
            candidates = totals[:, None] + log_probabilities(ours, texts)
            totals, places = candidates.flatten().topk(width)
            beams, words = places // candidates.shape[1], places % candidates.shape[1]
            texts = torch.cat((texts[beams], words[:, None]), 1)
        assert found[row * width : (row + 1) * width].tolist() == texts.tolist()


def check_sampling(ours: Any, theirs: Any, folder: Path) -> None:
    torch.manual_seed(3)
    found = theirs.generate(TOKENS, **{**GREEDY, "do_sample": True}, top_k=0)
    torch.manual_seed(3)
    texts = TOKENS
    for _ in range(STEPS):
        texts = torch.cat((texts, log_probabilities(ours, texts).exp().multinomial(1)), 1)
    assert found.tolist() == texts.tolist()
    assert texts.tolist() != greedy(ours, TOKENS).tolist()


def check_left_padding(ours: Any, theirs: Any, folder: Path) -> None:
    lengths = (1, 4, 9)
    batch, mask = torch.ones(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, length in enumerate(lengths):
        batch[row, 9 - length :], mask[row, 9 - length :] = TOKENS[0, :length], 1
    for use_cache in (True, False):
        texts = theirs.generate(batch, attention_mask=mask, **GREEDY, use_cache=use_cache)
        for row, length in enumerate(lengths):
            expected = greedy(ours, TOKENS[:1, :length])
            assert texts[row : row + 1, 9 - length :].tolist() == expected.tolist(), (use_cache, length)


def check_forward_from_a_cache(ours: Any, theirs: Any, folder: Path) -> None:
    expected = ours(TOKENS).logits
    for name in ("past_key_values", "cache"):
        for sizes in ([5, 4], [1] * 9):
            cache, parts = None, []
            for part in TOKENS.split(sizes, 1):
                output = theirs(part, **{name: cache}, use_cache=True)
                cache = returned_cache(output)
                parts.append(output.logits)
            close(torch.cat(parts, 1), expected)


def check_generate_from_a_cache(ours: Any, theirs: Any, folder: Path) -> None:
    first = theirs.generate(TOKENS[:, :4], **GREEDY, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, TOKENS[:, 4:]), 1)
    cache = returned_cache(first)
    assert cache.get_seq_length() == 4 + STEPS - 1
    read: list[int] = []
    handle = theirs.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    # A mask says that no token of the text is padding.
    texts = theirs.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **GREEDY)
    handle.remove()
    assert read[0] == 1 + 5, "what the cache has seen is not read again"
    assert texts.tolist() == greedy(ours, longer).tolist()


def check_saved_and_loaded(ours: Any, theirs: Any, folder: Path) -> None:
    theirs.save_pretrained(folder)
    loaded, report = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    states = theirs.state_dict(), loaded.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == ours.config.tied_head
    assert torch.equal(loaded(TOKENS).logits, theirs(TOKENS).logits)


def check_loaded_by_its_own_code(ours: Any, theirs: Any, folder: Path) -> None:
    theirs.save_pretrained(folder)
    with package_hidden():
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules")
    assert config.moe == theirs.config.moe and config.pattern == theirs.config.pattern
    close(loaded(TOKENS).logits, ours(TOKENS).logits)
    assert loaded.generate(TOKENS, **GREEDY).tolist() == greedy(ours, TOKENS).tolist()


@contextmanager
def package_hidden() -> Iterator[None]:
    """As where this package is not installed: the folder's code finds no kernels."""
    hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "moe_mamba"}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: an import of it fails
    try:
        yield
    finally:
        sys.modules.update(hidden)


def check_bfloat16(ours: Any, theirs: Any, folder: Path) -> None:
    theirs.save_pretrained(folder)
    loaded = type(theirs).from_pretrained(folder, dtype=torch.bfloat16)
    wide = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    assert wide == set(map(their_name, ours.fp32_parameter_names()))
    close(loaded(TOKENS).logits, ours(TOKENS).logits, 0.1)
    assert loaded.generate(TOKENS, **GREEDY).shape == (2, 9 + STEPS)


def check_loss_and_gradients(ours: Any, theirs: Any, folder: Path) -> None:
    with torch.enable_grad():
        expected = functional.cross_entropy(ours.train()(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        expected.backward()
        theirs.train()
        for recompute in (False, True):
            theirs.zero_grad()
            if recompute:
                theirs.gradient_checkpointing_enable()
            loss = theirs(TOKENS, labels=TOKENS).loss
            loss.backward()
            close(loss, expected)
            for name, parameter in ours.named_parameters():
                close(theirs.get_parameter(their_name(name)).grad, parameter.grad)


def check_experts_implementations(ours: Any, theirs: Any, folder: Path) -> None:
    if "E" not in ours.config.pattern:
        return
    theirs.save_pretrained(folder)
    ways = ("batched_mm", "grouped_mm") if hasattr(theirs, "set_experts_implementation") else ()  # not in 4
    for way in ways:
        loaded = type(theirs).from_pretrained(folder, experts_implementation=way)
        assert loaded.config._experts_implementation == way
        close(loaded(TOKENS).logits, ours(TOKENS).logits)
        assert loaded.generate(TOKENS, **GREEDY).tolist() == greedy(ours, TOKENS).tolist()
    assert getattr(theirs.config, "_experts_implementation", "eager") == "eager", "by default"


def check_a_new_model(ours: Any, theirs: Any, folder: Path) -> None:
    torch.manual_seed(3)
    model = type(theirs)(theirs.config)
    expected = LanguageModel(ours.config, ours.moe_config)
    initialize(expected, 0)
    for name, tensor in expected.state_dict().items():
        found = model.state_dict()[their_name(name)]
        spread = tensor.std(correction=0)  # 0 for a single number
        assert abs(found.mean() - tensor.mean()) <= 0.35 * spread + 1e-6, name
        assert abs(found.std(correction=0) - spread) <= 0.35 * spread, name
    model.resize_token_embeddings(40)
    assert model(TOKENS).logits.shape == (2, 9, 40)


def of_class(scratch: Path) -> Iterator[Check]:
    """The checks of the class, for every family."""
    checks = {name.removeprefix("check_"): f for name, f in globals().items() if name.startswith("check_")}
    for pattern, keys in FAMILIES.items():
        for name, check in checks.items():
            yield f"{pattern}: {name}", partial(_check_pair, check, pattern, keys, scratch)


def _check_pair(check: Callable[..., None], pattern: str, keys: dict[str, Any], scratch: Path) -> None:
    check(*make_pair(pattern, **keys), Path(tempfile.mkdtemp(dir=scratch)))


def of_exported(folder: Path) -> Iterator[Check]:
    """The checks of an exported model's folder."""
    expected = json.loads((folder / "expected.json").read_text())
    for check in (exported_loads, exported_tokenizes, exported_writes):
        yield f"{folder.name}: {check.__name__}", partial(check, folder, expected)


def exported_loads(folder: Path, expected: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments(folder)).eval()
    tokens = torch.tensor(expected["tokens"])
    close(model(tokens).logits, torch.tensor(expected["logits"]))
    assert model.generate(tokens, **GREEDY).tolist() == expected["greedy"]


def exported_tokenizes(folder: Path, expected: dict[str, Any]) -> None:
    for keys in ({}, {"trust_remote_code": True}):  # without, too: a tokenizer needs no code
        tokenizer = AutoTokenizer.from_pretrained(folder, **keys)
        ids = tokenizer(expected["text"])["input_ids"]
        assert ids == expected["ids"]
        assert tokenizer.decode(ids) == expected["text"]


def exported_writes(folder: Path, expected: dict[str, Any]) -> None:
    write = transformers.pipeline(
        "text-generation", str(folder), trust_remote_code=True, model_kwargs=arguments(folder)
    )
    keys = {"max_new_tokens": STEPS, "do_sample": False, "return_tensors": True}
    found = list(write("ab", **keys)[0]["generated_token_ids"])
    assert found == expected["pipeline"][: len(found)]
    assert len(found) == len(expected["pipeline"]) or found[-1] == write.tokenizer.eos_token_id


def arguments(folder: Path) -> dict[str, Any]:
    """What loading needs beside the folder: until 5.10 Jamba's default is a kernel that runs only on GPUs."""
    old_jamba = folder.name == "jamba" and Version(transformers.__version__) < Version("5.10")
    return {"use_mamba_kernels": False} if old_jamba else {}


def requirements_are_met() -> None:
    """The folder's packages and the environment's fit together, else nothing here tells anything."""
    for name in ("transformers", "huggingface_hub", "tokenizers"):
        for line in requires(name) or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                found = version(wanted.name)
                assert wanted.specifier.contains(found, prereleases=True), f"{name} wants {wanted}, found {found}"


def attempt(action: Callable[[], None]) -> str | None:
    """Why it failed, in one line; None where it did not."""
    try:
        with torch.no_grad():
            action()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300]
        return f"{type(error).__name__}: {said} ({Path(place.filename).name}:{place.lineno})"
    return None


def main(exported: Path, scratch: Path) -> None:
    """Run every check, and print what failed."""
    checks = [("requirements are met", requirements_are_met), *of_class(scratch)]
    checks += [check for folder in sorted(exported.iterdir()) for check in of_exported(folder)]
    results = {name: attempt(action) for name, action in checks}
    print("\n" + json.dumps({"transformers": transformers.__version__, "checks": results}))  # behind any question


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
