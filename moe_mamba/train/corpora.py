"""The tokenizer and the sources of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_mamba.config import Config
from moe_mamba.data.loader import Loader
from moe_mamba.data.prepare import prepare_corpus, prepare_tokenizer
from moe_mamba.data.shards import Shards
from moe_mamba.data.synthetic import SyntheticLoader, SyntheticTask
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.errors import UserError
from moe_mamba.run.folder import RunFolder

Source = Shards | SyntheticTask


@dataclass(frozen=True)
class Corpora:
    """What a run reads: its tokenizer, its training windows in order, its validation sets by name."""

    tokenizer: Tokenizer
    train: dict[str, Source]
    loader: Loader | SyntheticLoader
    validation: dict[str, Source]

    @property
    def sources(self) -> dict[str, Source]:
        """Every source, training and validation."""
        return self.train | {shards.name: shards for shards in self.validation.values()}

    @property
    def identities(self) -> dict[str, str]:
        """Hash of the tokens of each source that is trained on; the order of windows follows from it."""
        return {source: shards.identity for source, shards in self.train.items()}

    def check_unchanged(self, description: dict[str, Any], folder: RunFolder) -> None:
        """Refuse to go on with other text than the checkpoint was trained on.

        Raises:
            UserError: a source holds other tokens now.
        """
        for source, identity in description["corpora"].items():
            if self.identities.get(source) != identity:
                raise UserError(
                    f"data.train: {source} holds other text than when {folder.path} was begun: "
                    f"bring it back, or start anew with --run.folder={folder.next_free}"
                )


def open_corpora(config: Config, folder: RunFolder, say: Callable[[str], None], *, verify: bool = False) -> Corpora:
    """Train or open the tokenizer, shard the sources that are documents, and open everything.

    The first call does the work and keeps it (tokenizer in the run's folder, shards in `data.cache`); later calls,
    other ranks' among them, find it done. `say` is told what takes long; `verify` compares every checksum.

    Raises:
        UserError: a source, the tokenizer or the shards are missing, damaged or do not fit one another.
    """
    data, model = config.data, config.model
    tokenizer = prepare_tokenizer(
        data.tokenizer, list(data.train_weights), model.vocab_size, folder.tokenizer, data.max_documents
    )

    def open_source(source: str) -> Source:
        return prepare_corpus(source, tokenizer, data.cache, data.max_documents, verify=verify, say=say)

    train = {source: open_source(source) for source in data.train_weights}
    loader = _loader(config, train, tokenizer)
    validation = {name: open_source(source) for name, source in data.validation_sets.items()}
    for task in validation.values():
        if isinstance(task, SyntheticTask):
            task.check_length(task.length or data.sequence_length)
    return Corpora(tokenizer, train, loader, validation)


def _loader(config: Config, train: dict[str, Source], tokenizer: Tokenizer) -> Loader | SyntheticLoader:
    data, seed = config.data, config.run.seed
    tasks = [source for source in train.values() if isinstance(source, SyntheticTask)]
    if not tasks:
        shards = {name: source for name, source in train.items() if isinstance(source, Shards)}
        return Loader(
            shards, data.train_weights, data.sequence_length, seed, data.reset_at_document, tokenizer.end_of_text
        )
    if len(train) > 1:
        raise UserError(f"data.train: {tasks[0].name} is trained on alone: leave the other sources out")
    return SyntheticLoader(tasks[0], data.sequence_length, seed)
