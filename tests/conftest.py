"""Every test runs on eight virtual CPU devices, with strict promotion and run-time shape checks."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from jaxtyping import install_import_hook

# Shape annotations are checked by beartype on every call while the tests run.
install_import_hook("larimar_jax", "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def cpu_devices():
    """The eight virtual devices that stand in for one node of GPUs."""
    devices = jax.devices()
    assert len(devices) == 8, "XLA_FLAGS must be set before jax is first imported"
    return devices


@pytest.fixture(scope="session")
def minilm():
    """The packaged MiniLM: (module, tokenizer), loaded once."""
    from larimar_jax import weights

    return weights.load_encoder("minilm")


@pytest.fixture(scope="session")
def smollm2():
    """The packaged SmolLM2: (module, tokenizer), loaded once."""
    from larimar_jax import weights

    return weights.load_decoder("smollm2")
