"""A trained model as a folder that Transformers loads: weights, config, tokenizer, model card, perhaps its code."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.convert.weight_stream import WeightStream
from moe_mamba.errors import UserError
from moe_mamba.hf import model_card, tokenizer_files
from moe_mamba.hf.formats import NATIVE, OWN, WayOut
from moe_mamba.hf.safetensors_files import write_tensors
from moe_mamba.model.mixers.attention import Attention
from moe_mamba.model.mixers.mamba import Mamba
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.pattern import has, looks_ahead
from moe_mamba.run.atomic import check_output, whole_folder
from moe_mamba.run.metrics import read_metrics
from moe_mamba.run.restore import Trained, open_trained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODE = ("configuration_moe_mamba.py", "modeling_moe_mamba.py")
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95}  # as tools/generate.py; top_k 0: all
CONFIG = "config.json"


def choose_format(asked: str, model: ModelConfig, moe: MoEConfig) -> tuple[WayOut, list[str]]:
    """The format to write, and for each native one that it is not, why not.

    Args:
        asked: ``auto`` (a native class where it is exact, else our own), ``moe_mamba`` or ``native``.
        model: of the checkpoint.
        moe: of the checkpoint.

    Raises:
        UserError: a native class is asked for and none holds the model, or ours does not either.
    """
    refusals = {name: format.refusal(model, moe) for name, format in NATIVE.items()}
    native = next((NATIVE[name] for name, refusal in refusals.items() if refusal is None), None)
    if asked == "native" and native is None:
        raise UserError(
            f"--format native cannot represent this model: {refusals[_nearest(model).name]}; "
            "use --format moe_mamba, which can"
        )
    chosen = OWN if native is None or asked == "moe_mamba" else native
    if chosen is OWN and (refusal := OWN.refusal(model, moe)):
        raise UserError(refusal)
    would_do = "it would do, but --format moe_mamba was asked for" if chosen is OWN else "it would do as well"
    why_not = [f"not {name}: {refusal or would_do}" for name, refusal in refusals.items() if name != chosen.name]
    return chosen, why_not


def _nearest(model: ModelConfig) -> WayOut:
    """The native class that a pattern is likest to."""
    if set(model.pattern) == {Mamba.letter}:
        return NATIVE["mamba"]
    if has(model, Mamba) or model.positions == "none":
        return NATIVE["jamba"]
    if has(model, MoE):
        return NATIVE["mixtral"]
    return NATIVE["mistral" if model.sliding_window else "llama"]


def export(
    run_or_step: str | Path,
    output: str | Path,
    format: str = "auto",
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    scoring_only: bool = False,
    tokenizer: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> WayOut:
    """Write a model's folder; it appears when it is whole, and the weights are never in memory at once.

    Args:
        run_or_step: as for ``open_trained``.
        output: the folder.
        format: see ``choose_format``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None: what the run computed in.
        max_shard_bytes: bytes of a file of weights at most; a larger tensor has a file of its own.
        overwrite: replace a converted model that is there.
        scoring_only: write a model that cannot generate.
        tokenizer: as for ``open_trained``.
        say: is told what is written, and why so.

    Returns:
        The format that was written.

    Raises:
        UserError: there is no such checkpoint, the format does not hold it, it cannot generate, or the output cannot
            be written.
    """
    output = Path(os.path.abspath(output))  # so that it has a name, and a folder beside it
    check_output(output, overwrite, CONFIG, run_or_step)
    trained = open_trained(run_or_step, tokenizer)
    model, moe = trained.config.model, trained.config.moe
    chosen, why_not = choose_format(format, model, moe)
    scores_only = looks_ahead(model, moe)
    if scores_only and not scoring_only:
        raise UserError(
            "moe.router=expert_choice looks ahead at later tokens, so the model cannot generate: "
            "give --scoring_only to export it only for scoring texts"
        )
    dtype = dtype or ("bfloat16" if trained.config.train.precision == "bf16" else "float32")
    code = f", its code beside it ({', '.join(CODE)})" if chosen is OWN else ", without remote code"
    say(f"format    {chosen.name}: {chosen.architecture}{code}")
    for line in why_not:
        say(f"          {line}")
    stream = WeightStream(trained.path, chosen, model, moe, DTYPES[dtype])
    with whole_folder(output, overwrite, CONFIG) as folder:
        files = write_tensors(folder, stream.headers, max_shard_bytes, stream.read)
        weights = sum(file.stat().st_size for file in files)
        pad = tokenizer_files.write(trained.tokenizer, folder, model.vocab_size)
        _write_configs(trained, chosen, folder, dtype, pad, generates=not scores_only)
        if chosen is OWN:
            for name in CODE:
                shutil.copyfile(Path(model_card.__file__).with_name(name), folder / name)
        pads_apart = pad != trained.tokenizer.end_of_text
        _write_card(trained, chosen, folder, dtype, output.name, pads_apart, generates=not scores_only)
    say(f"wrote     {output}: {len(files)} file{'s' * (len(files) > 1)} of weights, {weights / 1e6:,.1f} MB, {dtype}")
    return chosen


def _write_configs(trained: Trained, chosen: WayOut, folder: Path, dtype: str, pad: int, generates: bool) -> None:
    config, end, beginning = trained.config, trained.tokenizer.end_of_text, trained.tokenizer.beginning
    content = chosen.configuration(config.model, config.moe)
    ids: dict[str, int | None] = {"bos_token_id": None if beginning == end else beginning, "eos_token_id": end}
    if chosen is OWN:
        ids["pad_token_id"] = pad
    else:
        # A pad token in a native config takes the gradient off that row of the embedding, which may be end-of-text's.
        ids["pad_token_id"] = None if pad == end else pad
        if has(config.model, Attention):
            longest = max(config.data.sequence_length, content.get("max_position_embeddings", 0))
            content["max_position_embeddings"] = longest
    _write_json(folder / CONFIG, content | ids | {"dtype": dtype})
    if generates:
        _write_json(folder / "generation_config.json", ids | {"pad_token_id": pad} | SAMPLING)


def _write_card(
    trained: Trained, chosen: WayOut, folder: Path, dtype: str, name: str, pads_apart: bool, generates: bool
) -> None:
    run, step, tokenizer = trained.run, trained.description["step"], trained.tokenizer
    is_whole = trained.path.resolve().parent.name == run.checkpoints.name  # else the step's folder stands alone
    plots = sorted(run.plots.glob("*.png")) if is_whole else []
    if plots:
        (folder / "plots").mkdir()
    for plot in plots:
        shutil.copyfile(plot, folder / "plots" / plot.name)
    metrics = read_metrics(run.path) if is_whole and (run.path / "metrics.jsonl").is_file() else []
    facts = model_card.Facts(
        name=name,
        architecture=chosen.architecture,
        remote_code=chosen is OWN,
        dtype=dtype,
        generates=generates,
        step=step,
        tokens=trained.description["tokens"],
        metrics=[line for line in metrics if line["step"] <= step],
        plots=[plot.name for plot in plots],
        tokenizer=type(tokenizer).__name__.removesuffix("Tokenizer"),
        pads_apart=pads_apart,
        beginning=tokenizer_files.beginning_of(folder) if tokenizer.prefix else "",
    )
    (folder / "README.md").write_text(model_card.write(trained.config, facts), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
