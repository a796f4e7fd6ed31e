"""What a memory is: the parameters, the reading, and the functions that every variant offers.

A variant is a frozen dataclass of hyperparameters in a file of its own in this folder, registered
as a pytree by `@pytree`: sizes and choices are `static()` fields, real numbers are leaves, so that
a sweep over a ridge is one `vmap` and one compilation. All functions are pure and act on **one**
memory; each is one compiled program for its shapes, wherever it is called from (`compiled`).

    memory = Streaming(slots=512, latent=768)
    params = memory.init(key)                        # M₀ and log σ_W²: learned
    prior = memory.prepare(params)                   # + M_ref†: once per batch of episodes
    state = memory.write(prepared, memory.empty(prepared), keys, values)
    reading = memory.read(prepared, state, queries)

`keys`, `values` and `queries` are encodings; addressing turns keys and queries into weights inside.
In Algorithm 1 (§3) keys and values are the same encodings; for edits (§4) the key is the encoding
of the prompt and the value that of prompt + answer. A fact whose key and value are zero is padding:
it changes nothing.
"""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from larimar_jax.linalg import dot
from larimar_jax.memory import addressing, variance
from larimar_jax.memory.variance import Setting

Real = float | Float[Array, ""]
Sign = int | Int[Array, ""] | Int[Array, "N"]
State = Any  # each variant's own pytree


def static(**options) -> Any:
    """A dataclass field that is part of the compiled program: a size or a choice, never a real."""
    return dataclasses.field(metadata={"static": True}, **options)


def compiled(function: Callable) -> Callable:
    """`jax.jit` of a function of memories: called op by op it would take 40 times as long. A `sign`
    that is a Python int is known to the program, and may be branched on; an array's is not."""
    signature = inspect.signature(function)
    if "sign" not in signature.parameters:
        return jax.jit(function)
    known, any_sign = jax.jit(function, static_argnames="sign"), jax.jit(function)

    @functools.wraps(function)
    def call(*arguments, **named):
        told = signature.bind(*arguments, **named).arguments
        return (known if isinstance(told.get("sign", 1), int) else any_sign)(*arguments, **named)

    return call


