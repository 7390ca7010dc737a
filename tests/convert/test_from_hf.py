"""The way in: folders of each format become runs to start from, bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_mamba.config import Config, ModelConfig, MoEConfig
from moe_mamba.convert.starting_point import write_starting_point
from moe_mamba.convert.to_hf import export
from moe_mamba.data.tokenizer import BytesTokenizer, load_tokenizer, train_sentencepiece
from moe_mamba.errors import UserError
from moe_mamba.hf.formats import FORMATS
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.run.restore import restore, weight_shards
from tests.train.runs import curve, run
from tests.world import World
from tools import evaluate, generate
from tools.convert_from_hf import main

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"repeat": 1, "d_model": 16, "vocab_size": 264, "d_state": 4, "heads": 4, "d_ff": 24}
SWIGLU: dict[str, Any] = {"kv_heads": 2, "activation": "swiglu"}
JAMBA: dict[str, Any] = SWIGLU | {"positions": "none", "mamba_norms": True, "dt_rank": 2}
RENORMALIZED = {"router": "top_k", "top_k": 2, "renormalize": True}
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
LLAMA_3: dict[str, Any] = {"rope_type": "llama3", "rope_factor": 4.0, "rope_original_length": 16}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "own ME": ("moe_mamba", {"pattern": "ME"}, {"balance": "bias"}),
    "own MEM-*E": ("moe_mamba", {"pattern": "MEM-*E", "tied_head": True, "norm": "layernorm"}, {"shared_experts": 1}),
    "own *-, no final norm": ("moe_mamba", {"pattern": "*-", "final_norm": False, "activation": "gelu"}, {}),
    "mamba": ("mamba", {"pattern": "M", "repeat": 3}, {}),
    "mamba, tied": ("mamba", {"pattern": "M", "tied_head": True, "dt_rank": 3}, {}),
    "llama": ("llama", {"pattern": "*-", "repeat": 2, "rope_base": 500.0, **SWIGLU}, {}),
    "llama 3, biases": ("llama", {"pattern": "*-", "repeat": 2, "head_dim": 6, **SWIGLU, **BIASES, **LLAMA_3}, {}),
    "mistral": ("mistral", {"pattern": "*-", "repeat": 2, "head_dim": 6, "sliding_window": 5, **SWIGLU}, {}),
    "own, window and biases": ("moe_mamba", {"pattern": "*-M", "sliding_window": 5, **SWIGLU, **BIASES, **LLAMA_3}, {}),
    "mixtral": ("mixtral", {"pattern": "*E", "repeat": 2, **SWIGLU}, RENORMALIZED),
    "mixtral, window": ("mixtral", {"pattern": "*E", "sliding_window": 5, "head_dim": 2, **SWIGLU}, RENORMALIZED),
    "jamba": ("jamba", {"pattern": "M-*E", "repeat": 2, **JAMBA}, {"router": "top_k", "top_k": 2}),
    "jamba, dense, tied": ("jamba", {"pattern": "M-*-", "tied_head": True, **JAMBA}, {}),
}


def build(keys: dict[str, Any], moe: dict[str, Any]) -> LanguageModel:
    """A model with nothing at its starting value, so that nothing can be mixed up."""
    routing = {"experts": 4, "capacity_factor": None, **moe}
    model = LanguageModel(ModelConfig(**{**SIZES, **keys}), MoEConfig(**routing))
    initialize(model, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 0.1 * torch.randn_like(tensor)
    return model.eval()


def write_folder(
    folder: Path, name: str, model: LanguageModel, dtype: torch.dtype = torch.float32, stacked: bool = False
) -> Path:
    """A folder of a format, with two shards, as its table has it."""
    folder.mkdir()
    format, ours = FORMATS[name], model.state_dict()
    entries = list(format.entries(model.config, model.moe_config, stacked))
    tensors = {
        entry.theirs: entry.view(ours[entry.ours]).to(dtype).clone(memory_format=torch.contiguous_format)
        for entry in entries
    }
    index = {}
    for number in (1, 2):
        shard = dict(list(tensors.items())[number - 1 :: 2])
        save_file(shard, folder / f"model-{number}.safetensors", {"format": "pt"})
        index |= dict.fromkeys(shard, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    configuration = format.configuration(model.config, model.moe_config)
    (folder / "config.json").write_text(json.dumps(configuration))
    BytesTokenizer().save(folder)
    return folder


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", MODELS)
def test_weights_come_in_bit_for_bit(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    name, keys, moe = MODELS[case]
    model = build(keys, moe)
    main(str(write_folder(tmp_path / "in", name, model, dtype)), str(tmp_path / "run"))
    restored = restore(tmp_path / "run", CPU)
    assert restored.config.model.layers == model.config.layers
    assert restored.config.train.precision == {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    found, expected = restored.model.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor.to(dtype).float()), key


@pytest.mark.parametrize("case", ["mixtral", "jamba"])
def test_stacked_experts_come_in_too(tmp_path: Path, case: str) -> None:
    name, keys, moe = MODELS[case]
    model = build(keys, moe)
    main(str(write_folder(tmp_path / "in", name, model, stacked=True)), str(tmp_path / "run"))
    found = restore(tmp_path / "run", CPU).model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies_that_older_files_hold_must_be_those_of_the_config(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_folder(tmp_path / "in", "llama", build(*MODELS["llama"][1:]))
    shard = folder / "model-1.safetensors"
    frequency = 500.0 ** -torch.tensor([0.0, 0.5])
    save_file(load_file(shard) | {"model.layers.0.self_attn.rotary_emb.inv_freq": frequency.to(dtype)}, shard)
    main(str(folder), str(tmp_path / "run"))
    configuration = json.loads((folder / "config.json").read_text())
    configuration["rope_theta"] = configuration["rope_parameters"]["rope_theta"] = 10000.0
    (folder / "config.json").write_text(json.dumps(configuration))
    with pytest.raises(UserError, match=r"inv_freq has other rotary frequencies than config\.json: set its rope_theta"):
        main(str(folder), str(tmp_path / "other"))


def test_dropout_and_foreign_code_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "in", "mixtral", build(*MODELS["mixtral"][1:]))
    keys = {"attention_dropout": 0.1, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    configuration = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(configuration | keys))
    main(str(folder), str(tmp_path / "run"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("note: config.json: attention_dropout=0.1 acts only in training")
    assert said[1].startswith("note: config.json: auto_map names code of the folder's own, which is not run")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", MODELS)
def test_a_second_export_is_the_first(tmp_path: Path, case: str, dtype: str) -> None:
    name, keys, moe = MODELS[case]
    main(str(write_folder(tmp_path / "in", name, build(keys, moe))), str(tmp_path / "run"))
    for source, out in (("run", "first"), ("again", "second")):
        export(tmp_path / source, tmp_path / out, dtype=dtype if source == "run" else None, say=lambda _: None)
        main(str(tmp_path / out), str(tmp_path / "again"), overwrite=True)
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)
    assert json.loads((tmp_path / "first/config.json").read_text()) == json.loads(
        (tmp_path / "second/config.json").read_text()
    )


def test_a_tokenizer_of_ours_comes_back_as_it_was(tmp_path: Path) -> None:
    texts = [f"the {n} and then  the {n * n}\n\tand more" for n in range(300)]
    tokenizer = train_sentencepiece(texts, 320, tmp_path / "pieces")
    texts += ["\u2581 a mark", "\u00e9\u4e2d and <|endoftext|>", "  spaces  ", ""]
    model = build({"pattern": "M", "vocab_size": 320}, {})
    config = Config(model=model.config)
    write_starting_point(tmp_path / "run", config, tokenizer, weight_shards(model))
    export(tmp_path / "run", tmp_path / "out", say=lambda _: None)
    main(str(tmp_path / "out"), str(tmp_path / "again"))
    assert load_tokenizer(tmp_path / "again" / "tokenizer").fingerprint == tokenizer.fingerprint
    shutil.rmtree(tmp_path / "out" / "original_tokenizer")
    main(str(tmp_path / "out"), str(tmp_path / "again"), overwrite=True)  # as a folder from elsewhere
    translated = load_tokenizer(tmp_path / "again" / "tokenizer")
    assert translated.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert translated.end_of_text == tokenizer.end_of_text


@torch.no_grad()
@pytest.mark.parametrize("keys", [{"pattern": "ME"}, {"pattern": "*-", "tied_head": True}], ids=["ME", "tied"])
def test_our_class_saved_by_transformers_comes_in(
    tmp_path: Path, pair: Callable[..., Any], keys: dict[str, Any]
) -> None:
    ours, theirs = pair(moe={"balance": "bias"}, **keys | {"vocab_size": 264})
    theirs.save_pretrained(tmp_path / "in")
    main(str(tmp_path / "in"), str(tmp_path / "run"), tokenizer="bytes")
    found = restore(tmp_path / "run", CPU).model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in ours.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(("tied", "norm"), [(True, "rmsnorm"), (False, "rmsnorm"), (True, "layernorm")])
def test_a_state_spaces_folder_comes_in(tmp_path: Path, tokens: Tensor, tied: bool, norm: str) -> None:
    """The layout that was published: pytorch_model.bin, the head in it also where it is the embedding."""
    model = build({"pattern": "M", "repeat": 2, "tied_head": tied, "norm": norm}, {})
    folder = tmp_path / "in"
    folder.mkdir()
    published = {
        "d_model": 16, "n_layer": 2, "vocab_size": 257, "ssm_cfg": {"d_state": 4}, "rms_norm": norm == "rmsnorm",
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(published))
    names = {"embedding": "backbone.embedding", "final_norm": "backbone.norm_f", "layers": "backbone.layers"}
    tensors = {
        f"{names.get(first, 'lm_head')}.{rest}": tensor.unsqueeze(1) if "conv1d.weight" in rest else tensor
        for first, _, rest, tensor in ((*name.partition("."), tensor) for name, tensor in model.state_dict().items())
    }
    tensors.setdefault("lm_head.weight", tensors["backbone.embedding.weight"])
    torch.save(tensors, folder / "pytorch_model.bin")
    main(str(folder), str(tmp_path / "run"), tokenizer="bytes")
    assert torch.equal(restore(tmp_path / "run", CPU).model(tokens).logits, model(tokens).logits)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder of an imported Jamba."""
    folder = tmp_path_factory.mktemp("imported")
    name, keys, moe = MODELS["jamba"]
    main(str(write_folder(folder / "in", name, build(keys, moe))), str(folder / "run"))
    return folder / "run"


