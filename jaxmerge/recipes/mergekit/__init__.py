"""Recipes of mergekit's become recipes of jaxmerge's, for the methods that both have.

What mergekit means by its parameters is known from its behaviour (tests/goldens/mergekit). Its models are whole; here
they are adapters of one base model, which mergekit writes ``BASE+ADAPTER``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxmerge.catalog import DTYPES
from jaxmerge.recipes.mergekit.methods import ARC, DRAWS, ELSEWHERE, METHODS, WANTED, Method
from jaxmerge.recipes.model import UNREAD, Gradient, Recipe, Rule, Rules, Source, Stage, Value
from jaxmerge.recipes.nodes import Node
from jaxmerge.recipes.places import Place, Places, Problem, unknown
from jaxmerge.recipes.varying import changed, leaves, shares

_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source",
         "chat_template", "slices", "modules")  # fmt: skip
# Keys by which a file is known to be mergekit's.
_MARKS = ("merge_method", "models", "slices", "modules")

_NO_ADAPTERS = ("tokenizer", "tokenizer_source", "chat_template")


def is_its_form(root: Node) -> bool:
    """Whether a document is a recipe of mergekit's."""
    return any(name in root.value for name in _MARKS) and "adapters" not in root.value


def translated(root: Node, file: str, folder: str, problems: list[Problem]) -> Recipe:
    """A recipe of jaxmerge's that does what one of mergekit's says.

    Args:
        root: Of mergekit's recipe.
        file: What problems call it.
        folder: Where it lies; paths are taken from there.
        problems: That have been found so far.

    Returns:
        The recipe, with notes of what differs, and its faults.
    """
    return _Translation(root, file, folder, problems).recipe()


