"""The Mamba mixer against Transformers' own, and its state against the parallel pass."""

import math

import pytest
import torch
from transformers import JambaConfig, MambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

from moe_mamba.config import ModelConfig
from moe_mamba.kernels import selective_scan
from moe_mamba.model.initialize import initialize
from moe_mamba.model.mixers.mamba import Mamba, MambaState
from moe_mamba.model.sequences import Sequences

BATCH, LENGTH = 2, 21


def build(norms: bool = False, **changes: object) -> Mamba:
    config = ModelConfig(pattern="M", repeat=2, d_model=32, d_state=4, mamba_norms=norms, **changes)
    mixer = Mamba(config)
    initialize(mixer, seed=3)
    if norms:
        for norm in (mixer.dt_norm, mixer.B_norm, mixer.C_norm):
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return mixer


def theirs(mixer: Mamba) -> torch.nn.Module:
    """Transformers' mixer with our weights."""
    config = mixer.config
    if config.mamba_norms:
        other = JambaMambaMixer(
            JambaConfig(
                hidden_size=config.d_model,
                mamba_d_state=config.d_state,
                mamba_dt_rank=config.resolved_dt_rank,
                mamba_d_conv=config.d_conv,
                mamba_expand=config.expand,
                rms_norm_eps=config.norm_epsilon,
                use_mamba_kernels=False,
            ),
            layer_idx=0,
        )
    else:
        sizes = MambaConfig(
            hidden_size=config.d_model,
            state_size=config.d_state,
            time_step_rank=config.resolved_dt_rank,
            conv_kernel=config.d_conv,
            num_hidden_layers=1,
        )
        sizes.intermediate_size = config.resolved_d_inner
        other = MambaMixer(sizes, layer_idx=0)
    weights = {
        THEIR_NAMES.get(name.split(".")[0], name.split(".")[0]) + name[name.find(".") :] * ("." in name): value
        for name, value in mixer.state_dict().items()
    }
    weights["conv1d.weight"] = weights["conv1d.weight"][:, None]
    other.load_state_dict(weights)
    return other


THEIR_NAMES = {"dt_norm": "dt_layernorm", "B_norm": "b_layernorm", "C_norm": "c_layernorm"}


@pytest.mark.parametrize(("norms", "d_inner"), [(False, 43), (True, None)])
def test_equals_transformers(norms: bool, d_inner: int | None) -> None:
    mixer = build(norms, d_inner=d_inner)
    other = theirs(mixer)
    x = torch.randn(BATCH, LENGTH, 32)
    ours_in, theirs_in = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, statistics, state = mixer(ours_in.flatten(0, 1), Sequences(BATCH, LENGTH))
    expected = other(theirs_in)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert statistics == {} and state is None
    torch.testing.assert_close(y.view_as(expected), expected, rtol=1e-5, atol=1e-5)

    weight = torch.randn_like(expected)
    (y.view_as(expected) * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-4, atol=1e-4)
    gradients = dict(other.named_parameters())
    for name, parameter in mixer.named_parameters():
        head, _, tail = name.partition(".")
        their_name = THEIR_NAMES.get(head, head) + (f".{tail}" if tail else "")
        expected_gradient = gradients[their_name].grad.view_as(parameter)
        scale = max(1.0, float(expected_gradient.abs().max()))
        torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize(("norms", "d_inner"), [(False, None), (True, 21)])
@torch.no_grad()
def test_steps_equal_the_parallel_pass(norms: bool, d_inner: int | None, selective: bool) -> None:
    mixer = build(norms, selective=selective, d_inner=d_inner)
    x = torch.randn(BATCH, LENGTH, 32)
    expected, _, _ = mixer(x.flatten(0, 1), Sequences(BATCH, LENGTH))
    state = mixer.initial_state(BATCH)
    prefill = 7  # a longer first pass, then token by token
    y, _, state = mixer(x[:, :prefill].flatten(0, 1), Sequences(BATCH, prefill), state)
    outputs = [y.view(BATCH, prefill, 32)]
    for t in range(prefill, LENGTH):
        assert isinstance(state, MambaState)
        y, _, state = mixer(x[:, t], Sequences(BATCH, 1), state)
        outputs.append(y.view(BATCH, 1, 32))
    torch.testing.assert_close(torch.cat(outputs, 1), expected.view(BATCH, LENGTH, 32), rtol=1e-5, atol=1e-5)