def test_it_generates_and_is_evaluated(
    imported: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where shards are kept
    generate.main(str(imported), "1 plus", max_new_tokens=4, json=True)
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 4
    evaluate.main(str(imported), str(corpus / "validation.jsonl"), json=True)
    assert 4 < json.loads(capsys.readouterr().out)["loss"] < 8


@pytest.mark.parametrize(
    ("case", "layout"),
    [("jamba", {"parallel__tensor": 2, "parallel__expert": 2}), ("own, window and biases", {"parallel__tensor": 2})],
)
def test_it_trains_on_in_any_layout(
    world: World, corpus: Path, tmp_path: Path, case: str, layout: dict[str, int]
) -> None:
    name, keys, moe = MODELS[case]
    imported = tmp_path / "imported"
    main(str(write_folder(tmp_path / "in", name, build(keys, moe))), str(imported))
    data = {
        "data__train": str(corpus / "train.jsonl"), "data__validation": str(corpus / "validation.jsonl"),
        "data__cache": str(corpus / "cache"), "data__sequence_length": 32,
        "train__steps": 5, "train__global_batch": 8, "train__micro_batch": 4, "train__learning_rate": 1e-2,
        "train__validate_every": 0, "train__sample_tokens": 0, "moe__balance": "none",
    }  # fmt: skip
    warm = data | {"train__warm_start": str(imported)}
    layouts = {"single": {"ranks": 1}, "sharded": {"ranks": 2, **layout}}
    losses = {
        name: curve(run(world, imported / "config.yaml", tmp_path / name, **warm, **where))
        for name, where in layouts.items()
    }
    assert losses["sharded"] == pytest.approx(losses["single"], rel=1e-4)
    assert losses["single"][-1] < losses["single"][0] - 0.1


def test_the_last_line_trains_on(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(imported.parent / "in", tmp_path / "in")
    main(str(tmp_path / "in"), str(tmp_path / "run"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f"JambaForCausalLM as M-*E x 2, in {tmp_path}/run/checkpoints/step-00000000")
    run_folder = tmp_path / "run"
    assert said[1].endswith(
        f"--config {run_folder}/config.yaml --run.folder={run_folder}-2 --train.warm_start={run_folder}"
    )
    main(str(tmp_path / "in"), str(tmp_path / "two words"))
    assert f" --train.warm_start='{tmp_path}/two words'" in capsys.readouterr().out


def test_its_card_claims_no_training_of_ours(imported: Path, tmp_path: Path) -> None:
    export(imported, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "imported or upcycled, and not trained since" in card
    assert "## Training" not in card and "builtin" not in card


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("beginning", [False, True])
def test_what_stands_before_texts_is_said(
    tmp_path: Path, beginning: bool, ending: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """And goes out and comes in again as it was."""
    from moe_mamba.data.tokenizer import load_tokenizer
    from tests.data.tokenizer_kinds import llama, save_library
    from tests.hf.checkpoints import make_run

    theirs = save_library(llama(None, beginning, ending), tmp_path / "theirs")
    make_run(tmp_path / "run", {"pattern": "M", "vocab_size": 300}, tokenizer=load_tokenizer(theirs))
    export(tmp_path / "run", tmp_path / "out", say=lambda _: None)
    shutil.rmtree(tmp_path / "out" / "original_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as they published it
        shutil.copy(theirs / name, tmp_path / "out" / name)
    capsys.readouterr()
    main(str(tmp_path / "out"), str(tmp_path / "again"))
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "MambaForCausalLM as M x 1" in line)
    assert line.endswith("; <s> (id 1) stands before every text, as in Transformers") == beginning
    assert any("Transformers puts </s> (id 2) behind every text" in line for line in lines) == ending
    export(tmp_path / "again", tmp_path / "out again", say=lambda _: None)
    main(str(tmp_path / "out again"), str(tmp_path / "third"))
    first, third = load_tokenizer(tmp_path / "again" / "tokenizer"), load_tokenizer(tmp_path / "third" / "tokenizer")
    assert first.fingerprint == third.fingerprint and first.prefix == third.prefix == (1,) * beginning


def test_a_setting_that_tokenizer_json_overrides_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_mamba.data.tokenizer import load_tokenizer
    from tests.data.tokenizer_kinds import llama, save_library
    from tests.hf.checkpoints import make_run

    make_run(tmp_path / "run", {"pattern": "M", "vocab_size": 300})
    export(tmp_path / "run", tmp_path / "out", say=lambda _: None)
    theirs = save_library(llama(), tmp_path / "theirs", bos_token="<s>", add_bos_token=True)
    assert load_tokenizer(theirs).prefix == ()
    main(str(tmp_path / "out"), str(tmp_path / "again"), tokenizer=str(theirs))
    assert "note: add_bos_token=true is left aside, as in Transformers 5" in capsys.readouterr().out
