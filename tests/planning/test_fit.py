from dataclasses import replace

import pytest

from moe_mamba.config_file import load_config
from moe_mamba.errors import UserError
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning import fit
from moe_mamba.planning.fit import check_fit
from moe_mamba.planning.load import Load
from moe_mamba.planning.memory import layout, memory_of


def plan(**keys: object) -> RunPlan:
    config = load_config(None, {key.replace("__", "."): value for key, value in keys.items()})
    return RunPlan.of(config, layout(config, 1))


def test_what_fits_is_let_through_and_what_is_a_byte_too_large_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    run = plan(model__d_model=32, model__repeat=1)
    memory = memory_of(run, 1, Load(), is_gpu=False)
    state = memory.state
    assert check_fit(run) is None
    monkeypatch.setattr(fit, "host_bytes", lambda: state - 1)
    with pytest.raises(UserError, match=r"weights, gradients and optimizer take .* parallel\.tensor"):
        check_fit(run)
    monkeypatch.setattr(fit, "host_bytes", lambda: state + memory.activations // 2 - memory.gradients)
    with pytest.raises(UserError, match=r"a micro-batch of 1 x 256 tokens .* data\.sequence_length"):
        check_fit(run)
    monkeypatch.setattr(fit, "host_bytes", lambda: memory.total - 1)
    warning = check_fit(run)
    assert warning is not None
    assert "may not fit" in warning
    assert all(f"{kind} " in warning for kind in ("weights", "gradients", "optimizer", "activations", "communication"))
    monkeypatch.setattr(fit, "host_bytes", lambda: memory.total)
    assert check_fit(run) is None


def test_processes_of_a_machine_share_its_memory() -> None:
    run = plan(model__d_model=32, model__repeat=1)
    topology = replace(run.topology, world=replace(run.topology.world, local_size=10**9))
    with pytest.raises(UserError, match="take"):
        check_fit(replace(run, topology=topology))


def test_a_model_of_trillions_of_parameters_is_refused_on_any_machine_of_ours() -> None:
    with pytest.raises(UserError, match="TiB of memory"):
        check_fit(plan(model__d_model=131_072, model__repeat=16))
