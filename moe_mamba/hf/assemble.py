"""Assembles the two files that Transformers loads from the package's own source, so that no model is written twice.

``modeling_moe_mamba.py`` is the model, its reference kernels and a thin shell in one file that needs only torch and
Transformers; ``configuration_moe_mamba.py`` has the fields, defaults and checks of our configuration. Text is moved as
it stands, comments and docstrings with it. What is left out is named here, and imports follow from what is used.
"""

import ast
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

from moe_mamba.hf.versions import NEWEST, OLDEST
from moe_mamba.model.mixers import MIXERS, VARIANTS
from moe_mamba.model.mixers.base import Mixer

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGURATION, MODELING = "configuration_moe_mamba.py", "modeling_moe_mamba.py"
NOTICE = '''# SPDX-License-Identifier: Apache-2.0
"""{title}

Assembled from the source of the package moe_mamba by tools/assemble_hf.py: change it there, not here. Where a docstring
names one of its modules, more stands there; nothing of it is needed.
"""'''
LOCAL_NAMES = "SHARDS_TENSORS, MoEConfig, MoEMambaConfig, StackConfig"
LOCAL_IMPORTS = f"""from .{CONFIGURATION.removesuffix(".py")} import {LOCAL_NAMES}

ModelConfig = StackConfig  # what the layers read"""
WIDTH = 120


@dataclass(frozen=True)
class Part:
    """A file of the package, or some of it.

    Attributes:
        path: in the package.
        only: names of the top level to take; empty: all.
        without: names to leave out: ``function``, ``Class.method`` or ``Class.attribute``.
        prefix: put before the names of functions that are taken.
        drop: texts to leave out; each must be there, once.
    """

    path: str
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    prefix: str = ""
    drop: tuple[str, ...] = ()


_WITH_REDUCE = """    if reduce is not None:
        return torch_cross_entropy.cross_entropy(logits, targets, first, reduce)
"""
_INITIALIZERS = (
    *("Initializer", "ones", "zeros", "normal", "truncated_normal", "uniform", "matrix"),
    *("embedding_weight", "head_weight"),
)
DECLARED = (
    *("shard_specs", "hidden_specs", "kernel_operations"),
    *("idle_parameters", "flops_per_token", "depends_on_batch"),
    *("work", "hidden_work", "inner_work", "sends", "_hidden_sends", "crossings", "_routed", "_rows", "_seen"),
    *("record", "record_hidden", "record_inner", "_record_ways", "_record_rotated", "_masked"),
)
"""What mixers declare that Transformers never asks for."""


def _mixer_parts() -> tuple[Part, ...]:
    """The files of the registry's mixers; a file stands behind those that it imports."""
    modules = {mixer.__module__: mixer for mixer in (*MIXERS.values(), *VARIANTS)}
    needs = {name: {other for other in modules if f"from {other} import" in _text_of(name)} for name in modules}
    return tuple(_mixer_part(name, modules[name]) for name in TopologicalSorter(needs).static_order())


def _text_of(module: str) -> str:
    return (PACKAGE / _path_of(module)).read_text(encoding="utf-8")


def _path_of(module: str) -> str:
    return module.removeprefix("moe_mamba.").replace(".", "/") + ".py"


def _mixer_part(module: str, mixer: type[Mixer]) -> Part:
    return Part(_path_of(module), without=tuple(f"{mixer.__name__}.{name}" for name in DECLARED if name in vars(mixer)))


