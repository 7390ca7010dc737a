"""The one table of back ends: what is picked, what is refused, and what is said of what is missing."""

import warnings
from collections.abc import Iterator

import pytest
import torch

from moe_mamba.config import RunConfig
from moe_mamba.errors import UserError
from moe_mamba.kernels import requirements
from moe_mamba.kernels.backends import BACKENDS, NAMES, SIZES, Backend, choose, find


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    find.cache_clear()
    yield
    find.cache_clear()
    for requirement in (requirements.triton, requirements.mamba_ssm, requirements.causal_conv1d):
        requirement.cache_clear()


def replace(monkeypatch: pytest.MonkeyPatch, operation: str, name: str, **fields: object) -> None:
    old = BACKENDS[operation][name]
    monkeypatch.setitem(BACKENDS[operation], name, Backend(**{**vars(old), **fields}))


def test_every_name_is_a_choice_of_the_configuration() -> None:
    assert {name for table in BACKENDS.values() for name in table} <= set(NAMES)
    for name in ("auto", *NAMES):
        assert RunConfig(kernels=name).kernels == name


@pytest.mark.parametrize("operation", BACKENDS)
def test_all_load_but_the_vendors_and_sizes_are_named(operation: str) -> None:
    for name, backend in BACKENDS[operation].items():
        assert backend.sizes is None or operation in SIZES
        if backend.missing() is None:
            assert callable(backend.load()), name


def test_a_cpu_gets_cpp_and_torch() -> None:
    assert choose("selective_scan", "cpu", torch.float32, size=16)[0] in ("cpu", "torch")
    assert choose("rms_norm", "cpu", torch.float32, size=64)[0] == "torch"
    assert choose("grouped_matmul", "cpu", torch.float64)[0] == "reference"
    assert choose("linear", "cpu", torch.bfloat16)[0] in ("cpu", "torch")  # C++ only for bf16
    assert choose("linear", "cpu", torch.float32)[0] == choose("grouped_matmul", "cpu", torch.float32)[0] == "torch"


def test_an_operation_without_the_forced_one_takes_what_auto_gives() -> None:
    assert choose("rms_norm", "cpu", torch.float32, "vendor", 64)[0] == "torch"
    assert choose("rms_norm", "cpu", torch.float32, "reference", 64)[0] == "reference"


def test_a_missing_one_is_a_warning_that_says_the_cost_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, "selective_scan", "cpu", missing=lambda: "no C++ compiler was found (c++): install g++")
    with pytest.warns(UserWarning, match=r"'cpu' cannot run here: no C\+\+ compiler .* install g\+\+; without it the"):
        assert choose("selective_scan", "cpu", torch.float32, size=16)[0] == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose("selective_scan", "cpu", torch.float32, size=16)  # once
    with pytest.raises(UserError, match=r"selective_scan's back end 'cpu' cannot run here: no C\+\+ compiler"):
        choose("selective_scan", "cpu", torch.float32, "cpu", 16)


@pytest.mark.parametrize(
    ("operation", "size", "words"),
    [
        ("selective_scan", 300, "takes d_state from 1 to 256, not 300"),
        ("causal_conv", 5, "takes width from 2 to 4, not 5"),
        ("causal_conv", 1, "takes width from 2 to 4, not 1"),
        ("rms_norm", 20_000, "takes d from 1 to 16,384, not 20,000"),
    ],
)
def test_a_size_past_the_limit_names_the_argument(operation: str, size: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        choose(operation, "cuda", torch.float32, "triton", size)
    assert "\n" not in str(caught.value)


def test_a_size_past_the_limit_is_a_warning_where_auto_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.warns(UserWarning, match="takes d_state from 1 to 256, not 300; without it the scan is a loop"):
        assert choose("selective_scan", "cuda", torch.float32, size=300)[0] == "torch"


def test_a_gpu_below_the_supported_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    requirements.triton.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match=r"this GPU has compute capability 7\.5, but Triton's kernels need 8\.0"):
        choose("selective_scan", "cuda", torch.bfloat16, "triton", 16)
    with pytest.warns(UserWarning, match=r"7\.5, .*; without it the scan is a loop"):
        assert choose("selective_scan", "cuda", torch.bfloat16, size=16)[0] == "torch"


def test_what_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for requirement in (requirements.triton, requirements.mamba_ssm, requirements.causal_conv1d):
        requirement.cache_clear()
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mamba-ssm is not installed: pip install -e '\.\[cuda\]'"):
        choose("selective_scan", "cuda", torch.bfloat16, "vendor", 16)
    with pytest.raises(UserError, match=r"causal-conv1d is not installed: pip install -e '\.\[cuda\]'"):
        choose("causal_conv", "cuda", torch.bfloat16, "vendor", 4)
    with pytest.raises(UserError, match="Triton is not installed: pip install triton"):
        choose("selective_scan", "cuda", torch.bfloat16, "triton", 16)


def test_the_wrong_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"'triton' does not take torch.float32 tensors on a cpu device: choose "):
        choose("selective_scan", "cpu", torch.float32, "triton", 16)
    with pytest.raises(UserError, match="no back end 'fast': choose auto or one of triton, cpu, torch"):
        choose("selective_scan", "cpu", torch.float32, "fast", 16)
