"""Know a model before paying for it."""

import json as json_format
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from moe_mamba.atomic_file import write_atomically
from moe_mamba.config_file import load_config, reference
from moe_mamba.config_types import DEVICES, Range
from moe_mamba.errors import UserError, shown
from moe_mamba.installation import command
from moe_mamba.planning.cluster import PRESETS, Cluster
from moe_mamba.planning.estimate import estimate
from moe_mamba.planning.figures import Figures, change
from moe_mamba.planning.load import Load
from moe_mamba.planning.memory import plan, table
from moe_mamba.planning.picture import draw
from moe_mamba.planning.report import command_line, numbers
from moe_mamba.planning.report import table as estimate_table
from moe_mamba.planning.search import found_table, short_layout, worlds_table
from moe_mamba.planning.search import search as searched
from moe_mamba.planning.shards import shards_table
from moe_mamba.preflight.measured import cluster_of


def _numbers(value: object) -> object:
    """Numbers as a command line writes them: 8,64."""
    return value.split(",") if isinstance(value, str) else value


USAGE = """Say what a model is and what it takes, before anything starts.

  {command} [--config FILE] [--gpus N] [--json] [--shards] [--section.key=value ...]
  {command} --config FILE --gpus N --cluster {presets} [--measured FILE] [--tokens N] [--price P]
      [--load even|skewed:F|run:FOLDER] [--search] [--json [FILE]] [--picture FILE] [--section.key=value ...]
  {command} --config FILE --worlds 8,64,1024 --cluster {presets}

With a cluster: memory of the fullest GPU by kind, what each collective moves, a step's time by part, days and money.
--search lays the model out in every way that fits, and prints the best. --measured takes the figures of a cluster from
a preflight.json. A figure of a cluster by itself, in the units of its name: {figures}.

Every key, its default and its meaning:
"""
Worlds = Annotated[list[Annotated[int, Range(1, DEVICES)]], BeforeValidator(_numbers)]
SHOWN, PICTURED = 10, 6  # layouts of a search
PICTURES = (".png", ".svg", ".pdf")


def main(
    *,
    config: str | None = None,
    gpus: Annotated[int | None, Range(1, DEVICES)] = None,
    cluster: str | None = None,
    measured: str | None = None,
    tokens: Annotated[int | None, Range(1, 10**16)] = None,
    price: Annotated[float | None, Range(0, 1e6)] = None,
    load: str | None = None,
    search: bool = False,
    worlds: Worlds | None = None,
    json: bool | str = False,
    picture: str | None = None,
    shards: bool = False,
    help: bool = False,
    **overrides: Any,
) -> None:
    """Print the parameters of a configuration, the work that a token of training takes, and what each device holds.

    Args:
        config: YAML file; every key at its default where none is given.
        gpus: devices to lay it over; as few as parallel.tensor and parallel.expert need where none are given.
        cluster: a100-80, h100, h200 or b200: say time, traffic and money, too.
        measured: preflight.json of a cluster, in the place of --cluster or of some of its figures.
        tokens: budget of the run; the configuration's where none is given.
        price: money per GPU hour.
        load: of the experts: even, skewed:1.5 (the fullest has so many times the mean), or run:FOLDER.
        search: rank the layouts that fit instead of taking the configuration's.
        worlds: numbers of GPUs, as 8,64,1024: the best layout on each, and what limits there.
        json: print one JSON object instead of a table, or write it to this file beside the table.
        picture: draw memory and time into this file.
        shards: print how each parameter is sharded, and which stay fp32, instead.
        help: print every key with its default and meaning.
        overrides: any key of the configuration, as --section.key=value, or figure of it, as --cluster.name=value.
    """
    if help:
        figures = ", ".join(f"--cluster.{name}" for name in Figures.model_fields)
        print(USAGE.format(command=command("plan"), presets="|".join(PRESETS), figures=figures) + f"\n{reference()}")
        return
    given = {key.removeprefix("cluster."): overrides.pop(key) for key in list(overrides) if key.startswith("cluster.")}
    where = _cluster(cluster, measured, given)
    if shards and (json or gpus is not None or where is not None):
        raise UserError(
            "--shards prints a table that is the same for any layout: leave out --json, --gpus and --cluster"
        )
    asked = {
        "--worlds": worlds,
        "--tokens": tokens,
        "--price": price,
        "--load": load,
        "--search": search,
        "--picture": picture,
    }
    if where is None and (needless := [flag for flag, value in asked.items() if value not in (None, False)]):
        raise UserError(
            f"{needless[0]} is for a run on a cluster: give --cluster=h100 or another of {', '.join(PRESETS)}"
        )
    output = _output(json, ".json", "--json") if isinstance(json, str) else None
    image = None if picture is None else _output(picture, PICTURES, "--picture")
    settings = load_config(config, overrides)
    if not settings.has_vocabulary:
        raise UserError("model.vocab_size=null is only known once a run has its tokenizer: give --model.vocab_size=N")
    if shards:
        print(shards_table(settings))
        return
    if where is None:
        counts = plan(settings, gpus)
        if output is not None:
            write_atomically(output, json_format.dumps(counts) + "\n")
        print(json_format.dumps(counts) if json is True else table(settings, gpus))
        return
    if worlds is not None:
        if gpus is not None or search or json or picture or load:
            raise UserError(
                "--worlds prints a table of searches: leave out --gpus, --search, --load, --json and --picture"
            )
        print(worlds_table(settings, where, worlds, tokens, price))
        return
    if gpus is None:
        raise UserError(f"a run on {where.name} needs to know how many GPUs: give --gpus={where.gpus_per_machine}")
    found = None
    loaded = None if load is None else Load.parse(load)
    if search:
        found = searched(settings, where, gpus, loaded, tokens, price)
        one = found.best[0] if found.best else found.least
    else:
        one = estimate(settings, where, gpus, loaded or Load.parse("even"), tokens, price)
    assert one is not None
    said = numbers(one) | ({} if found is None else {"layouts": [numbers(other) for other in found.best[:SHOWN]]})
    if output is not None:
        write_atomically(output, json_format.dumps(said) + "\n")
    if image is not None:
        chosen = found.best[:PICTURED] if found is not None and found.best else [one]
        draw([(short_layout(other), other) for other in chosen], image)
    if json is True:
        print(json_format.dumps(said))
        return
    if found is not None:
        print(found_table(found, SHOWN) + "\n")
    print(estimate_table(one))
    if one.fits:
        print(f"\n{command_line(one, config)}")


def _cluster(name: str | None, measured: str | None, figures: dict[str, Any]) -> Cluster | None:
    """The cluster that flags ask for; None: they ask for none."""
    if name is None and measured is None:
        if figures:
            raise UserError(
                f"--cluster.{next(iter(figures))} changes a cluster: give --cluster=h100, or --measured FILE"
            )
        return None
    preset = None if name is None else Cluster.of(name)
    return change(preset if measured is None else cluster_of(Path(measured), preset), figures)  # type: ignore[arg-type]


def _output(name: str, endings: str | tuple[str, ...], flag: str) -> Path:
    """A file that can be written, by its name."""
    path = Path(name).expanduser()
    if not name.endswith(endings):
        wanted = endings if isinstance(endings, str) else ", ".join(endings)
        raise UserError(f"{flag}={shown(name)[1:-1]}: give a file that ends in {wanted}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag}={shown(name)[1:-1]}: there is no folder {shown(str(path.parent))}: make it first")
    return path
