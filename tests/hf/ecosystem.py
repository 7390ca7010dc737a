"""What the long tests of libraries on top of Transformers share: a tokenizer, settings, sums written down by hand."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LETTERS = [chr(ord("a") + place) for place in range(26)]
WORDS = ["<end>", "<pad>", *LETTERS]


def letters_tokenizer() -> Any:
    """A token for each letter, with spaces between them, made here: nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<end>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<end>", pad_token="<pad>")


def alphabet(first: int, letters: int) -> str:
    """So many letters in order from one of them, which a model learns in a few steps."""
    return " ".join(LETTERS[(first + place) % len(LETTERS)] for place in range(letters))


def settings(folder: Path, **keys: Any) -> dict[str, Any]:
    """Arguments of every trainer here: on a CPU, in fp32, each step logged, nothing written."""
    return {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
        **keys,
    }


def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """Of each token of one text after its first, (length - 1,), from the logits of the text by itself."""
    logits = model(tokens[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


def logged(trainer: Any, name: str) -> list[float]:
    """What a trainer logged under this name, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
def unchanged(parameters: dict[str, Tensor], model: Any) -> bool:
    """Whether a model's parameters of these names are what they were, to the bit."""
    return all(torch.equal(model.get_parameter(name), tensor) for name, tensor in parameters.items())
