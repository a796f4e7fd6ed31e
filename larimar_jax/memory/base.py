"""The contract of a memory: its parameters, its reading, and the functions that every variant offers.

A variant is a frozen dataclass of hyperparameters in a file of its own in this folder, registered
as a pytree by `@pytree`: sizes and choices are `static()` fields, real numbers are leaves, so that
a sweep over a ridge is one `vmap` and one compilation. All functions are pure and act on **one**
memory; each is one compiled program for its shapes, wherever it is called from.

    memory = Streaming(slots=512, latent=768)
    params = memory.init(key)                             # M₀ and log σ_W²: learned
    prepared = memory.prepare(params)                     # + M_ref†: once per batch of episodes
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
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from larimar_jax.linalg import dot
from larimar_jax.memory import variance
from larimar_jax.memory.addressing import Addressing, PseudoInverse
from larimar_jax.memory.pytrees import Latents, Real, Weights, pytree, static
from larimar_jax.memory.variance import Setting

Signs = int | Int[Array, ""] | Int[Array, "N"]
State = Any  # each variant's own pytree


@pytree
class MemoryParams:
    """The learned parameters: M₀, log σ_W² (§3), and M_ref (§4) where it is not M₀ itself.

    log_variance is b of memory/variance.py, a scalar or [K]; variance_by_query and
    variance_by_memory are its A and B, None where log σ_W² does not depend on query or memory.
    """

    prior_memory: Float[Array, "K C"]
    log_variance: Float[Array, "*K"]
    reference_memory: Float[Array, "K C"] | None = None
    variance_by_query: Float[Array, "C K"] | None = None
    variance_by_memory: Float[Array, "K C K"] | None = None


@pytree
class Prepared(MemoryParams):
    """Float32 parameters with their M_ref, and what addressing computes of M_ref (`address`)."""

    address: Any = None


@pytree
class Reading:
    """The result of a read, one row per query.

    latent: Z_read = W M. weights: the mean W̄ of q(W), whether or not W was sampled.
    log_variance: that of q(W), for the KL of Eq. 1. confidence: in [0, 1], the share of the query's
    squared addressing weights under M_ref that the written keys explain: 0 for a query orthogonal
    to everything written (and for a memory that is still the prior), 1 for a key that was written.
    """

    latent: Float[Array, "Q C"]
    weights: Float[Array, "Q K"]
    log_variance: Float[Array, "Q K"]
    confidence: Float[Array, "Q"]


def observe(
    keys: Latents, values: Latents, noise: Real, rng: PRNGKeyArray | None
) -> tuple[Latents, Latents]:
    """Return Z' = Z + ξ, ξ ~ N(0, noise² I) (Algorithm 1), in float32; without a key, Z itself.

    Key and value share one ξ, because in Algorithm 1 they are the same Z'. Padding stays zero.
    """
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    if rng is None:
        return keys, values
    xi = noise * jax.random.normal(rng, keys.shape, jnp.float32)
    noisy = (jnp.where(jnp.any(z != 0, axis=1, keepdims=True), z + xi, z) for z in (keys, values))
    return tuple(noisy)


def mask_signs(rows: Float[Array, "N n"], signs: Signs) -> Float[Array, "N"]:
    """Return the signs of N facts, 0 where a row (of keys or weights) is zero: padding."""
    signs = jnp.broadcast_to(jnp.asarray(signs, jnp.float32), rows.shape[:1])
    return jnp.where(jnp.any(rows != 0, axis=1), signs, 0.0)


def share(part: Float[Array, "Q"], whole: Float[Array, "Q"]) -> Float[Array, "Q"]:
    """Return part / whole within [0, 1], and 0 for an empty whole; both are squared norms."""
    is_empty = whole <= 0
    return jnp.where(is_empty, 0.0, jnp.clip(part / jnp.where(is_empty, 1.0, whole), 0.0, 1.0))


def _compiled_update(update):
    """Compile `update`: a sign that is a Python int is a constant, on which a variant may branch."""
    of_constant, of_array = jax.jit(update, static_argnames="signs"), jax.jit(update)

    @functools.wraps(update)
    def call(self, prepared, state, keys, values, signs):
        run = of_constant if isinstance(signs, int) else of_array
        return run(self, prepared, state, keys, values, signs=signs)

    return call


@pytree
class Memory(abc.ABC):
    """The contract; `slots` is K, `latent` is C.

    initial: M₀ at the start, the K x C identity (released code) or i.i.d. N(0, 1) (Table 4).
    noise: the standard deviation of ξ at writing, used only where a write is given a random key.
    initial_log_variance: log σ_W² at the start; 0 is the variance of the prior over W.
    variance: what log σ_W² depends on (memory/variance.py; the released code's 0 to 4). It decides
    what `init` creates; a read uses the parameters that it is given.
    addressing: how encodings become weights over M_ref (addressing.py).

    A variant defines `empty`, `update` and `matrix`, and `residual` or `confidence`. It declares what
    the contract's tests hold it to. SAME: what is the same whatever the order and grouping of facts,
    and after forgetting as if never written: the "matrix", only what is read ("reads"), or "nothing".
    STORES: whether a written fact can be read back at all. FORGETS: whether it can be forgotten; every
    forget is refused else.
    """

    SAME: ClassVar[Literal["matrix", "reads", "nothing"]] = "matrix"
    STORES: ClassVar[bool] = True
    FORGETS: ClassVar[bool] = True

    slots: int = static()
    latent: int = static()
    initial: Literal["identity", "normal"] = static(default="identity", kw_only=True)
    noise: Real = dataclasses.field(default=1e-6, kw_only=True)
    initial_log_variance: Real = dataclasses.field(default=0.0, kw_only=True)
    variance: Setting = static(default="scalar", kw_only=True)
    addressing: Addressing = dataclasses.field(default=PseudoInverse(), kw_only=True)

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        # Called op by op these would take 40 times as long.
        for name in {"empty", "update", "read", "matrix"} & set(vars(cls)):
            compiled = _compiled_update if name == "update" else jax.jit
            setattr(cls, name, compiled(vars(cls)[name]))

    def init(self, key: PRNGKeyArray) -> MemoryParams:
        """Create M₀ [K, C] and the parameters of log σ_W²."""
        if self.initial == "identity":
            prior = jnp.eye(self.slots, self.latent, dtype=jnp.float32)
        else:
            prior = jax.random.normal(key, (self.slots, self.latent), jnp.float32)
        constant, by_query, by_memory = variance.init(
            self.variance, self.slots, self.latent, self.initial_log_variance
        )
        return MemoryParams(prior, constant, None, by_query, by_memory)

    @functools.partial(jax.jit, static_argnames="few_encodings")
    def prepare(self, params: MemoryParams, *, few_encodings: bool = False) -> Prepared:
        """Compute what depends on the parameters alone, which a batch of episodes shares.

        Args:
          few_encodings: prepare for few encodings and not for many, as in training, where the
            parameters change soon. The weights are the same, to rounding.
        Raises:
          ValueError: a parameter has a shape of other sizes than this memory's.
        """
        self._check(params)
        arrays = vars(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
        if params.reference_memory is None:
            arrays["reference_memory"] = arrays["prior_memory"]
        address = self._address(arrays["reference_memory"], few_encodings)
        return Prepared(**arrays, address=address)

    def _address(self, reference: Float[Array, "K C"], few_encodings: bool) -> Any:
        """Compute what addressing needs of M_ref."""
        kind = self.addressing
        return kind.prepare_few(reference) if few_encodings else kind.prepare(reference)

    @jax.jit
    def address(self, prepared: Prepared, encodings: Latents) -> Weights:
        """Return W of N encodings, float32: by M_ref, so that a key is recomputed to forget it."""
        return self.addressing.weigh(prepared.address, encodings.astype(jnp.float32))

    def address_facts(
        self, prepared: Prepared, keys: Latents, values: Latents, signs: Signs
    ) -> tuple[Float[Array, "N K"], Float[Array, "N C"], Float[Array, "N"]]:
        """Return the addressing weights, values and signs of N facts, float32; padding has sign 0."""
        weights = self.address(prepared, keys)
        return weights, values.astype(jnp.float32), mask_signs(weights, signs)

    def _check(self, params: MemoryParams) -> None:
        k, c = self.slots, self.latent
        # One element of a wrong shape would broadcast, and σ_W differ from what was learned.
        expected = {
            "prior_memory": ((k, c),),
            "reference_memory": ((k, c),),
            "log_variance": ((), (k,)),
            "variance_by_query": ((c, k),),
            "variance_by_memory": ((k, c, k),),
        }
        for name, shapes in expected.items():
            value = getattr(params, name)
            if value is not None and value.shape not in shapes:
                raise ValueError(
                    f"{name} has shape {value.shape}, a memory of {k} slots and latent size {c} "
                    f"expects {' or '.join(map(str, shapes))}. Parameters of another model? Build "
                    "the memory with the sizes of its file."
                )

    @abc.abstractmethod
    def empty(self, prepared: Prepared) -> State:
        """Return the state before anything is written; its memory is M₀."""

    @abc.abstractmethod
    def update(
        self, prepared: Prepared, state: State, keys: Latents, values: Latents, signs: Signs
    ) -> State:
        """Write N facts (sign +1), forget them (−1), or leave them out (0); one sign each, or for all.

        A batch at once, one by one, or in any other order gives the same memory; a fact written
        twice must be forgotten twice. `state.refused` counts the forgets of what was not in the
        memory (each variant documents how far it can tell), which leave the memory as it was.
        """

    def write(
        self,
        prepared: Prepared,
        state: State,
        keys: Latents,
        values: Latents,
        rng: PRNGKeyArray | None = None,
    ) -> State:
        """Write N facts (α = +1), with observation noise where a random key is given."""
        return self.update(prepared, state, *observe(keys, values, self.noise, rng), 1)

    def forget(self, prepared: Prepared, state: State, keys: Latents, values: Latents) -> State:
        """Forget N facts (α = −1), as if they had never been written."""
        return self.update(prepared, state, *observe(keys, values, self.noise, None), -1)

    @jax.jit
    def read(
        self, prepared: Prepared, state: State, queries: Latents, rng: PRNGKeyArray | None = None
    ) -> Reading:
        """Read Q queries, Z_read = W M; with a random key W ~ N(W̄, σ_W² I), else W = W̄."""
        mean = self.query_weights(prepared, state, queries)
        log_variance = self.log_variance(prepared, state, queries)
        latent = self.recall(prepared, state, variance.sample(mean, log_variance, rng))
        return Reading(latent, mean, log_variance, self.confidence(prepared, state, queries, mean))

    @abc.abstractmethod
    def matrix(self, prepared: Prepared, state: State) -> Float[Array, "K C"]:
        """Return the posterior memory M."""

    def query_weights(self, prepared: Prepared, state: State, queries: Latents) -> Weights:
        """Return W̄ of Q queries; by M_ref, unless a variant addresses otherwise."""
        return self.address(prepared, queries)

    def recall(self, prepared: Prepared, state: State, weights: Weights) -> Latents:
        """Return W M."""
        return dot(weights, self.matrix(prepared, state))

    def confidence(
        self, prepared: Prepared, state: State, queries: Latents, weights: Weights
    ) -> Float[Array, "Q"]:
        """Return 1 − ‖residual‖² / ‖w‖² of queries with these weights."""
        squared = jnp.sum(jnp.square(weights), axis=1)
        left = jnp.sum(jnp.square(self.residual(prepared, state, weights)), axis=1)
        return share(squared - left, squared)

    def residual(self, prepared: Prepared, state: State, weights: Weights) -> Weights:
        """Return what no written key explains of addressing weights."""
        raise NotImplementedError(f"{type(self).__name__} defines neither residual nor confidence")

    def log_variance(self, prepared: Prepared, state: State, queries: Latents) -> Weights:
        """Return log σ_W² of Q reads (§3), float32; see memory/variance.py."""
        uses_matrix = prepared.variance_by_memory is not None
        matrix = self.matrix(prepared, state) if uses_matrix else None
        return variance.log_variance(prepared, queries.astype(jnp.float32), matrix)

    def for_edits(self) -> "Memory":
        """Return what edits with these parameters (§4: keys and queries are prompts): itself, unless
        it reads by another rule in training."""
        return self

    def generate(
        self, prepared: Prepared, state: State, n: int, rng: PRNGKeyArray
    ) -> Float[Array, "n C"]:
        """Generate Z = W M with W ~ N(0, I) (Algorithm 1)."""
        weights = jax.random.normal(rng, (n, self.slots), jnp.float32)
        return dot(weights, self.matrix(prepared, state))
