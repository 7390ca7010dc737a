"""An exported model, fine-tuned on texts that end, as the model card says."""

from pathlib import Path
from typing import Any

import torch

from moe_mamba.config import Config
from moe_mamba.convert.to_hf import export
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.run.restore import weight_shards
from tests.hf.checkpoints import save_run

TEXTS = ["a tale", "a hat sat", "he sat there"]  # of several lengths: two of three are padded


def exported(folder: Path, tokenizer: Tokenizer, pattern: str = "M-", room: int = 0) -> Path:
    """A new model's folder, as Transformers loads it."""
    size = tokenizer.vocab_size + room
    config = Config(
        model={"pattern": pattern, "repeat": 1, "d_model": 32, "vocab_size": size, "d_state": 8, "d_ff": 48}
    )
    model = LanguageModel(config.model, config.moe)
    initialize(model, 0)
    save_run(folder / "run", config, weight_shards(model), tokenizer)
    export(folder / "run", folder / "out", format="moe_mamba", say=lambda _: None)
    return folder / "out"


@torch.no_grad()
def written(model: Any, tokenizer: Any, start: str) -> tuple[str, bool]:
    """What the model makes of a prompt, and whether it stopped by itself."""
    inputs = tokenizer(start, return_tensors="pt").to(model.device)
    ids = model.eval().generate(**inputs, max_new_tokens=40, do_sample=False)[0].tolist()
    return tokenizer.decode(ids, skip_special_tokens=True), ids[-1] == tokenizer.eos_token_id
