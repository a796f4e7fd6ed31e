"""How reading noisy queries fails as a memory fills: the paper's write against ours (K = 512, C = 768).

command   larimar sweep --config=configs/sweep_capacity.py --out runs/capacity
hardware  2 CPU cores, 4 GB of memory
time      a minute
expected  40 cells; the pseudo-inverse's error peaks at N = K, that of `streaming` nowhere
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            latent=768,
            paired=True,
            zsre="",
            variants=dict(
                streaming=dict(variant="streaming"),
                pseudo_inverse=dict(variant="direct", query="prior"),
            ),
            slots=[512],
            facts=[16, 64, 128, 256, 384, 448, 512, 600, 1024, 2048],
            rephrasings=[0],
            noises=[0.5],
            seeds=[0, 1],
        )
    )