PARTS = (
    Part("kernels/routing/__init__.py", only=("Order",)),
    Part("kernels/routing/torch_routing.py", only=("sort_by_expert",), prefix="plain_"),
    Part("kernels/routing/reference.py", only=("gather_rows", "combine_rows"), prefix="plain_"),
    Part("hf/shell/grouped.py"),
    Part("kernels/activation/torch_activation.py", prefix="plain_"),
    Part("kernels/rms_norm/reference.py", prefix="plain_"),
    Part("kernels/cross_entropy/__init__.py", only=("IGNORED", "Reduce")),
    Part("kernels/cross_entropy/reference.py", only=("cross_entropy",), prefix="plain_", drop=(_WITH_REDUCE,)),
    Part("kernels/causal_conv/__init__.py", only=("_final_state",)),
    Part("kernels/causal_conv/reference.py", prefix="plain_"),
    Part("kernels/causal_conv/torch_conv.py", only=("causal_conv_step",), prefix="plain_"),
    Part("kernels/selective_scan/operands.py"),
    Part("kernels/selective_scan/chunked_scan.py", prefix="plain_"),
    Part("kernels/selective_scan/torch_scan.py", only=("selective_scan_step",), prefix="plain_"),
    Part("model/precision.py"),
    Part("hf/shell/kernels.py"),
    Part("model/initialize.py", only=_INITIALIZERS),
    Part("model/sequences.py"),
    Part("model/norm.py"),
    Part("model/mixers/routing.py", without=("update_balance_bias", "capacity_of", "Router.experts_per_token")),
    Part("model/mixers/dispatch.py"),
    Part("model/mixers/base.py", without=tuple(f"Mixer.{name}" for name in DECLARED if name in vars(Mixer))),
    Part("model/mixers/inner_experts.py", without=("record_experts",)),
    *_mixer_parts(),
    Part("model/mixers/__init__.py", only=("MIXERS", "VARIANTS", "choose_mixer")),
    Part(
        "model/pattern.py",
        only=("MOST_LAYERS", "LayerSpec", "layer_specs", "kinds", "has", "check_pattern", "has_experts", "looks_ahead"),
    ),
    Part("model/loss.py"),
    Part("model/layer.py", without=("build_layers",)),
    Part("hf/shell/cache.py"),
    Part("hf/shell/padding.py"),
    Part("hf/shell/order.py"),
    Part("hf/shell/experts.py"),
    Part("hf/shell/pretrained.py"),
    Part("hf/shell/backbone.py"),
    Part("hf/shell/causal_lm.py"),
    Part("hf/shell/classification.py"),
)


@dataclass
class _Source:
    """A file's text and syntax."""

    text: str
    lines: list[str] = field(init=False)
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.lines, self.tree = self.text.splitlines(), ast.parse(self.text)

    def top(self, nodes: list[ast.stmt], place: int) -> int:
        """Line, from 0, where a statement begins, with its decorators and the comments right above it."""
        node = nodes[place]
        first = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))]) - 1
        while first > 0 and self.lines[first - 1].lstrip().startswith("#"):
            first -= 1
        return first

    def of(self, nodes: list[ast.stmt], place: int) -> str:
        """Text of a statement."""
        return "\n".join(self.lines[self.top(nodes, place) : nodes[place].end_lineno])


def assemble() -> dict[str, str]:
    """Name of each file of ``moe_mamba/hf`` that is assembled -> its text.

    Raises:
        ValueError: the package's source lacks what is to be left out or put in.
    """
    return {CONFIGURATION: _configuration(), MODELING: _modeling()}


def _modeling() -> str:
    parts: list[str] = []
    imports: set[str] = set()
    for part in PARTS:
        text, needed = _take(part)
        imports |= needed
        parts.append(text)
    body = "\n\n\n".join(parts)
    title = "MoEMambaForCausalLM: a language model of Mamba, attention and mixtures of experts, for Transformers."
    names = ("Cache", "ForCausalLM", "ForSequenceClassification", "Model", "PreTrainedModel", "StaticCache")
    end = "__all__ = [\n" + "".join(f'    "MoEMamba{name}",\n' for name in names) + "]"
    head = "\n\n".join((NOTICE.format(title=title), _imports(imports, body), LOCAL_IMPORTS))
    return f"{head}\n\n{body}\n\n\n{end}\n"


