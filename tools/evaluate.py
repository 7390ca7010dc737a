"""Score a trained model on text."""

import json as json_format
import sys

from moe_mamba.command_line import run_command
from moe_mamba.config import Positive
from moe_mamba.data.loader import evaluation_batches
from moe_mamba.data.prepare import prepare_corpus
from moe_mamba.data.shards import bytes_per_token
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.train.evaluate import evaluate
from moe_mamba.train.report import validation_line
from moe_mamba.train.restore import restore


def main(
    checkpoint: str,
    input: str,
    sequence_length: Positive | None = None,
    batch: Positive = 8,
    max_documents: Positive | None = None,
    json: bool = False,
) -> None:
    """Loss (nats a token), perplexity and bits per byte of a model on shards or documents.

    Args:
        checkpoint: a run's folder (its newest checkpoint is used) or one of its checkpoints/step-... folders.
        input: shards, a text file, or any other source that `data.train` takes (see launch/train.py --help).
        sequence_length: tokens a window; the run's own where none is given.
        batch: windows at once.
        max_documents: documents to take of a source of documents.
        json: print one JSON object instead.
    """
    topology = Topology(World(0, 1, 0, 1))
    restored = restore(checkpoint, topology.world.device)
    data, tokenizer = restored.config.data, restored.tokenizer
    shards = prepare_corpus(input, tokenizer, data.cache, max_documents, verify=True)
    if shards.rejects:
        print(f"{shards.rejects:,} damaged lines are kept in {shards.rejects_file}", file=sys.stderr)
    length = sequence_length or data.sequence_length
    batches = evaluation_batches(shards, length, batch, tokenizer.end_of_text, data.reset_at_document)
    scores = evaluate(restored.model, batches, topology)
    assert scores is not None  # nothing stops it
    if json:
        figures = {
            "loss": scores.loss,
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte(bytes_per_token(shards)),
            "tokens": scores.targets,
        }
        print(json_format.dumps(figures))
        return
    print(f"{restored.path}: {validation_line(input, scores, shards)}, {scores.targets:,} tokens")


if __name__ == "__main__":
    run_command(main)
