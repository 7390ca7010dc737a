"""Know a model before paying for it."""

import json as json_format
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from moe_mamba.config import Config
from moe_mamba.config_file import load_config, reference
from moe_mamba.config_types import DEVICES, Range, refused
from moe_mamba.errors import UserError
from moe_mamba.installation import command
from moe_mamba.output_file import output as writable
from moe_mamba.output_file import save
from moe_mamba.planning.cluster import PRESETS, Cluster
from moe_mamba.planning.estimate import Estimate, estimate
from moe_mamba.planning.figures import Figures, change
from moe_mamba.planning.load import Load
from moe_mamba.planning.memory import plan, table
from moe_mamba.planning.picture import draw
from moe_mamba.planning.report import command_line, numbers
from moe_mamba.planning.report import table as estimate_table
from moe_mamba.planning.search import Found, found_table, short_layout, worlds_table
from moe_mamba.planning.search import search as searched
from moe_mamba.planning.shards import shards_table
from moe_mamba.preflight.measured import cluster_of


def _numbers(value: object) -> object:
    """Numbers as a command line writes them: 8,64."""
    if isinstance(value, bool):  # the flag without a value
        raise refused("give numbers with commas between them, such as 8,64")
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
    asked = {"worlds": worlds, "tokens": tokens, "price": price, "load": load, "search": search, "picture": picture}
    _check_flags(where, asked | {"gpus": gpus, "json": json, "shards": shards})
    output = writable(json, ".json", "--json") if isinstance(json, str) else None
    image = None if picture is None else writable(picture, PICTURES, "--picture")
    settings = load_config(config, overrides)
    if not settings.has_vocabulary:
        raise UserError("model.vocab_size=null is only known once a run has its tokenizer: give --model.vocab_size=N")
    if shards:
        print(shards_table(settings))
    elif where is None:
        _show(plan(settings, gpus), lambda: table(settings, gpus), output, json is True)
    elif worlds is not None:
        print(worlds_table(settings, where, worlds, tokens, price))
    else:
        assert gpus is not None  # or it was refused
        found, one = _laid_out(settings, where, gpus, load, search, tokens, price)
        best = found.best if found is not None else []
        said = numbers(one) | ({} if found is None else {"layouts": [numbers(other) for other in best[:SHOWN]]})

        def shown_to_people() -> str:
            parts = [] if found is None else [found_table(found, SHOWN)]
            parts.append(estimate_table(one))
            return "\n\n".join(parts + [command_line(one, config, settings, overrides)] * one.fits)

        _show(said, shown_to_people, output, json is True)
        if image is not None:
            drawn = [(short_layout(other), other) for other in best[:PICTURED] or [one]]
            save(image, draw(drawn, image.suffix.removeprefix(".")))


def _check_flags(where: Cluster | None, asked: Mapping[str, Any]) -> None:
    """Refuse flags that nothing would read.

    Raises:
        UserError: names one, and what it needs or excludes.
    """
    given = [name for name, value in asked.items() if value is not None and value is not False]
    if asked["shards"] and (where is not None or {"json", "gpus"} & set(given)):
        raise UserError(
            "--shards prints a table that is the same for any layout: leave out --json, --gpus and --cluster"
        )
    if where is None:
        for name in given:
            if name not in ("gpus", "json", "shards"):
                given_by = f"--cluster=h100 or another of {', '.join(PRESETS)}, or --measured FILE"
                raise UserError(f"--{name} is for a run on a cluster: give {given_by}")
    elif "worlds" in given:
        if {"gpus", "search", "json", "picture", "load"} & set(given):
            raise UserError(
                "--worlds prints a table of searches: leave out --gpus, --search, --load, --json and --picture"
            )
    elif "gpus" not in given:
        raise UserError(f"a run on {where.name} needs to know how many GPUs: give --gpus={where.gpus_per_machine}")


def _laid_out(
    settings: Config,
    where: Cluster,
    gpus: int,
    load: str | None,
    search: bool,
    tokens: int | None,
    price: float | None,
) -> tuple[Found | None, Estimate]:
    """What a search has found, if one is asked for, and the layout to describe."""
    loaded = None if load is None else Load.parse(load)
    if not search:
        return None, estimate(settings, where, gpus, loaded or Load(), tokens, price)
    found = searched(settings, where, gpus, loaded, tokens, price)
    one = found.best[0] if found.best else found.least
    assert one is not None
    return found, one


def _show(said: Mapping[str, Any], to_people: Callable[[], str], output: Path | None, only_json: bool) -> None:
    """Print the numbers as JSON or as people want them, and then write them to a file as well."""
    text = json_format.dumps(said)
    print(text if only_json else to_people(), flush=True)
    if output is not None:
        save(output, text + "\n")


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
