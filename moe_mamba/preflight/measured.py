"""A cluster from what a preflight measured of it: rates in the place of data sheets, curves in the place of shares."""

from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from pydantic import ValidationError

from moe_mamba.errors import UserError, shown
from moe_mamba.planning.cluster import Cluster, Curve, Link, Reached
from moe_mamba.planning.devices import peak_flops
from moe_mamba.preflight.report import Measures, Report

SCAN_OPERATIONS = 27  # of a state, forward and backward, as models count them
SELF = Link(1e12, 1e-7)  # of a rank that talks to none
MOST_BYTES = 64 << 20  # of a report that is believed


def cluster_of(path: Path, preset: Cluster | None = None) -> Cluster:
    """The cluster that a preflight was run on.

    Args:
        path: its preflight.json.
        preset: has what no preflight measures, such as the memory of a machine beside its GPUs; None: nothing is known.

    Raises:
        UserError: the file cannot be read or is no report, or has no measures.
    """
    report = _read(path)
    measures = report.measures
    if measures is None:
        raise UserError(f"{path} has findings and no measures: correct what it refuses, and run the preflight again")
    return _cluster(report, measures, preset, report.ranks[0].device)


def _read(path: Path) -> Report:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is too large for a preflight's report: give a preflight.json")
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): run launch/preflight.py first") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path} is no preflight's report ({shown(where)}: {first['msg']}): run the preflight anew"
        ) from None


def _cluster(report: Report, measures: Measures, preset: Cluster | None, device: str) -> Cluster:
    curves = {curve.what: Curve(tuple(curve.points)) for curve in measures.curves}
    if "product" not in curves or "pass" not in curves:
        raise UserError("the preflight has no curves of speed over sizes: it is of an older version: run it anew")
    compute, products = measures.compute, curves["product"]
    scans = [one.scan_tokens for one in compute if one.scan_tokens is not None]
    memory_rate, fastest = median(one.copy_bytes for one in compute), products.most
    plain = fastest
    if scans and measures.sizes.scan:
        plain = median(scans) * measures.sizes.scan[2] * measures.sizes.scan[3] * SCAN_OPERATIONS
    memory = min(one.memory_bytes or 0 for one in compute)
    cluster = preset or Cluster(
        "", 1, memory, fastest, fastest, plain, memory_rate, memory_rate, memory, SELF, SELF, 1e9
    )
    collectives: dict[str, Curve] = {
        what: curve for what, curve in curves.items() if what not in ("product", "pass", "kernel", "attention")
    }
    is_half = measures.sizes.dtype == "bfloat16"
    return replace(
        cluster,
        name=f"measured {report.made}",
        gpus_per_machine=max(len(ranks) for ranks in report.machines.values()),
        memory=memory or cluster.memory,
        bf16=peak_flops(device, torch.bfloat16) or (fastest if is_half else cluster.bf16),
        fp32=peak_flops(device, torch.float32) or (cluster.fp32 if is_half else fastest),
        plain=plain,
        memory_rate=memory_rate,
        inside=_link(measures, is_inside=True) or cluster.inside,
        between=_link(measures, is_inside=False) or cluster.between,
        disk_rate=min((one.write_bytes for one in measures.storage), default=cluster.disk_rate),
        operator=curves["pass"].points[0][1],
        reached=Reached(1, 1, 1, 1, 1, 1, cluster.reached.beside),
        is_gpu=device != "cpu",
        products=products,
        passes=curves["pass"],
        kernels=curves.get("kernel", curves["pass"]),
        attention=curves["attention"].points[0][1] if "attention" in curves else fastest,
        collectives=collectives,
        measured_ranks=report.world_size,
    )


def _link(measures: Measures, *, is_inside: bool) -> Link | None:
    """The median link inside machines or between them; None: none was measured."""
    links = [link for link in measures.links if (link.machines[0] == link.machines[1]) == is_inside]
    if not links:
        return None
    return Link(median(link.bytes_per_second for link in links), median(link.latency_seconds for link in links))