def pytree(cls):
    """Makes a class a frozen dataclass and a pytree whose `static()` fields are auxiliary data.

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


@pytree
class MemoryParams:
    """What is learned: M₀, log σ_W² (§3), and M_ref (§4) where it is not M₀ itself.

    log_variance is b of memory/variance.py, a scalar or [K]; variance_by_query and
    variance_by_memory are its A and B, None where log σ_W² does not depend on query or memory.
    """

    prior_memory: Float[Array, "K C"]
    log_variance: Float[Array, "*K"]
    reference_memory: Float[Array, "K C"] | None = None
    variance_by_query: Float[Array, "C K"] | None = None
    variance_by_memory: Float[Array, "K C K"] | None = None


@pytree
class Prepared:
    """Parameters and what every episode of a batch shares: M_ref, and what addressing makes of it."""

    memory: Float[Array, "K C"]
    log_variance: Float[Array, "*K"]
    variance_by_query: Float[Array, "C K"] | None
    variance_by_memory: Float[Array, "K C K"] | None
    reference: Float[Array, "K C"]
    address: Any


@pytree
class Reading:
    """What a read returns, one row per query.

    latent: Z_read = W M. weights: the mean W̄ of q(W), whether or not W was sampled.
    log_variance: that of q(W), for the KL of Eq. 1. confidence: in [0, 1], the share of the query's
    squared addressing weights under M_ref that the written keys explain: 0 for a query orthogonal
    to everything written (and for a memory that is still the prior), 1 for a key that was written.
    """

    latent: Float[Array, "Q C"]
    weights: Float[Array, "Q K"]
    log_variance: Float[Array, "Q K"]
    confidence: Float[Array, "Q"]


def sample(
    mean: Float[Array, "Q K"], log_variance: Float[Array, "Q K"], rng: PRNGKeyArray | None
) -> Float[Array, "Q K"]:
    """W ~ N(W̄, σ_W²), elementwise (Algorithm 1); W̄ itself without a key."""
    if rng is None:
        return mean
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(rng, mean.shape, mean.dtype)


def observe(
    keys: Float[Array, "N C"],
    values: Float[Array, "N C"],
    noise: Real,
    rng: PRNGKeyArray | None,
) -> tuple[Float[Array, "N C"], Float[Array, "N C"]]:
    """Z' = Z + ξ, ξ ~ N(0, noise² I) (Algorithm 1), without a key Z itself; float32.

    One ξ for key and value, because in Algorithm 1 they are the same Z'. Padding stays zero.
    """
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    if rng is None:
        return keys, values
    xi = noise * jax.random.normal(rng, keys.shape, jnp.float32)
    noisy = (jnp.where(jnp.any(z != 0, axis=1, keepdims=True), z + xi, z) for z in (keys, values))
    return tuple(noisy)


def share(part: Float[Array, "Q"], whole: Float[Array, "Q"]) -> Float[Array, "Q"]:
    """part / whole within [0, 1], and 0 for an empty whole; both are squared norms."""
    nothing = whole <= 0
    return jnp.where(nothing, 0.0, jnp.clip(part / jnp.where(nothing, 1.0, whole), 0.0, 1.0))


@pytree
class Memory(abc.ABC):
    """The contract; `slots` is K, `latent` is C.

    initial: M₀ at the start, the K x C identity (released code) or i.i.d. N(0, 1) (Table 4).
    noise: the standard deviation of ξ at writing, used only where a write is given a random key.
    initial_log_variance: log σ_W² at the start; 0 is the variance of the prior over W.
    variance: what log σ_W² depends on (memory/variance.py; the released code's 0 to 4). It decides
    what `init` makes; a read goes by the parameters that it is given.
    addressing: how encodings become weights over M_ref, and width: its number (addressing.py).

    A variant says what holds of it, and the contract's tests hold it to that. SAME: what is the same
    whatever the order and grouping of facts, and after forgetting as if never written: the "matrix",
    only what is read ("reads"), or "nothing". STORES: whether a written fact can be read back at all.
    """

    SAME: ClassVar[Literal["matrix", "reads", "nothing"]] = "matrix"
    STORES: ClassVar[bool] = True

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        for name in ("empty", "write", "read", "matrix"):
            if name in vars(cls):
                setattr(cls, name, compiled(vars(cls)[name]))

    slots: int = static()
    latent: int = static()
    initial: Literal["identity", "normal"] = static(default="identity", kw_only=True)
    noise: Real = dataclasses.field(default=1e-6, kw_only=True)
    initial_log_variance: Real = dataclasses.field(default=0.0, kw_only=True)
    variance: Setting = static(default="scalar", kw_only=True)
    addressing: Literal["pinv", "gaussian", "features", "whitened", "linear"] = static(
        default="pinv", kw_only=True
    )
    width: Real = dataclasses.field(default=1e-3, kw_only=True)

    def init(self, key: PRNGKeyArray) -> MemoryParams:
        """M₀ [K, C] and what log σ_W² is made of."""
        if self.initial == "identity":
            prior_memory = jnp.eye(self.slots, self.latent, dtype=jnp.float32)
        else:
            prior_memory = jax.random.normal(key, (self.slots, self.latent), jnp.float32)
        constant, by_query, by_memory = variance.init(
            self.variance, self.slots, self.latent, self.initial_log_variance
        )
        return MemoryParams(
            prior_memory, constant, variance_by_query=by_query, variance_by_memory=by_memory
        )

    @functools.partial(jax.jit, static_argnames="brief")
    def prepare(self, params: MemoryParams, *, brief: bool = False) -> Prepared:
        """What depends on the parameters alone, so that a batch of episodes shares it.

        Args:
          brief: the parameters change soon, as in training: prepare for a few encodings, and not for
            many. The weights are the same, to rounding.
        """
        self._check(params)
        memory = params.prior_memory.astype(jnp.float32)
        reference = (
            memory
            if params.reference_memory is None
            else params.reference_memory.astype(jnp.float32)
        )
        parts = (params.log_variance, params.variance_by_query, params.variance_by_memory)
        return Prepared(
            memory,
            *(None if part is None else part.astype(jnp.float32) for part in parts),
            reference,
            self._address(reference, brief),
        )

    def _address(self, reference: Float[Array, "K C"], brief: bool) -> Any:
        """What addressing needs of M_ref."""
        kind = addressing.KINDS[self.addressing]
        return (brief and kind.brief or kind.prepare)(reference, self.width)

    @compiled
    def address(self, prepared: Prepared, encodings: Float[Array, "N C"]) -> Float[Array, "N K"]:
        """W of N encodings, float32: by M_ref, so that a key can be computed again to forget it."""
        return addressing.KINDS[self.addressing].weigh(prepared.address, encodings, self.width)

    def _check(self, params: MemoryParams) -> None:
        k, c = self.slots, self.latent
        if params.prior_memory.shape != (k, c):
            raise ValueError(
                f"the prior memory has shape {params.prior_memory.shape}, this memory expects {(k, c)} "
                "(slots, latent). Parameters of another model? Build the memory with the sizes of "
                "its file."
            )
        # One element of a wrong shape would broadcast, and σ_W be another than was learned.
        expected = {
            "log_variance": ((), (k,)),
            "variance_by_query": ((c, k),),
            "variance_by_memory": ((k, c, k),),
        }
        for name, shapes in expected.items():
            value = getattr(params, name)
            if value is not None and value.shape not in shapes:
                raise ValueError(
                    f"{name} has shape {value.shape}, a memory of {k} slots and latent size {c} "
                    f"expects {' or '.join(map(str, shapes))}. Parameters of another model?"
                )

    @abc.abstractmethod
    def empty(self, prepared: Prepared) -> State:
        """The state before anything is written; its memory is M₀."""

    @abc.abstractmethod
    def write(
        self,
        prepared: Prepared,
        state: State,
        keys: Float[Array, "N C"],
        values: Float[Array, "N C"],
        sign: Sign = 1,
        rng: PRNGKeyArray | None = None,
    ) -> State:
        """Writes N facts (sign +1), forgets them (−1), or leaves them out (0).

        A batch at once, one by one, or in any other order gives the same memory; a fact written
        twice must be forgotten twice. `state.refused` counts the forgets that found nothing to
        forget (each variant says how far it can tell) and left the memory as it was.
        """

    @abc.abstractmethod
    def read(
        self,
        prepared: Prepared,
        state: State,
        queries: Float[Array, "Q C"],
        rng: PRNGKeyArray | None = None,
    ) -> Reading:
        """Reads Q queries; with a random key W ~ N(W̄, σ_W² I), else deterministic."""

    @abc.abstractmethod
    def matrix(self, prepared: Prepared, state: State) -> Float[Array, "K C"]:
        """The posterior memory M."""

    def log_variance(
        self, prepared: Prepared, state: State, queries: Float[Array, "Q C"]
    ) -> Float[Array, "Q K"]:
        """log σ_W² of Q reads (§3), float32; see memory/variance.py."""
        memory = None if prepared.variance_by_memory is None else self.matrix(prepared, state)
        return variance.log_variance(
            prepared.log_variance,
            prepared.variance_by_query,
            prepared.variance_by_memory,
            queries.astype(jnp.float32),
            memory,
            self.slots,
        )

    def generate(
        self, prepared: Prepared, state: State, n: int, rng: PRNGKeyArray
    ) -> Float[Array, "n C"]:
        """Z = W M with W ~ N(0, I) (Algorithm 1)."""
        weights = jax.random.normal(rng, (n, self.slots), jnp.float32)
        return dot(weights, self.matrix(prepared, state))
