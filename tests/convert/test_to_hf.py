"""The way out: what is written loads in Transformers with the trainer's logits, whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from moe_mamba.commands.convert_to_hf import main, parse_size
from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.convert.to_hf import choose_format, export
from moe_mamba.convert.weight_stream import chunk_of
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.errors import UserError
from moe_mamba.hf.formats import NATIVE
from moe_mamba.run.restore import restore
from tests.hf.checkpoints import make_run
from tests.hf.conftest import DESIGNS
from tools import convert_from_hf

transformers = pytest.importorskip("transformers")

SWIGLU: dict[str, Any] = {"kv_heads": 2, "activation": "swiglu"}
JAMBA: dict[str, Any] = SWIGLU | {"positions": "none", "mamba_norms": True, "dt_rank": 2}
TOP_2: dict[str, Any] = {"router": "top_k", "top_k": 2}
BIASES: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
LLAMA_3: dict[str, Any] = {"rope_type": "llama3", "rope_factor": 4.0, "rope_original_length": 16}
MODELS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mamba", {"pattern": "MM", "tied_head": True}, {}),
    ("llama", {"pattern": "*-*-", **SWIGLU}, {}),
    ("llama", {"pattern": "*-*-", **SWIGLU, **BIASES, **LLAMA_3, "head_dim": 6}, {}),
    ("mistral", {"pattern": "*-*-", **SWIGLU, **LLAMA_3, "sliding_window": 5}, {}),
    ("mixtral", {"pattern": "*E*E", **SWIGLU}, TOP_2 | {"renormalize": True}),
    ("mixtral", {"pattern": "*E", **SWIGLU, "sliding_window": 5, "head_dim": 6}, TOP_2 | {"renormalize": True}),
    ("moe_mamba", {"pattern": "*-", **SWIGLU, **BIASES, **LLAMA_3, "sliding_window": 5, "head_dim": 6}, {}),
    ("jamba", {"pattern": "M-*EM-*E", **JAMBA}, TOP_2),
    ("moe_mamba", {"pattern": "ME"}, {}),
    ("moe_mamba", {"pattern": "MEM-*E", "norm": "layernorm", "tied_head": True}, TOP_2 | {"shared_experts": 1}),
    ("moe_mamba", {"pattern": "*E", "activation": "gelu"}, TOP_2 | {"scores": "sigmoid", "balance": "bias"}),
    ("moe_mamba", {"pattern": "M-", "final_norm": False, "selective": False}, {}),
    ("moe_mamba", {"pattern": "ME"}, {"router": "expert_choice", "capacity_factor": 1.0}),
    *(("moe_mamba", {"pattern": pattern, "repeat": 2}, moe) for pattern, moe in DESIGNS.values()),
]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", {"pattern": "ME"})
    return tmp_path / "run"


def logits(folder: Path, tokens: Tensor) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "keys", "moe"), MODELS)
def test_the_folder_loads_with_the_trainers_logits(
    name: str, keys: dict, moe: dict, tmp_path: Path, tokens: Tensor
) -> None:
    model = make_run(tmp_path / "run", keys, moe)
    expert_choice = moe.get("router") == "expert_choice"
    said: list[str] = []
    chosen = export(tmp_path / "run", tmp_path / "out", scoring_only=expert_choice, say=said.append)
    assert chosen.name == name and said[0].startswith(f"format    {name}: {chosen.architecture}")
    assert [line.split()[1] for line in said[1:-1]] == [f"{other}:" for other in NATIVE if other != name]
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(logits(tmp_path / "out", tokens), expected, rtol=0, atol=1e-5)
    if name in NATIVE:
        export(tmp_path / "run", tmp_path / "own", format="moe_mamba")
        torch.testing.assert_close(logits(tmp_path / "own", tokens), expected, rtol=0, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer("a▁b")["input_ids"] == BytesTokenizer().encode("a▁b")
    assert (tmp_path / "out" / "generation_config.json").exists() != expert_choice


@pytest.mark.parametrize(("name", "keys", "moe"), [*MODELS[:5], *MODELS[-len(DESIGNS) :]])
def test_out_and_in_again_is_the_same_to_the_bit(name: str, keys: dict, moe: dict, tmp_path: Path) -> None:
    model = make_run(tmp_path / "run", keys, moe)
    export(tmp_path / "run", tmp_path / "out", max_shard_bytes=9000)
    convert_from_hf.main(str(tmp_path / "out"), str(tmp_path / "again"), tokenizer="bytes")
    again = restore(tmp_path / "again", torch.device("cpu"))
    if name not in NATIVE:
        assert (again.config.model, again.config.moe) == (model.config, model.moe_config)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_the_converted_model_generates(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"pattern": "M*", "activation": "swiglu"})
    export(tmp_path / "run", tmp_path / "out")
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "out"), trust_remote_code=True)
    settings = pipeline.model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.eos_token_id) == (True, 0.8, 0.95, 256)
    assert pipeline("ab", max_new_tokens=4)[0]["generated_text"].startswith("ab")


def test_shards_hold_the_same_tensors_as_one_file(run: Path, tmp_path: Path, tokens: Tensor) -> None:
    export(run, tmp_path / "one")
    export(run, tmp_path / "many", max_shard_bytes=8000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 3 and names == sorted(set(index["weight_map"].values()))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as whole:
        assert whole.metadata() == {"format": "pt"}
        assert set(whole.keys()) == set(index["weight_map"])
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "many" / file, "pt") as shard:
                assert torch.equal(shard.get_tensor(name), whole.get_tensor(name)), name
    assert torch.equal(logits(tmp_path / "one", tokens), logits(tmp_path / "many", tokens))


@pytest.mark.parametrize("format", ["native", "moe_mamba"])
def test_sixteen_bits_keep_what_training_keeps_in_fp32(format: str, tmp_path: Path) -> None:
    moe = TOP_2 | {"balance": "none"}
    model = make_run(tmp_path / "run", {"pattern": "M-*E", **JAMBA}, moe, precision="bf16")
    chosen = export(tmp_path / "run", tmp_path / "out", format=format)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    ours, wide = model.state_dict(), model.fp32_parameter_names()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for entry in chosen.entries(model.config, model.moe_config):
            found = file.get_tensor(entry.theirs)
            expected = entry.view(ours[entry.ours])
            assert found.dtype == (torch.float32 if entry.ours in wide else torch.bfloat16), entry.theirs
            assert torch.equal(found, expected.to(found.dtype)), entry.theirs
    export(tmp_path / "run", tmp_path / "full", dtype="float32")
    with safe_open(tmp_path / "full" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118 (no dict)


def test_a_view_of_a_tensor_is_read_from_its_chunk() -> None:
    whole = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    for view in (
        whole,
        whole[1],
        whole[1, :, 2:, 1:4],
        whole[0, 1].t()[1:3],
        whole[:, 2:].transpose(1, 3),
        whole[1, 2, 3, 4],
    ):
        offsets, sizes = chunk_of(view, whole.shape)
        chunk = whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
        assert sorted(chunk.reshape(-1).tolist()) == sorted(view.reshape(-1).tolist())


def test_the_card_tells_what_the_run_knows(plain: Path, tmp_path: Path) -> None:
    main(str(plain), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    metrics = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    loss = next(line["validation_loss"] for line in reversed(metrics) if "validation_loss" in line)
    assert card.startswith("---\nlibrary_name: transformers\n")
    for fact in ("- mixture-of-experts", "- custom_code", "`ME` x 1", "| learning_rate | 0.01 |", "Bytes, 257 tokens"):
        assert fact in card, fact
    assert f"{loss:.4f}" in card and "trust_remote_code=True" in card and "train.jsonl" in card
    pictures = {path.name for path in (plain / "plots").glob("*.png")}
    assert {path.name for path in (tmp_path / "out" / "plots").iterdir()} == pictures
    assert all(f"(plots/{name})" in card for name in pictures)


def test_the_card_names_the_weights_that_the_run_started_from(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"pattern": "M"}, warm_start="runs/first")
    main(str(tmp_path / "run"), str(tmp_path / "out"))
    assert "| starts from | the weights of `runs/first` |" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_tells_of_parallel_layers_and_experts_inside(tmp_path: Path) -> None:
    inner = DESIGNS["shared"][1]["inner"] | {"every": 2, "expert": "switch", "d_expert": 8, "balance": "loss"}
    model = make_run(tmp_path / "run", {"pattern": "(ME)M", "repeat": 2}, {"balance": "none", "inner": inner})
    main(str(tmp_path / "run"), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    counts = model.parameter_counts()
    active = counts["active"] + counts["norm"] + counts["embedding"]
    for fact in (
        *("- mamba\n", "- mixture-of-experts\n", "- mamba-with-experts-inside\n", "pattern `(ME)M` x 2"),
        *("| layers | 4: `(ME)M` x 2 |", "| parallel layers | 2 |", f"of which a token meets {active:,} ("),
        "In 2 of the layers several mixers read one input",
        "In 2 of 4 Mamba mixers there are experts in the place of projections (conv, gate and out), with one router",
        *("| experts | 4 |", "| balance | none |", "| inner.experts | 3 |", "| inner.balance | loss |"),
        *("| inner.projections | conv, gate, out |", "| inner.every | 2 |", "| inner.router | shared |"),
        *("| inner.expert | switch |", "| inner.d_expert | 8 |", "| inner.top_k | 1 |", "| balance_weight | 0.01 |"),
    ):
        assert fact in card, fact
    assert card.count("| activation |") == 1
    make_run(tmp_path / "other", {"pattern": "M"})
    main(str(tmp_path / "other"), str(tmp_path / "plain"), format="moe_mamba")
    assert "xpert" not in (tmp_path / "plain" / "README.md").read_text()


def test_only_a_step_converts_with_the_tokenizer_named(run: Path, tmp_path: Path) -> None:
    step = shutil.copytree(run / "checkpoints" / "step-00000010", tmp_path / "alone" / "step-00000010")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "holiday.png").touch()  # lies where a run's would, and is none
    (tmp_path / "metrics.jsonl").write_text("of something else")
    with pytest.raises(UserError, match=r"tokenizer is missing.*--tokenizer"):
        main(str(step), str(tmp_path / "out"))
    main(str(step), str(tmp_path / "out"), tokenizer="bytes")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "plots").exists()


def test_what_several_classes_hold_goes_to_the_first() -> None:
    chosen, why_not = choose_format("auto", ModelConfig(pattern="*-", **SWIGLU), MoEConfig())
    assert chosen.name == "llama" and "not mistral: it would do as well" in why_not
    chosen, why_not = choose_format("moe_mamba", ModelConfig(pattern="*-", **SWIGLU), MoEConfig())
    assert "not llama: it would do, but --format moe_mamba was asked for" in why_not
    both = ModelConfig(pattern="*-", **SWIGLU, **BIASES, sliding_window=5)
    assert choose_format("auto", both, MoEConfig())[0].name == "moe_mamba"
    with pytest.raises(UserError, match=r"attention_bias=true: MistralForCausalLM has none; use"):
        choose_format("native", both, MoEConfig())


def test_native_that_does_not_fit_names_the_layer_and_the_format_that_does(tmp_path: Path) -> None:
    for keys, moe, says in (
        ({"pattern": "ME"}, {}, r"no layer is attention.*JambaForCausalLM cannot cache; use --format moe_mamba"),
        ({"pattern": "*-*M", **SWIGLU}, {}, r"layer 3 is Mamba.*JambaForCausalLM has - or E"),
        ({"pattern": "*E", **SWIGLU}, {}, r"moe.renormalize=false: MixtralForCausalLM"),
        ({"pattern": "*-"}, {}, r"model.activation=relu: LlamaForCausalLM"),
        ({"pattern": "(M*)-", **JAMBA}, {}, r"layer 0 is Mamba \(M\) and attention \(\*\), where JambaForCausalLM"),
        ({"pattern": "M"}, DESIGNS["own"][1], r"moe.inner.projections=conv,gate: MambaForCausalLM has no Mamba with"),
    ):
        make_run(tmp_path / "run", keys, moe)
        with pytest.raises(UserError, match=says) as error:
            main(str(tmp_path / "run"), str(tmp_path / "out"), format="native")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "run")


def test_bad_input_is_one_line_and_changes_nothing(run: Path, tmp_path: Path) -> None:
    out, step = tmp_path / "out", run / "checkpoints" / "step-00000010"

    def refused(says: str, checkpoint: Path = run, output: Path = out, **flags: Any) -> None:
        before = files(tmp_path)
        with pytest.raises(UserError, match=says) as error:
            main(str(checkpoint), str(output), **flags)
        assert "\n" not in str(error.value)
        assert files(tmp_path) == before

    refused("is not a folder", checkpoint=tmp_path / "nowhere")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    refused("has no usable checkpoint", checkpoint=tmp_path / "foreign")
    refused("is not empty.*--overwrite", output=run)
    refused("holds no config.json, so --overwrite does not replace it", output=run, overwrite=True)
    refused("is not a folder", output=run / "config.yaml")
    refused("holds the working folder", output=Path("."))
    refused("--max_shard_size=5 boxes", max_shard_size="5 boxes")
    refused("is not the tokenizer that", tokenizer=str(_other_tokenizer(tmp_path)))
    weights = step / "rank-00000.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    refused("bytes were written|were written", checkpoint=step)
    weights.write_bytes(content[:-4] + b"gone")
    refused("is not what was written", checkpoint=step)
    weights.write_bytes(content)
    shutil.rmtree(run / "tokenizer")
    refused("tokenizer is missing: restore it")


def _other_tokenizer(folder: Path) -> Path:
    from moe_mamba.data.tokenizer import SymbolsTokenizer

    SymbolsTokenizer(12).save(folder / "other")
    return folder / "other"


def test_expert_choice_is_exported_only_for_scoring(tmp_path: Path) -> None:
    make_run(tmp_path / "run", {"pattern": "ME"}, {"router": "expert_choice", "capacity_factor": 1.0})
    with pytest.raises(UserError, match="cannot generate: give --scoring_only"):
        main(str(tmp_path / "run"), str(tmp_path / "out"))
    main(str(tmp_path / "run"), str(tmp_path / "out"), scoring_only=True)
    assert "does not generate" in (tmp_path / "out" / "README.md").read_text()


def test_overwrite_replaces_a_converted_model_whole(run: Path, tmp_path: Path) -> None:
    main(str(run), str(tmp_path / "out"), max_shard_size="8KB")
    main(str(run), str(tmp_path / "out"), overwrite=True)
    assert len(list((tmp_path / "out").glob("*.safetensors*"))) == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_failure_half_way_keeps_what_was_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(str(run), str(tmp_path / "out"))
    before = files(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_mamba.convert.to_hf.tokenizer_files.write", full)
    with pytest.raises(UserError, match=r"cannot be written.*No space left"):
        main(str(run), str(tmp_path / "out"), overwrite=True)
    assert files(tmp_path) == before


def test_a_kill_between_the_renames_is_repaired(run: Path, tmp_path: Path) -> None:
    main(str(run), str(tmp_path / "out"))
    before = files(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")  # what a kill at that instant leaves
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(UserError, match="not empty"):
        main(str(run), str(tmp_path / "out"))
    assert files(tmp_path / "out") == before


def test_sizes_of_shards() -> None:
    assert [parse_size(text) for text in ("5GB", "500 MB", "1.5kib", "77")] == [5 * 10**9, 5 * 10**8, 1536, 77]
    for text in ("", "0", "GB", "5TB", "-5GB"):
        with pytest.raises(UserError, match="is not a size"):
            parse_size(text)
