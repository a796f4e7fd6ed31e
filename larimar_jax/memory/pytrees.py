"""What memories and addressings are built of: array types, and dataclasses that are pytrees."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

Real = float | Float[Array, ""]
Latents = Float[Array, "N C"]
Weights = Float[Array, "N K"]  # addressing weights, a row a fact or query


def static(**options) -> Any:
    """Return a dataclass field that is part of the compiled program: a size or a choice."""
    return dataclasses.field(metadata={"static": True}, **options)


def pytree(cls):
    """Make a class a frozen dataclass and a pytree whose `static()` fields are auxiliary data.

    Unlike `jax.tree_util.register_dataclass` it rebuilds without calling the constructor: inside
    `vmap`, `jit` and `in_axes` trees the fields hold batched arrays, axis numbers or placeholders,
    which the constructor's annotations (checked in tests) rightly refuse from people.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    data = tuple(f.name for f in fields if not f.metadata.get("static"))
    meta = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten(self):
        return tuple(getattr(self, n) for n in data), tuple(getattr(self, n) for n in meta)

    def flatten_with_keys(self):
        leaves, aux = flatten(self)
        return tuple(zip(map(jax.tree_util.GetAttrKey, data), leaves, strict=True)), aux

    def unflatten(aux, leaves):
        self = object.__new__(cls)
        for name, value in (*zip(data, leaves, strict=True), *zip(meta, aux, strict=True)):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
