"""The README.md of a converted model: what it is, what it was trained on, how well it does, how to load it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_mamba.config import Config
from moe_mamba.hf.versions import NEWEST, OLDEST
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers import MIXERS, VARIANTS
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.pattern import has, kinds, layer_specs

HYPERPARAMETERS = (
    "global_batch", "learning_rate", "schedule", "warmup", "minimum_rate", "weight_decay", "beta1", "beta2", "epsilon",
    "gradient_clip", "precision",
)  # fmt: skip
SHAPE = ("d_model", "vocab_size", "norm", "norm_epsilon", "tied_head")
FIGURES = {"loss": 4, "perplexity": 2, "bits_per_byte": 4, "accuracy": 4}  # of a validation -> decimals
RESULTS = ("step", "tokens", "set", "loss (nats/token)", "perplexity", "bits per byte", "accuracy")
ROUTING = (
    "experts",
    "router",
    "top_k",
    "scores",
    "renormalize",
    "capacity_factor",
    "evaluation_capacity",
    "balance",
    "shared_experts",
)
INNER = ("projections", "every", "router", "expert")
INNER_ROUTING = ("experts", "top_k", "scores", "renormalize", "capacity_factor", "evaluation_capacity", "balance")


@dataclass(frozen=True)
class Facts:
    """What a card tells beside the run's config.

    Attributes:
        name: of the model.
        architecture: class that loads it.
        remote_code: its code lies beside the weights.
        dtype: of the weights.
        generates: it can write text.
        tokenizer: kind of tokenizer.
        pads_apart: its pad token is not end-of-text.
        beginning: name of the token that it puts before every text; empty: none.
        step: of the checkpoint.
        tokens: trained on until then; 0: imported or upcycled weights.
        metrics: the run's lines up to that step; may be none.
        plots: files in ``plots/``.
    """

    name: str
    architecture: str
    remote_code: bool
    dtype: str
    generates: bool
    tokenizer: str
    pads_apart: bool
    beginning: str
    step: int
    tokens: int
    metrics: list[dict[str, Any]]
    plots: list[str]


def write(config: Config, facts: Facts) -> str:
    """The card, Markdown under a head of YAML."""
    sections = [
        "\n".join(_head(config, facts)),
        f"# {facts.name}\n\n{_summary(config, facts)}",
        f"## How to load it\n\n{_loading(facts)}",
        *([f"## How to fine-tune it\n\n{_fine_tuning(facts)}"] if facts.generates else []),
        f"## Architecture\n\n{_table(_architecture(config))}",
    ]
    if facts.tokens:  # else the config's data and schedule are nobody's choice yet
        sections.append(f"## Training\n\n{_table(_training(config, facts))}")
    if results := list(_results(facts)):
        sections.append(f"## Results\n\n{_table(results, RESULTS)}")
    if facts.plots:
        pictures = "\n".join(f"![{plot.removesuffix('.png').replace('_', ' ')}](plots/{plot})" for plot in facts.plots)
        sections.append(f"## Curves\n\n{pictures}")
    sections.append("Written by `tools/convert_to_hf.py` of moe_mamba.")
    return "\n\n".join(sections) + "\n"


def _head(config: Config, facts: Facts) -> Iterator[str]:
    tags = ["moe_mamba"]
    for mixer in kinds(config.model, config.moe):  # a variant is found as what it is a variant of, too
        titles = [MIXERS[mixer.letter].title, *([MoE.title] if mixer.routes else []), mixer.title]
        tags += [title.lower().replace(" ", "-") for title in titles]
    tags = list(dict.fromkeys(tags))
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation", "tags:")
    yield from (f"- {tag}" for tag in tags + ["custom_code"] * facts.remote_code)
    if hub := [source.split(":")[1] for source in config.data.train_weights if source.startswith("hf:")]:
        yield from ("datasets:", *(f"- {name}" for name in dict.fromkeys(hub)))
    yield "---"


def _summary(config: Config, facts: Facts) -> str:
    counts = LanguageModel.on_meta(config.model, config.moe).parameter_counts()
    whole = counts["total"] + counts["norm"] + counts["embedding"]
    active = whole - counts["total"] + counts["active"]
    titles = [mixer.title for mixer in kinds(config.model, config.moe)]
    text = (
        f"A language model of {len(config.model.layers)} layers ({_join(titles)}; pattern "
        f"`{config.model.pattern}` x {config.model.repeat}) with {whole:,} parameters"
    )
    if active < whole:
        text += f", of which a token meets {active:,}"
    text += f" ({counts['embedding']:,} in embedding and head). "
    if parallel := _parallel_layers(config):
        text += f"In {parallel} of the layers several mixers read one input, and their outputs are added. "
    if routed := _routed_projections(config):
        text += f"{routed} "
    if facts.tokens:
        text += f"It was trained on {facts.tokens:,} tokens."
    else:
        text += "Its weights were imported or upcycled, and not trained since."
    if not facts.generates:
        text += (
            "\n\n**It scores texts and does not generate**: its experts choose their tokens, and look ahead at "
            "later ones for that."
        )
    return text


def _parallel_layers(config: Config) -> int:
    return sum(len(letters) > 1 for letters in config.model.layers)


def _routed_projections(config: Config) -> str:
    """Which projections inside which mixers have experts, in a sentence; empty: none do."""
    mixers = [mixer for spec in layer_specs(config.model, config.moe) for mixer in spec.mixers]
    inside = [mixer for mixer in mixers if mixer in VARIANTS]
    if not inside:
        return ""
    alike = sum(mixer.letter == inside[0].letter for mixer in mixers)
    inner = config.moe.inner
    routers = "one router for all of a mixer" if inner.router == "shared" else "a router for each"
    return (
        f"In {len(inside)} of {alike} {MIXERS[inside[0].letter].title} mixers there are experts in the place of "
        f"projections ({_join(inner.projections)}), with {routers}."
    )


def _loading(facts: Facts) -> str:
    trust = ", trust_remote_code=True" if facts.remote_code else ""
    lines = [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'folder = "{facts.name}"  # this folder, or its name on the hub',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        f'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"{trust})',
    ]
    if facts.generates:
        lines += [
            'inputs = tokenizer("The", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        ]
    text = "\n".join([*lines, "```"])
    text += f"\n\nTested with Transformers {OLDEST} to {NEWEST}"
    if facts.remote_code:
        text += "; an older one is refused. The model's code lies in this folder and needs only torch and Transformers"
    if facts.architecture == "JambaForCausalLM":
        text += (
            "; before 5.10 this class needs mamba-ssm and a GPU unless `from_pretrained` is given "
            "`use_mamba_kernels=False`"
        )
    return text + "."


def _fine_tuning(facts: Facts) -> str:
    """The recipe by which it learns to stop; tests run it."""
    collator = "DataCollatorForLanguageModeling(tokenizer, mlm=False)" if facts.pads_apart else "collate"
    lines = ["```python", "from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments", ""]
    if not facts.pads_apart:
        lines += [
            "def collate(rows):  # no loss on padding, which is end-of-text here, and the loss of each text's own",
            "    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)",
            '    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)',
            "    return batch",
            "",
        ]
    lines += [
        "rows = [tokenizer(text + tokenizer.eos_token) for text in texts]",
        "trainer = Trainer(",
        "    model=model,",
        '    args=TrainingArguments(output_dir="tuned"),',
        "    train_dataset=rows,",
        f"    data_collator={collator},",
        ")",
        "trainer.train()",
        "```",
    ]
    text = "The name of end-of-text at the end of a text is that token, and the model learns to stop there. "
    if facts.pads_apart:
        text += "Padding has a token of its own, so that collators take the loss off padding alone. "
    else:
        text += "The vocabulary has no id for padding, so end-of-text pads, and `collate` keeps the loss of true ends. "
    if facts.beginning:
        text += f"The tokenizer puts `{facts.beginning}` before every text. "
    text += (
        "Names of special tokens in a text that nobody checked are such tokens as well, unless `tokenizer` is called "
        "with `split_special_tokens=True`."
    )
    return f"{text}\n\n" + "\n".join(lines)


def _architecture(config: Config) -> Iterator[tuple[str, str]]:
    model, moe = config.model, config.moe
    yield "layers", f"{len(model.layers)}: `{model.pattern}` x {model.repeat}"
    if parallel := _parallel_layers(config):
        yield "parallel layers", str(parallel)
    shape = dict.fromkeys(SHAPE)
    for mixer in kinds(model, moe):
        shape |= dict.fromkeys(mixer.settings)
    if _routed_projections(config) and moe.inner.expert == "switch":
        shape["activation"] = None
    for key in shape:
        yield key.removeprefix("resolved_"), _value(getattr(model, key))
    if has(model, MoE):
        yield "d_expert", _value(moe.d_expert or model.resolved_d_ff)
        for key in ROUTING:
            yield key, _value(getattr(moe, key))
    if _routed_projections(config):
        routing = moe.inner_routing
        for key in INNER:
            yield f"inner.{key}", _value(getattr(moe.inner, key))
        if moe.inner.expert == "switch":
            yield "inner.d_expert", _value(routing.d_expert or model.resolved_d_ff)
        for key in INNER_ROUTING:
            yield f"inner.{key}", _value(getattr(routing, key))


def _training(config: Config, facts: Facts) -> Iterator[tuple[str, str]]:
    weights = config.data.train_weights
    total = sum(weights.values())
    shares = (f"`{source}`" + f" ({weight / total:.0%})" * (len(weights) > 1) for source, weight in weights.items())
    yield "data", ", ".join(shares)
    yield "tokenizer", f"{facts.tokenizer}, {config.model.vocab_size:,} tokens in the vocabulary"
    if config.train.warm_start:
        yield "starts from", f"the weights of `{config.train.warm_start}`"
    yield "sequence length", f"{config.data.sequence_length:,} tokens"
    if config.data.reset_at_document:
        yield "documents", "each starts anew: nothing is seen of the one before it"
    yield "steps", f"{facts.step:,} of {config.steps:,}"
    yield "tokens", f"{facts.tokens:,}"
    losses = [line["loss"] for line in facts.metrics if line.get("loss") is not None]
    if losses:
        yield "last training loss", f"{losses[-1]:.4f} nats/token"
    for key in HYPERPARAMETERS:
        yield key, _value(getattr(config.train, key))
    if LanguageModel.on_meta(config.model, config.moe).balanced_routers():
        yield "balance_weight", _value(config.moe.balance_weight)
    yield "seed", str(config.run.seed)


def _results(facts: Facts) -> Iterator[tuple[str, ...]]:
    """The last validation of every set."""
    last = next((line for line in reversed(facts.metrics) if {"validation", "tokens"} <= line.keys()), None)
    for name, scores in (last or {}).get("validation", {}).items():
        assert last is not None
        figures = [_figure(scores.get(key), digits) for key, digits in FIGURES.items()]
        yield f"{last['step']:,}", f"{last['tokens']:,}", name, *figures


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _value(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else str(value)


def _join(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + [*words[-1:]])


def _table(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ("", "")) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