def _take(part: Part) -> tuple[str, set[str]]:
    """Text of a part under a comment that says where it comes from, and its imports from outside."""
    text = (PACKAGE / part.path).read_text(encoding="utf-8")
    for unwanted in part.drop:
        if text.count(unwanted) != 1:
            raise ValueError(
                f"{part.path} has {text.count(unwanted)} times what is to be left out: {unwanted.strip()!r}"
            )
        text = text.replace(unwanted, "")
    source = _Source(_without_members(text, part))
    nodes = source.tree.body
    kept: list[str] = []
    found: set[str] = set()
    was_kept = was_block = False
    for place, node in enumerate(nodes):
        name, is_block = _name(node), isinstance(node, ast.ClassDef | ast.FunctionDef)
        if isinstance(node, ast.Import | ast.ImportFrom) or place == 0:
            continue
        if isinstance(node, ast.Expr):  # what is said of the name above it
            is_kept = was_kept
        else:
            is_kept = name in part.only if part.only else name not in part.without
        if is_kept:
            found.add(name)
            gap = 2 if is_block or was_block else source.top(nodes, place) - (nodes[place - 1].end_lineno or 0)
            code = source.of(nodes, place)
            if part.prefix and isinstance(node, ast.FunctionDef):
                code = code.replace(f"def {name}(", f"def {part.prefix}{name}(", 1)
            kept.append(("\n" * (1 + min(gap, 2)) if kept else "") + code)
            was_block = is_block
        was_kept = is_kept
    missing = set(part.only) - found
    if missing:
        raise ValueError(f"{part.path} lacks {', '.join(sorted(missing))}")
    return _banner(part, source.tree) + "".join(kept), _foreign(source.tree)


def _without_members(text: str, part: Part) -> str:
    """Leave out methods with the blank line above, and attributes with what the docstring says of them."""
    source = _Source(text)
    gone: set[int] = set()
    missing = set(part.without) - {_name(node) for node in source.tree.body}
    for node in source.tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        names = {name.split(".")[1] for name in part.without if name.startswith(f"{node.name}.")}
        for place, method in enumerate(node.body):
            first, end = source.top(node.body, place), method.end_lineno or 0
            if _name(method) in names:
                missing.discard(f"{node.name}.{_name(method)}")
                gone.update(range(first - 1, end))
            elif _name(method) == "__init__" and isinstance(method, ast.FunctionDef):
                for inner, statement in enumerate(method.body):
                    if (name := _attribute(statement)) in names:
                        missing.discard(f"{node.name}.{name}")
                        gone.update(range(source.top(method.body, inner), statement.end_lineno or 0))
            elif place == 0:
                gone.update(_said_of(names, source.lines, first, end))
    if missing:
        raise ValueError(f"{part.path} lacks {', '.join(sorted(missing))}")
    return "\n".join(line for number, line in enumerate(source.lines) if number not in gone) + "\n"


def _attribute(node: ast.stmt) -> str:
    """The attribute of ``self`` that a statement gives; empty: none."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.attr if isinstance(target, ast.Attribute) else ""


def _said_of(names: set[str], lines: list[str], first: int, end: int) -> set[int]:
    """Lines of a class's docstring that describe these attributes."""
    said: set[int] = set()
    is_said = False
    for number in range(first, end):
        if not lines[number].startswith(" " * 9):  # deeper lines go on with an entry
            is_said = lines[number].strip().split(":")[0] in names
        if is_said:
            said.add(number)
    return said


def _banner(part: Part, tree: ast.Module) -> str:
    says = (ast.get_docstring(tree) or "").splitlines()
    if part.only:
        says = says[:1]
    return "".join(f"# {line}".rstrip() + "\n" for line in (f"From moe_mamba/{part.path}:", *says)) + "\n\n"


