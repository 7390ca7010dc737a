"""Score a trained model on text, or on the tasks of EleutherAI's evaluation harness."""

import json as json_format
import sys
from pathlib import Path
from typing import Any

from moe_mamba.command_line import run_command
from moe_mamba.config_types import LocalRank, NonNegative, OptionalPositive, Positive
from moe_mamba.data.loader import evaluation_batches
from moe_mamba.data.prepare import prepare_corpus
from moe_mamba.errors import UserError
from moe_mamba.evaluation.scores import evaluate
from moe_mamba.parallel.distributed import first_then_all, limit_collectives, on_all, on_first
from moe_mamba.run.inference import joined, layout_from, restore_in_layout
from moe_mamba.run.restore import Restored
from moe_mamba.train.report import figures, validation_line


def main(
    checkpoint: str,
    input: str | None = None,
    tasks: str | None = None,
    sequence_length: OptionalPositive = None,
    batch: Positive = 8,
    max_documents: OptionalPositive = None,
    text_key: str | None = None,
    num_fewshot: NonNegative | None = None,
    limit: OptionalPositive = None,
    output: str | None = None,
    json: bool = False,
    local_rank: LocalRank = None,
    **overrides: Any,
) -> None:
    """Score a model on shards or documents (--input), or on tasks of EleutherAI's harness (--tasks).

    Text gives loss (nats/token), perplexity, bits per byte and accuracy; a synthetic task,
    such as --input synthetic:induction_heads, the same of its answers; tasks give the harness's own table.

    Args:
        checkpoint: a run's folder (its newest checkpoint is used) or one of its checkpoints/step-... folders.
        input: shards, a text file, or any other source that `data.train` takes (see launch/train.py --help).
        tasks: names of the harness's tasks, such as hellaswag,lambada_openai, task files (.yaml), or folders of such,
            written with a /; needs pip install -e '.[evaluation]'.
        sequence_length: tokens per window, and of a task's context the last so many; the run's own where none is given.
        batch: windows or requests at once.
        max_documents: with --input: documents to take of a source of documents.
        text_key: with --input: field that holds a document's text; the run's own where none is given.
        num_fewshot: with --tasks: examples before each question, where a task allows; as each task says if not given.
        limit: with --tasks: questions of each task, for a try.
        output: with --tasks: file for the harness's whole results, as JSON.
        json: print one JSON object instead.
        local_rank: launchers add it; the environment says the same.
        overrides: under a launcher, how its processes share the model: --parallel.tensor=2, --parallel.expert=4,
            --parallel.expert_tensor=true; --parallel.timeout.
    """
    only: dict[str, dict[str, object]] = {
        "--input": {"max_documents": max_documents, "text_key": text_key},
        "--tasks": {"num_fewshot": num_fewshot, "limit": limit, "output": output},
    }
    if (input is None) == (tasks is None):
        raise UserError("give either --input (a text) or --tasks (names of tasks)")
    other = "--tasks" if tasks is None else "--input"
    for flag, value in only[other].items():
        if value is not None:
            raise UserError(f"--{flag} only works with {other}: leave it out")
    layout = layout_from(overrides)
    with joined(local_rank) as world:
        restored = restore_in_layout(checkpoint, layout, world)
        length = sequence_length or restored.config.data.sequence_length
        if tasks is not None:
            _score_tasks(restored, tasks, length, batch, num_fewshot, limit, output, json)
        elif input is not None:
            _score_text(restored, input, length, batch, max_documents, text_key, json)


def _score_text(
    restored: Restored,
    source: str,
    length: int,
    batch: int,
    max_documents: int | None,
    text_key: str | None,
    as_json: bool,
) -> None:
    """Print the loss on shards, documents or a synthetic task."""
    data, tokenizer, world = restored.config.data, restored.tokenizer, restored.topology.world
    key = text_key or data.text_key
    corpus = first_then_all(
        lambda: prepare_corpus(source, tokenizer, data.cache, max_documents, text_key=key, verify=world.is_first)
    )
    if world.is_first:
        rejects = f"{corpus.rejects:,} damaged lines are kept in {corpus.rejects_file}"
        for line in [rejects] * bool(corpus.rejects) + corpus.notes:
            print(line, file=sys.stderr)
    limit_collectives(restored.config.parallel.timeout)
    batches = evaluation_batches(corpus, length, batch, tokenizer.end_of_text, data.reset_at_document)
    scores = evaluate(restored.model, batches, restored.topology)
    assert scores is not None  # nothing stops it
    if not world.is_first:
        return
    if as_json:
        print(json_format.dumps(figures(scores, corpus) | {"tokens": scores.targets}))
        return
    print(f"{restored.path}: {validation_line(source, scores, corpus)}, {scores.targets:,} tokens")


def _score_tasks(
    restored: Restored,
    tasks: str,
    length: int,
    batch: int,
    num_fewshot: int | None,
    limit: int | None,
    output: str | None,
    as_json: bool,
) -> None:
    """Print what the harness finds."""
    names = [task for task in tasks.split(",") if task]
    if not names:
        raise UserError(f"--tasks={tasks} names no task: give at least one, such as hellaswag,lambada_openai")
    on_first(lambda: _check_output(output))
    on_all(_check_harness)
    from lm_eval.utils import handle_non_serializable, make_table

    from moe_mamba.evaluation.harness_ranks import harness_model
    from moe_mamba.evaluation.harness_tasks import load_tasks, run_tasks

    model = harness_model(restored, batch=batch, max_length=length)
    loaded = model.lead(lambda: load_tasks(names))  # on rank 0, as what follows
    limit_collectives(restored.config.parallel.timeout)
    results = model.lead(lambda: run_tasks(model, loaded or [], num_fewshot, limit))
    if results is None:
        return  # rank 0 tells
    results = {"checkpoint": str(restored.path), "sequence_length": length, "limit": limit} | results
    text = json_format.dumps(results, default=handle_non_serializable)
    if output is not None:
        Path(output).write_text(text + "\n", encoding="utf-8")
    if model.truncated:
        print(
            f"{model.truncated:,} of {model.asked:,} requests were longer than {length} tokens and lost their start: "
            "--sequence_length reads more",
            file=sys.stderr,
        )
    if as_json:
        print(text)
        return
    print(f"{restored.path}, contexts of at most {length} tokens{f', the first {limit} questions' if limit else ''}")
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))


def _check_output(output: str | None) -> None:
    if output is not None and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise UserError(f"--output={output} cannot be written: give a file in an existing folder")


def _check_harness() -> None:
    try:
        import moe_mamba.evaluation.harness_ranks  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise UserError(
            "--tasks needs EleutherAI's harness, which is not installed: pip install -e '.[evaluation]'"
        ) from error


if __name__ == "__main__":
    run_command(main)
