"""What a rank sees of the run's data: names, sizes, times and manifests, without reading a token."""

import hashlib
from pathlib import Path

from moe_mamba.config import DataConfig
from moe_mamba.data.corpus import Corpus
from moe_mamba.data.manifest import MANIFEST, checksum, load_manifest
from moe_mamba.data.shards import is_shards
from moe_mamba.data.synthetic import is_synthetic
from moe_mamba.errors import UserError
from moe_mamba.preflight.report import SourceFacts


def source_facts(data: DataConfig) -> list[SourceFacts]:
    """What this rank sees of every source, training and validation."""
    return [_facts(source) for source in dict.fromkeys([*data.train_weights, *data.validation_sets.values()])]


def _facts(source: str) -> SourceFacts:
    if is_synthetic(source):
        return SourceFacts(source=source)
    try:
        if is_shards(source):
            return _facts_of_files(source, *_shard_files(Path(source)), is_documents=False)
        files = Corpus(source).files
        # What has no size is no file: the corpus inside CPython, or a data set of the hub.
        paths = [Path(file.name) for file in files if file.size or Path(file.name).is_file()]
        return _facts_of_files(source, paths, "", is_documents=True)
    except (UserError, OSError) as error:
        return SourceFacts(source=source, fault=str(error))


def _shard_files(path: Path) -> tuple[list[Path], str]:
    """The files of shards, and the hash of their manifest."""
    manifest = load_manifest(path)
    if manifest is None:
        prefix = str(path).removesuffix(".bin").removesuffix(".idx")
        return [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")], ""
    return [path / name for part in manifest.parts for name in part.checksums], checksum(path / MANIFEST)


def _facts_of_files(source: str, paths: list[Path], manifest: str, *, is_documents: bool) -> SourceFacts:
    states = [path.stat() for path in paths]
    content = repr([manifest, *((path.name, state.st_size) for path, state in zip(paths, states, strict=True))])
    return SourceFacts(
        source=source,
        files=len(paths),
        size=sum(state.st_size for state in states),
        content=_digest(content),
        times=_digest(repr([state.st_mtime_ns for state in states])),
        is_documents=is_documents,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
