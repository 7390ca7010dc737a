"""The tokenizer and the sources of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_mamba.config import Config
from moe_mamba.data.loader import Loader
from moe_mamba.data.prepare import prepare_corpus, prepare_tokenizer
from moe_mamba.data.source import Source
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.data.verification import ContentCheck
from moe_mamba.errors import UserError
from moe_mamba.run.folder import RunFolder


@dataclass(frozen=True)
class Corpora:
    """What a run reads: its tokenizer, its training windows in order, its validation sets by name."""

    tokenizer: Tokenizer
    train: dict[str, Source]
    loader: Loader
    validation: dict[str, Source]

    @property
    def sources(self) -> dict[str, Source]:
        """Every source, training and validation."""
        return self.train | {source.name: source for source in self.validation.values()}

    @property
    def identities(self) -> dict[str, str]:
        """Hash of the tokens of each source that is trained on; the order of windows follows from it."""
        return {name: source.identity for name, source in self.train.items()}

    @property
    def content_checks(self) -> list[ContentCheck]:
        """What is found out by reading the whole corpus, file by file, in the same order on every rank."""
        return [check for source in self.sources.values() for check in source.content_checks(self.tokenizer)]

    @property
    def notes(self) -> list[str]:
        """What a user should know of the sources, a line each."""
        return [note for source in self.sources.values() for note in source.notes]

    def check_unchanged(self, description: dict[str, Any], folder: RunFolder) -> None:
        """Refuse to go on with other text than the checkpoint was trained on.

        Raises:
            UserError: a source holds other tokens now.
        """
        for source, identity in description["corpora"].items():
            if self.identities.get(source) != identity:
                raise UserError(
                    f"data.train: {source} holds different text than when {folder.path} was started: "
                    f"restore it, or start over with --run.folder={folder.next_free}"
                )


def open_corpora(config: Config, folder: RunFolder, say: Callable[[str], None]) -> Corpora:
    """Train or open the tokenizer, shard the sources that are documents, and open everything.

    The first call does the work and keeps it (tokenizer in the run's folder, shards in `data.cache`); later calls,
    other ranks' among them, find it done. `say` is told what takes long. Of shards only names and sizes are looked at:
    `train/verification.py` reads them whole.

    Raises:
        UserError: a source, the tokenizer or the shards are missing, damaged or do not fit one another.
    """
    data, model = config.data, config.model
    tokenizer = prepare_tokenizer(
        data.tokenizer,
        list(data.train_weights),
        model.vocab_size,
        folder.tokenizer,
        data.max_documents,
        text_key=data.text_key,
    )

    def open_source(source: str) -> Source:
        return prepare_corpus(source, tokenizer, data.cache, data.max_documents, text_key=data.text_key, say=say)

    train = {source: open_source(source) for source in data.train_weights}
    loader = Loader(
        train,
        data.train_weights,
        data.sequence_length,
        config.run.seed,
        data.reset_at_document,
        tokenizer.end_of_text,
    )
    validation = {name: open_source(source) for name, source in data.validation_sets.items()}
    limit = config.train.validation_batches
    read = limit * config.train.global_batch * data.sequence_length if limit else None
    for source in validation.values():
        source.check_validation(data.sequence_length)
        if data.reset_at_document:
            source.check_targets(tokenizer.end_of_text, read)
    return Corpora(tokenizer, train, loader, validation)