class _Translation:
    """The way from one form to the other; what is wrong is gathered on it."""

    def __init__(self, root: Node, file: str, folder: str, problems: list[Problem]):
        self.root, self.file, self.folder, self.problems = root, file, folder, problems
        self.lines: dict[Place, int] = {}
        self.notes: list[str] = []

    def tell(self, line: int, text: str) -> None:
        self.problems.append(Problem(self.file, line, text))

    def recipe(self) -> Recipe:
        top = self.known(self.root, _KEYS, "a recipe of mergekit's")
        for name in ("slices", "modules"):
            if name in top:
                self.tell(
                    self.line(self.root, name), f"{name} puts layers of models together, and an adapter has its layers"
                )
        self.notes += [f"{name} is left out: an adapter has none" for name in _NO_ADAPTERS if name in top]
        method = self.method(top)
        models = top["models"].value if "models" in top and isinstance(top["models"].value, list) else []
        if "models" not in top and not {"slices", "modules"} & set(top):
            self.tell(self.root.line, "a recipe of mergekit's needs models: the list of what is merged")
        elif "models" in top and not models:
            self.tell(top["models"].line, "models should be a list, as in [{model: BASE+ADAPTER}]")
        common = self.mapping(top.get("parameters"), "parameters")
        if method is None:
            return self.finished({"adapters": ()})
        self.check_parameters(method, common, {**method.of_models, **method.of_merge, **method.fixed}, "the merge")
        entries = self.entries(models, method)
        base = self.base(top.get("base_model"))
        sources = self.tasks(entries, base, method)
        made = self.made(method, sources, common)
        made |= self.dtype(top)
        return self.finished(made)

    def finished(self, made: dict[str, Any]) -> Recipe:
        meant = [(name,) for name in ("adapters", "method", "density", "t", "seed")] if self.problems else []
        return Recipe(
            **made,
            folder=self.folder,
            notes=tuple(self.notes),
            places=Places(self.file, {("method",): self.line(self.root, "merge_method"), **self.lines}, meant),
            faults=tuple(self.problems),
        )

    def line(self, node: Node, name: str) -> int:
        return (node.keys or {}).get(name, node.line)

    def known(self, node: Node, names: Sequence[str], owner: str) -> dict[str, Node]:
        found = {}
        for name, child in node.value.items():
            if name not in names:
                self.tell(self.line(node, name), unknown("key", name, names, f"{owner} has"))
            elif child.value is None:
                self.tell(self.line(node, name), f"{name} has no value")
            else:
                found[name] = child
        return found

    def mapping(self, node: Node | None, name: str) -> Node:
        if node is None:
            return Node(self.root.line, {}, {})
        if not isinstance(node.value, dict):
            self.tell(node.line, f"{name} should be a mapping")
            return Node(node.line, {}, {})
        return node

    def method(self, top: Mapping[str, Node]) -> Method | None:
        if "merge_method" not in top:
            if "merge_method" not in self.root.value:
                self.tell(self.root.line, "a recipe of mergekit's needs merge_method")
            return None
        node = top["merge_method"]
        if not isinstance(node.value, str):
            self.tell(node.line, f"merge_method should be a text, got {node.plain()!r}")
            return None
        if node.value in ELSEWHERE:
            self.tell(node.line, f"merge_method {node.value} is mergekit's alone: {ELSEWHERE[node.value]}")
            return None
        if node.value not in METHODS:
            self.tell(node.line, unknown("merge_method", node.value, list(METHODS)))
            return None
        found = METHODS[node.value]
        self.notes += found.notes
        return found

    def check_parameters(self, method: Method, given: Node, names: Mapping[str, Any], owner: str) -> None:
        """Tells parameters that are not known, that have no value, or that can only have another one."""
        for name, child in self.known(given, list(names), owner).items():
            fixed = method.fixed.get(name)
            if fixed is not None and child.plain() is not fixed[0]:
                shown = str(fixed[0]).lower()
                self.tell(self.line(given, name), f"{name} can only be {shown}: {fixed[1]}")

    def entries(self, models: Sequence[Node], method: Method) -> list[tuple[Node, Node]]:
        """The models and their parameters."""
        found = []
        for node in models:
            if not isinstance(node.value, dict):
                self.tell(node.line, "a model is a mapping, as in {model: BASE+ADAPTER}")
                continue
            own = self.known(node, ("model", "parameters"), "a model")
            if "model" not in own or not isinstance(own["model"].value, str):
                if "model" not in node.value or "model" in own:
                    self.tell(node.line, "model should be a text, as in BASE+ADAPTER")
                continue
            parameters = self.mapping(own.get("parameters"), "parameters")
            for name in parameters.value:
                if name in {**method.of_merge, **method.fixed}:
                    self.tell(self.line(parameters, name), f"{name} is not a model's own: it belongs to parameters")
            others = {**method.of_models, **method.of_merge, **method.fixed}
            self.known(parameters, list(others), "a model of this method")
            found.append((own["model"], parameters))
        return found

    def base(self, node: Node | None) -> Node | None:
        if node is not None and not isinstance(node.value, str):
            self.tell(node.line, f"base_model should be a text, got {node.plain()!r}")
            return None
        return node

    def tasks(self, entries: list[tuple[Node, Node]], base: Node | None, method: Method) -> list[tuple[Source, Node]]:
        """The adapters, and the parameters of each: the first model first where the base model is one of them."""
        if method.base == "first":
            if base is None:
                self.tell(self.root.line, "base_model is missing: it is the first of the two that are merged")
                return []
            entries = [(base, Node(base.line, {}, {})), *(entry for entry in entries if entry[0].value != base.value)]
            base = None
        if base is not None and "+" in base.value and method.base == "zero":
            self.tell(base.line, "base_model is the model that the adapters were trained on, without an adapter")
        found: list[tuple[Source, Node]] = []
        bases: dict[str, Node] = {} if base is None else {base.value.partition("+")[0].partition("@")[0]: base}
        for node, parameters in entries:
            if base is not None and node.value == base.value:
                self.notes.append(f"{node.value} is left out of models: the base model has no change to merge")
                continue
            own_base, path = _split(node.value)
            if own_base:
                bases.setdefault(own_base, node)
            if re.search(r"@[^/]*$", path):
                self.tell(
                    node.line, f"{path} names a revision on a model hub: give the adapter's folder on this machine"
                )
            self.lines[("adapters", len(found))] = node.line
            found.append((Source(path=path), parameters))
        if len(bases) > 1:
            listed = ", ".join(bases)
            self.tell(list(bases.values())[-1].line, f"the adapters are of different base models: {listed}")
        return found

    def made(self, method: Method, tasks: list[tuple[Source, Node]], common: Node) -> dict[str, Any]:
        """The recipe's own arguments."""
        name = str(self.root.value["merge_method"].value)
        each = {
            parameter: [self.own(parameter, i, node, common, default) for i, (_, node) in enumerate(tasks)]
            for parameter, default in method.of_models.items()
        }
        merge = {
            parameter: self.value(common, parameter, (_OURS.get(parameter, parameter),), default)
            for parameter, default in method.of_merge.items()
        }
        made: dict[str, Any] = {"method": method.method, "hyperparameters": dict(method.choices)}
        weights: list[Value] = [1.0] * len(tasks)
        if "weight" in each:
            weights = self.weights(name, method, each.pop("weight"), merge)
        if name == "slerp" and len(tasks) == 2:
            weights = self.along_arc(merge["t"], self.line(common, "t"))
        if name == "task_arithmetic":
            each.pop("density")
        if "election" in method.choices:
            made["hyperparameters"]["divisor"] = "weight" if merge["normalize"] else "none"
        if "epsilon" in each:  # Half of the window there, and the whole of it here.
            each["epsilon"] = [changed(value, lambda x: 2 * x) for value in each["epsilon"]]
        for theirs, ours in {"select_topk": "density", "max_iter": "max_iter", "tol": "tol"}.items():
            if theirs in merge:
                made["hyperparameters"][ours] = merge[theirs]
        if name == "nearswap":
            made["hyperparameters"]["t"] = merge["t"]
        if merge.get("lambda", 1.0) != 1.0:
            made["stages"] = (Stage("scale", {"factor": merge["lambda"]}),)
        if DRAWS in method.notes:
            made["seed"] = 0
        made["adapters"] = tuple(
            replace(source, weight=weight, hyperparameters={name: values[i] for name, values in each.items()})
            for i, ((source, _), weight) in enumerate(zip(tasks, weights, strict=True))
        )
        return made

    def along_arc(self, t: Value, line: int) -> list[Value]:
        """The weights of the two ends at a part of the way."""
        if not all(0 <= number <= 1 for _, number in leaves(t)):
            self.tell(line, "t is a part of the way from one model to the other, from 0 to 1")
        self.lines |= {("adapters", i, "weight"): line for i in (0, 1)}
        return [changed(t, lambda part: 1 - part), t]

    def weights(self, name: str, method: Method, weights: list[Value], merge: Mapping[str, Any]) -> list[Value]:
        """What mergekit's weights are here, where a sum that is divided by them has them divided."""
        line = self.line(self.root, "merge_method")
        if name == "nuslerp" and any(isinstance(w, int | float) and w < 0 for w in weights):
            self.notes.append("a negative weight turns an adapter around; mergekit goes on beyond the other one")
        if name in ("nuslerp", "multislerp") and "base_model" not in self.root.value:
            self.notes.append(ARC)
        unread = not weights or not all(any(leaves(weight)) for weight in weights)
        if "election" in method.choices or "normalize" not in merge or unread:
            return weights
        if not merge["normalize"]:
            if name == "linear" and not _sum_to_one(weights):
                self.tell(line, "without normalize weights that do not sum to 1 scale the base model too, which an "
                                "adapter cannot: merge_method task_arithmetic leaves it as it is")  # fmt: skip
            return weights
        divided = shares(weights, zero_divides=name == "linear")
        if divided is None:
            self.tell(line, "weights that vary can be normalized here only where their sum does not: write weights "
                            "that sum to 1, and normalize: false in the parameters")  # fmt: skip
            return weights
        return divided

    def own(self, name: str, i: int, node: Node, common: Node, default: Any) -> Value:
        where = node if name in node.value else common
        return self.value(where, name, ("adapters", i, name), default)

    def value(self, given: Node, name: str, place: Place, default: Any) -> Value:
        """A parameter's value, filters as rules; its line is noted for its place in the recipe that is made of it."""
        node = given.value.get(name)
        if node is None:
            if name not in given.value and default is WANTED:
                self.tell(
                    self.line(self.root, "merge_method"),
                    f"merge_method {self.root.value['merge_method'].value} needs {name}",
                )
            return UNREAD if default is WANTED else default
        self.lines[place] = self.line(given, name)
        if isinstance(default, bool):
            if not isinstance(node.value, bool):
                self.tell(self.line(given, name), f"{name} should be true or false, got {node.plain()!r}")
                return default
            return node.value
        return self.read(node, place, name)

    def read(self, node: Node, place: Place, name: str) -> Value:
        is_list = isinstance(node.value, list) and node.value
        if is_list and all(isinstance(child.value, dict) for child in node.value):
            return Rules(tuple(self.rule(child, (*place, i), name) for i, child in enumerate(node.value)))
        return self.gradient(node, name)

    def rule(self, node: Node, place: Place, name: str) -> Rule:
        own = self.known(node, ("filter", "value"), f"a value of {name}")
        self.lines[place] = node.line
        match = _glob(own["filter"].plain()) if "filter" in own else None
        if "value" not in own:
            self.tell(node.line, f"a filter of {name} has no value")
            return Rule(match, UNREAD)
        return Rule(match, self.gradient(own["value"], name))

    def gradient(self, node: Node, name: str) -> Value:
        if not isinstance(node.value, list):
            return self.number(node, name)
        if not node.value or any(isinstance(child.value, dict | list) for child in node.value):
            self.tell(node.line, f"{name} should be a number, a list of numbers, or a list of filters")
            return UNREAD
        points = tuple(self.number(child, name) for child in node.value)
        return UNREAD if UNREAD in points else Gradient(points)

    def number(self, node: Node, name: str) -> Any:
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            self.tell(node.line, f"{name} should be a number, got {node.plain()!r}")
            return UNREAD
        return node.value

    def dtype(self, top: Mapping[str, Node]) -> dict[str, Any]:
        node = top.get("out_dtype", top.get("dtype"))
        for name in ("dtype", "out_dtype"):
            if name in top and top[name].value not in DTYPES:
                self.tell(top[name].line, unknown(name, top[name].plain(), DTYPES))
                return {}
        if "dtype" in top:
            self.notes.append(f"dtype {top['dtype'].value} is that of the result: arithmetic is float32 or wider")
        return {} if node is None else {"dtype": node.value}


# Parameters of the merge that stand elsewhere in the recipe that is made of them.
_OURS = {"select_topk": "density", "lambda": "stages"}


def _split(model: str) -> tuple[str, str]:
    """The base model, without its revision, and the adapter; a model without ``+`` is taken for an adapter."""
    base, plus, adapter = model.partition("+")
    return (base.partition("@")[0], adapter) if plus else ("", model)


def _glob(part: Any) -> str:
    """A pattern for module paths that have a part of a tensor's name in them."""
    escaped = re.sub(r"([*?[])", r"[\1]", str(part))
    return f"*{escaped.removesuffix('.weight')}" if escaped.endswith(".weight") else f"*{escaped}*"


def _sum_to_one(weights: Sequence[Value]) -> bool:
    divided = shares(weights)
    return divided is not None and list(divided) == list(weights)
