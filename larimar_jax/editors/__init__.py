"""Editors of other papers, on the decoder that Larimar edits: one a file, named by the file.

Each is a `FactEditor` (editors/base.py): a frozen dataclass whose fields are its settings.
"""

from collections.abc import Mapping, Sequence

from larimar_jax import registry, schema
from larimar_jax.editors.base import BaseLM, EditedModel, FactEditor, Request

__all__ = ["BaseLM", "EditedModel", "Request", "FactEditor", "build", "names"]


def names() -> dict[str, type[FactEditor]]:
    """Return every editor of this folder, {file name: class}, without a list to edit."""
    return {
        name: cls
        for name, cls in registry.defined_classes(__name__)
        if issubclass(cls, FactEditor) and cls is not FactEditor
    }


def build(chosen: str, settings: Sequence[str] = ()) -> Mapping[str, FactEditor]:
    """Return editors by name, from "rome,memit" and settings such as "rome.layer=9".

    Raises:
        ConfigError: no such editor or setting, or a value that makes no sense; names all of them.
    """
    known, problems = names(), []
    picked = [name.strip() for name in chosen.split(",") if name.strip()]
    values = schema.override({name: {} for name in picked}, settings)
    for name in (*picked, *(name for name in values if name not in picked)):
        if name not in known:
            problems.append(f"there is no editor {name!r}; {schema.suggestion(name, known)}")
        elif name not in picked:
            problems.append(f"{name} has settings and is not among the editors {chosen!r}")
    built = {
        name: schema.read(known[name], values[name], name, problems, {})
        for name in picked
        if name in known
    }
    schema.refuse(problems)
    return built
