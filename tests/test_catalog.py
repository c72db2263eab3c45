"""The tables are complete and say what is so."""

import ast
import inspect
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmerge as jm
from jaxmerge import catalog
from jaxmerge.cli.actions.methods import markdown
from jaxmerge.io.convert import TARGETS
from jaxmerge.io.trees import TREE_FORMATS
from jaxmerge.layouts import LAYOUTS
from jaxmerge.spaces import Space

SOURCE = Path(jm.__file__).parent

# A module may import from lower floors, and from its own package.
FLOORS = {
    "markup": -2, "values": -2, "words": -2, "tables": -1,
    "base": 0, "threads": 0, "catalog": 0, "layouts": 0, "version": 0,
    "svd": 1,
    "memory": 2, "selection": 2, "datafree": 2, "lowrank": 2, "sharding": 2, "lapack": 2, "spectrum": 2,
    "sparsify": 3, "dense": 3, "metrics": 3,
    "consensus": 4, "extras": 4, "io": 4, "spaces": 4,
    "methods": 5, "stages": 5, "inspection": 5,
    "merging": 6,
    "comparison": 7, "attribution": 7,
    "sweeps": 7, "resizing": 7, "previewing": 7, "converting": 7,
    "recipes": 8, "reports": 8, "plots": 9, "verification": 9,
    "cli": 10, "__main__": 11,
}  # fmt: skip


LAWS = {"single", "negation", "homogeneity", "zeros", "order"}


@pytest.mark.parametrize("name", jm.METHODS)
def test_a_row_agrees_with_its_function(name):
    row = jm.METHODS[name]
    parameters = inspect.signature(row.load()).parameters
    own = [p for p in parameters if p not in ("task_tensors", "weights", "key", "ranks", "rank")]
    assert own == [h.name for h in row.hyperparameters]
    assert ("key" in parameters) == row.random
    assert ("ranks" in parameters) == row.ranked
    assert ("rank" in parameters) == row.on_units
    for hyperparameter in row.hyperparameters:
        default = parameters[hyperparameter.name].default
        assert hyperparameter.default == (None if default is inspect.Parameter.empty else default)
        assert (hyperparameter.kind == "choice") == bool(hyperparameter.choices)
    assert row.space in row.spaces
    assert set(row.spaces) <= set(jm.SPACES)
    assert (set(row.spaces) == set(jm.SPACES)) == (not row.elsewhere)  # Why not, wherever not.
    assert row.most is None or row.least <= row.most
    assert set(row.breaks) <= LAWS
    assert all(row.breaks.values())
    assert row.equivariant or not row.linear
    assert row.summary
    assert any(source in row.paper for source in ("arXiv", "PEFT", "https://"))


@pytest.mark.parametrize("name", jm.METHODS)
def test_equivariant_means_it_commutes_with_rotations(name):
    row = jm.METHODS[name]
    rng = np.random.default_rng(0)
    n = row.most or 3
    tasks = rng.normal(size=(3, 6, 5)).astype(np.float32)[:n]
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    p, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    values = {h.name: 0.5 if h.kind == "density" or h.default is None else h.default for h in row.hyperparameters}
    key = {"key": jax.random.key(0)} if row.random else {}
    key |= {"rank": 6} if row.on_units else {}

    def merged(tasks):
        return row.load()(tasks.astype(np.float32), [1.0, 2.0, -1.0][:n], **values, **key)

    assert np.allclose(merged(q @ tasks @ p), q @ merged(tasks) @ p, atol=1e-4) == row.equivariant
    linear = np.einsum("n,nij", [1, 2, -1][:n], tasks)
    assert np.allclose(merged(tasks), linear, atol=1e-5) == row.linear


@pytest.mark.parametrize("name", jm.SPACES)
def test_spaces_load(name):
    for method in jm.METHODS.values():
        assert isinstance(jm.SPACES[name].load(method), Space)
    row = jm.SPACES[name]
    assert row.summary
    assert row.exact
    assert "arXiv" in row.paper or "PEFT" in row.paper
    # What a space takes itself is what its form takes beside the factors and the rank.
    parameters = inspect.signature(_plain(row).project).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY}
    assert own == {h.name: h.default for h in row.hyperparameters}


def _plain(row):
    """The space's own form, for methods that see its entries."""
    return row.load(jm.METHODS["ties"])


@pytest.mark.parametrize("name", catalog.STAGES)
def test_a_stage_agrees_with_its_function(name):
    row = catalog.STAGES[name]
    parameters = inspect.signature(row.load()).parameters
    own = {h.name: h.default for h in row.hyperparameters if h.name != "scope"}
    given = {p: x.default for p, x in parameters.items() if p not in ("merged", "sources", "weights", "paths")}
    assert own == {p: None if default is inspect.Parameter.empty else default for p, default in given.items()}
    assert row.summary
    assert any(source in row.paper for source in ("arXiv", "https://"))


def test_the_readme_has_the_tables():
    """`jaxmerge methods --markdown` prints them."""
    readme = (SOURCE.parent / "README.md").read_text()
    for mark, table in markdown().items():
        assert f"<!-- {mark} -->\n{table}\n<!-- /{mark} -->" in readme, mark


def test_hyperparameters_of_one_name_are_of_one_kind():
    """The command line has one option for each name."""
    kinds = {}
    for user, row in {**jm.METHODS, **jm.SPACES}.items():
        for h in row.hyperparameters:
            kinds.setdefault(h.name, {}).setdefault((h.kind, h.choices), []).append(user)
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def test_combination_types_are_cells_of_the_grid():
    assert len(jm.COMBINATION_TYPES) == 11
    for row in jm.COMBINATION_TYPES.values():
        assert row.method in jm.METHODS
        assert row.space in jm.SPACES


@pytest.mark.parametrize("name", sorted(set(jm.__all__)))
def test_public_names_resolve_and_are_documented(name):
    value = getattr(jm, name)
    if callable(value):
        doc = inspect.getdoc(value)
        assert doc
        if inspect.isfunction(value):
            assert "Returns:" in doc or name == "save"
            assert "Args:" in doc or not inspect.signature(value).parameters
    assert name in dir(jm)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        jm.nonsense  # noqa: B018


def test_imports_only_go_down():
    for path in SOURCE.rglob("*.py"):
        module = path.relative_to(SOURCE).with_suffix("").parts
        if module == ("__init__",):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            for imported in _imported(node):
                assert module[0] == imported or FLOORS[imported] < FLOORS[module[0]], (path, imported)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxmerge"):
        parts = (node.module or "").split(".")
        return [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("jaxmerge.")]
    return []


def test_torch_is_imported_in_one_place():
    importing = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(alias.name == "torch" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "torch")
    }
    # io/peft/weights.py only asks whether torch is there; io/__init__.py only names its types.
    assert importing == {"io/torch.py", "io/peft/weights.py", "io/__init__.py"}


def test_the_lists_of_formats_are_those_of_the_tables():
    assert tuple(TREE_FORMATS) == catalog.TREES
    assert ("peft", *TARGETS) == catalog.FORMATS
    assert {form for tables in LAYOUTS.values() for form in tables} <= set(TARGETS)
