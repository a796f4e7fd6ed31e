"""How fast a run goes, and how much of what its devices can do it uses."""

import time

import jax
import jax.numpy as jnp

# Rows of the square matrices whose product is the measure: large enough that a device is at its best,
# small enough to take no time.
_ROWS = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
_REPEATS = 5


def gemm(dtype: str) -> float:
    """FLOP/s of a product of `dtype` factors, summed in float32, on one device: the best of a few."""
    rows = _ROWS.get(jax.default_backend(), 4096)
    device = jax.local_devices()[0]
    x = jax.device_put(jnp.ones((rows, rows), dtype), device)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - begun)
    return 2.0 * rows**3 / best


class Speed:
    """Numbers of a step from its seconds.

    Args:
        rate: what `gemm` found on one device. devices: of the mesh.
    """

    def __init__(self, rate: float, devices: int):
        self._rate, self._devices = rate, devices

    def of(self, seconds: float, tokens: int, episodes: int, flops: int) -> dict[str, float]:
        """tokens/s, episodes/s, and the share of `devices` products' rate that the model's FLOPs are.

        Args:
            tokens: of the decoder's texts, padding left out. flops: of the model, without remat.
        """
        return {
            "tokens_per_second": tokens / seconds,
            "episodes_per_second": episodes / seconds,
            "utilisation": flops / seconds / (self._rate * self._devices),
        }