def test_packed_documents_equal_single_ones() -> None:
    mixer = build().double()
    lengths = (5, 1, 9, 6)
    x = torch.randn(1, sum(lengths), 32, dtype=torch.float64)
    document_starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    documents = x.split(lengths, 1)
    document_starts[0, [0, 5, 6, 15]] = True
    packed, _, _ = mixer(x[0], Sequences(1, sum(lengths), document_starts))
    single = [mixer(document[0], Sequences(1, document.shape[1]))[0] for document in documents]
    torch.testing.assert_close(packed, torch.cat(single), rtol=1e-10, atol=1e-12)


def test_a_state_stops_at_a_start() -> None:
    mixer = build()
    x = torch.randn(1, 4, 32)
    state = MambaState(torch.full((1, 3, 64), math.nan), torch.full((1, 64, 4), math.nan))
    document_starts = torch.tensor([[True, False, False, False]])
    y, _, new_state = mixer(x[0], Sequences(1, 4, document_starts), state)
    expected, _, expected_state = mixer(x[0], Sequences(1, 4), mixer.initial_state(1))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(new_state.scan, expected_state.scan)


def test_bf16_beside_fp32_parameters() -> None:
    mixer = build(norms=True)
    x = torch.randn(BATCH * LENGTH, 32)
    expected, _, _ = mixer(x, Sequences(BATCH, LENGTH))
    for name, parameter in mixer.named_parameters():
        if name not in ("A_log", "D", "dt_proj.bias") and "norm" not in name:
            parameter.data = parameter.data.bfloat16()
    y, _, state = mixer(x.bfloat16(), Sequences(BATCH, LENGTH), mixer.initial_state(BATCH))
    assert y.dtype == torch.bfloat16 and state.conv.dtype == torch.bfloat16 and state.scan.dtype == torch.float32
    assert (y.float() - expected).norm() < 2e-2 * expected.norm()
    y.float().sum().backward()
    assert all(parameter.grad.dtype == parameter.dtype for parameter in mixer.parameters())


def test_initialization_is_the_libraries() -> None:
    mixer = build()
    delta = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert delta.min() >= 1e-3 * 0.999 and delta.max() <= 1e-1 * 1.001
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 5.0).expand(64, 4))
    assert mixer.D.eq(1).all()
    assert mixer.out_proj.weight.abs().max() <= 64**-0.5 * 2**-0.5
    assert build(initialization="authors").out_proj.weight.abs().max() > 64**-0.5 * 2**-0.5
    assert mixer.dt_proj.weight.abs().max() <= 2**-0.5


@pytest.mark.parametrize(("d_model", "parameters"), [(512, 1_694_720), (768, 3_770_880)])
def test_parameters_as_published(d_model: int, parameters: int) -> None:
    with torch.device("meta"):
        mixer = Mamba(ModelConfig(pattern="M", d_model=d_model))
    assert sum(parameter.numel() for parameter in mixer.parameters()) == parameters


def test_without_selection_the_scan_is_a_convolution() -> None:
    """The states' part of the output is the channels' inputs times one kernel, the same at every token."""
    mixer = build(selective=False).double()
    torch.nn.init.normal_(mixer.dt_B_C)
    x = torch.randn(1, LENGTH, mixer.config.resolved_d_inner, dtype=torch.float64)
    raw, _, B, C = mixer._select(x)
    delta = torch.nn.functional.softplus(raw[0, 0] + mixer.dt_proj.bias)  # (d_inner)
    decay = (delta[:, None] * -mixer.A_log.exp())[..., None] * torch.arange(LENGTH)  # (d_inner, d_state, length)
    kernel = torch.einsum("n,n,dnl,d->dl", B[0, 0], C[0, 0], decay.exp(), delta)
    kernel[:, 0] += mixer.D
    expected = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x.mT, (LENGTH - 1, 0)), kernel.flip(-1)[:, None], groups=mixer.config.resolved_d_inner
    ).mT
    found, _ = selective_scan(x, raw, -mixer.A_log.exp(), B, C, mixer.D, delta_bias=mixer.dt_proj.bias)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_without_selection_the_constants_learn_and_start_as_s4d_does() -> None:
    mixer = build(selective=False)
    dt, B, _ = mixer.dt_B_C.split((mixer.config.resolved_dt_rank, 4, 4))
    assert not dt.any() and (B == 1).all()
    assert "x_proj.weight" not in dict(mixer.named_parameters())
    mixer(torch.randn(BATCH * LENGTH, 32), Sequences(BATCH, LENGTH))[0].square().sum().backward()
    assert (mixer.dt_B_C.grad != 0).all()
