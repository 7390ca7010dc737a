"""Fine-tunes with Transformers' Trainer, also under ``accelerate launch``: FOLDER NAME [KEY=JSON ...].

FOLDER has a model, and keys are the Trainer's arguments. Weights, losses and the number of processes
go into FOLDER/NAME.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from moe_mamba.hf.modeling_moe_mamba import MoEMambaForCausalLM
from tests.hf.ecosystem import logged, settings


def rows() -> list[dict[str, list[int]]]:
    """Eight texts of one length, with more labels in some than in others."""
    return [
        {"input_ids": [(3 * n + 5 * place) % 29 + 2 for place in range(12)], "labels": _labels(n)} for n in range(8)
    ]


def _labels(n: int) -> list[int]:
    return [-100 if place < n else (3 * n + 5 * place) % 29 + 2 for place in range(12)]


def main(folder: Path, name: str, keys: dict[str, Any]) -> None:
    """Take the steps, over the texts in order."""
    output = folder / name
    arguments = transformers.TrainingArguments(
        **settings(output, optim="sgd", max_grad_norm=0.0, train_sampling_strategy="sequential", **keys)
    )
    model = MoEMambaForCausalLM.from_pretrained(folder)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows())
    trainer.train()
    if trainer.is_world_process_zero():
        output.mkdir(exist_ok=True)
        torch.save(model.state_dict(), output / "weights.pt")
        result = {"losses": logged(trainer, "loss"), "processes": trainer.accelerator.num_processes}
        (output / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    given = (key.split("=", 1) for key in sys.argv[3:])
    main(Path(sys.argv[1]), sys.argv[2], {key: json.loads(value) for key, value in given})