def _name(node: ast.stmt) -> str:
    """The name that a statement gives; empty: none."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(target, ast.Name) else ""


def _foreign(tree: ast.Module) -> set[str]:
    """The imports of the top level that are not of this package, a statement for each name."""
    lines: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            lines.update(f"import {ast.unparse(alias)}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("moe_mamba"):
            lines.update(f"from {node.module} import {ast.unparse(alias)}" for alias in node.names)
    return lines


def _imports(lines: set[str], body: str) -> str:
    """Those imports that the body uses, in the order of isort."""
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    plain: dict[bool, list[str]] = {False: [], True: []}
    members: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}
    for line in sorted(lines):
        statement = ast.parse(line).body[0]
        assert isinstance(statement, ast.Import | ast.ImportFrom)
        alias = statement.names[0]
        if (alias.asname or alias.name).split(".")[0] not in used:
            continue
        module = (statement.module if isinstance(statement, ast.ImportFrom) else alias.name) or ""
        is_foreign = module.split(".")[0] in ("torch", "transformers", "huggingface_hub")
        if isinstance(statement, ast.Import):
            plain[is_foreign].append(line)
        else:
            members[is_foreign].setdefault(module, []).append(ast.unparse(alias))
    blocks = (
        "\n".join([*plain[kind], *(_from(module, members[kind][module]) for module in sorted(members[kind]))])
        for kind in (False, True)
    )
    return "\n\n".join(block for block in blocks if block)


def _from(module: str, names: list[str]) -> str:
    names = sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


_TYPES = {
    "Text": "str",
    "int": "int",
    "int | None": "Optional[int]",
    "float": "Union[float, int]",
    "VocabularySize": "int",
    "NonNegativeFloat": "Union[float, int]",
    "OptionalFactor": "Optional[Union[float, int]]",
    "OptionalBalance": 'Optional[Literal["loss", "bias", "none"]]',
    "Projections": 'list[Literal["conv", "gate", "out"]]',
    "InnerConfig": "InnerConfig",
    "bool": "bool",
}
"""A type of ``config_model.py``, without its range -> what Transformers checks in its place."""
_MUTABLE = {"[]": "list", "InnerConfig()": "InnerConfig"}
"""Defaults that a dataclass must make anew -> what makes them."""


def _configuration() -> str:
    source = _Source((PACKAGE / "config_model.py").read_text(encoding="utf-8"))
    shell = _Source((PACKAGE / "hf" / "shell" / "configuration.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in source.tree.body if isinstance(node, ast.ClassDef)}
    text = "\n".join(shell.lines[shell.tree.body[0].end_lineno :]).strip() + "\n"
    for name in ("ModelConfig", "InnerConfig", "MoEConfig"):
        fields, arguments, methods = _section(source, classes[name])
        for mark, lines in (("arguments", arguments), ("fields", fields), ("methods", methods)):
            line = (
                f"        assembled: {mark} of {name}\n"
                if mark == "arguments"
                else f"    # assembled: {mark} of {name}\n"
            )
            if text.count(line) != 1:
                raise ValueError(f"hf/shell/configuration.py lacks the line {line.strip()!r}")
            text = text.replace(line, "\n".join(lines) + "\n")
    text = text.replace("import asdict, dataclass, fields\n", "import asdict, dataclass, field, fields\n", 1)
    versions = "from moe_mamba.hf.versions import NEWEST, OLDEST\n"
    if text.count(versions) != 1:
        raise ValueError(f"hf/shell/configuration.py lacks the one line {versions.strip()!r}")
    tested = f'OLDEST, NEWEST = "{OLDEST}", "{NEWEST}"  # versions of Transformers that this was tested with\n'
    text = text.replace(versions, tested)
    return NOTICE.format(title=ast.get_docstring(shell.tree) or "") + "\n\n" + text


def _section(source: _Source, node: ast.ClassDef) -> tuple[list[str], list[str], list[str]]:
    """A section of our configuration as fields with defaults, their descriptions, and the methods."""
    fields, arguments, methods = [], [], []
    for place, item in enumerate(node.body):
        if isinstance(item, ast.AnnAssign):
            kind, call = ast.unparse(item.annotation), item.value
            if not kind.startswith("Literal"):
                kind = _TYPES[kind.removeprefix("Annotated[").partition(",")[0]]
            assert isinstance(call, ast.Call)
            says = next(word.value for word in call.keywords if word.arg == "description")
            default = (ast.get_source_segment(source.text, call.args[0]) or "").strip()
            kind = kind.replace("'", '"')
            if default in _MUTABLE:
                default = f"field(default_factory={_MUTABLE[default]})"
            fields.append(f"    {_name(item)}: {kind} = {default}")
            arguments.append(f"        {_name(item)}: {ast.literal_eval(says)}.")
        elif isinstance(item, ast.FunctionDef):
            methods.append(_plain_method(source.of(node.body, place), node.name))
    return fields, arguments, "\n\n".join(methods).splitlines()


def _plain_method(text: str, section: str) -> str:
    """A method as it stands, and the one that pydantic calls as one that returns nothing."""
    decorator, signature = '    @model_validator(mode="after")\n', f'_check(self) -> "{section}":'
    if not text.startswith(decorator):
        return text
    text = text.removeprefix(decorator).removesuffix("\n        return self")
    return text.replace(signature, "__post_init__(self) -> None:", 1)
