"""The files that a run's start reads: a small corpus, and a checkpoint of as many ranks as the world has, made here."""

import json
from pathlib import Path

import torch
import xxhash

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.manifest import DESCRIPTION, INDEX, MANIFEST, VERSION, name_of_chunk
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config
from moe_mamba.data.plain_tokenizers import BytesTokenizer
from moe_mamba.data.preprocess import preprocess
from moe_mamba.parallel.topology import World
from moe_mamba.rehearsal.start_parts import Parts
from moe_mamba.rehearsal.start_world import Others
from moe_mamba.run.folder import RunFolder
from moe_mamba.safetensors_header import TensorInfo, make_header
from moe_mamba.train.corpora import open_corpora

CHUNKS = 8  # that each rank has saved in the checkpoint that is made here
COLUMNS = 4  # elements of a chunk
NAMES = tuple(f"weights/{number}" for number in range(CHUNKS))


def with_corpus(config: Config, folder: Path) -> Config:
    """The configuration with a corpus of its own, of shards, and a run's folder, both inside ``folder``."""
    (folder / "run").mkdir()
    text = folder / "text.txt"
    text.write_text("x" * (4 * config.data.sequence_length))
    preprocess(str(text), BytesTokenizer(), folder / "shards", progress=False)
    shards = [str(folder / "shards")]
    data = {"train": shards, "validation": {"validation": shards[0]}, "tokenizer": "bytes", "cache": str(folder)}
    changed = {"data": config.data.model_copy(update=data)}
    return config.model_copy(update=changed | {"run": config.run.model_copy(update={"folder": str(folder / "run")})})


def read_corpora(config: Config, parts: Parts) -> None:
    """Open tokenizer and corpora, as every rank does; rank 0 has kept the tokenizer before.

    Args:
        config: with a corpus.
        parts: gain one.
    """
    folder = RunFolder(config.run.folder)
    open_corpora(config, folder, lambda _: None)
    with parts.part("corpora"):
        kept = open_corpora(config, folder, lambda _: None)
    del kept


def save_as_all(folder: Path, ranks: int) -> Path:
    """A checkpoint to which each rank of a world has written: of each tensor a row.

    Returns:
        The step's folder.
    """
    path = folder / "step-00000001"
    path.mkdir(parents=True)
    shape = (ranks, COLUMNS)
    index = {name: {"dtype": "F32", "shape": shape, "boxes": []} for name in NAMES}
    files = {}
    for rank in range(ranks):
        file, sizes = f"rank-{rank:05d}.safetensors", (1, COLUMNS)
        rows = [TensorInfo(name_of_chunk(name, shape, (rank, 0), sizes), torch.float32, sizes) for name in NAMES]
        header, starts = make_header(rows)
        for name, start in zip(NAMES, starts, strict=False):
            index[name]["boxes"].append({"offsets": (rank, 0), "sizes": sizes, "file": file, "start": start})  # type: ignore[attr-defined]
        files[file] = _write(path / file, header + bytes(starts[-1] - len(header)))
    files[INDEX] = _write(path / INDEX, json.dumps(index).encode())
    files[DESCRIPTION] = _write(path / DESCRIPTION, json.dumps({"step": 1}).encode())
    about = {"format": "moe_mamba checkpoint", "version": VERSION, "finite": True, "files": files}
    _write(path / MANIFEST, json.dumps(about).encode())
    return path


def _write(path: Path, content: bytes) -> dict[str, object]:
    path.write_bytes(content)
    return {"bytes": len(content), "xxh3": xxhash.xxh3_64(content).hexdigest()}


def read_checkpoint(folder: Path, world: World, parts: Parts) -> None:
    """Find a checkpoint on rank 0, which reads it whole, and load this rank's part on every rank.

    Args:
        folder: in which one is made.
        world: the processes; a process group is joined.
        parts: gain two on rank 0, else one.
    """
    path = save_as_all(folder, world.size)
    if world.is_first:
        with parts.part("checkpoint's check"):
            store.newest(folder)
    shape = (world.size, COLUMNS)
    shards = [Shard(name, shape, (world.rank, 0), torch.ones(1, COLUMNS)) for name in NAMES]
    with Others(parts, []).answering(), parts.part("checkpoint"):
        store.load(path, shards)
    assert not any(shard.tensor.any() for shard in shards)
