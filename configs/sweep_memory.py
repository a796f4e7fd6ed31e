"""Every memory, by how full it is, how far queries are from keys, and how it is set.

command   larimar sweep --config=configs/sweep_memory.py --out runs/sweep
          (with real prompts beside the random facts: --set zsre=zsre-knowedit.json)
hardware  2 CPU cores, 4 GB of memory
time      4 minutes on one core
expected  1,296 cells in 60 programs
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    ridges = [1e-3, 1e-2, 1e-1]
    return ConfigDict(
        dict(
            latent=96,
            paired=False,
            zsre="",
            variants=dict(
                streaming=dict(variant="streaming", ridge=ridges, query_noise=[0.25, 0.5, 1.0]),
                streaming_plain=dict(variant="streaming", ridge=ridges, query_noise=0.0),
                streaming_gaussian=dict(
                    variant="streaming",
                    addressing=dict(kind="gaussian", width=[1e-3, 1e-2, 1e-1]),
                    initial="normal",
                ),
                streaming_features=dict(
                    variant="streaming",
                    addressing=dict(kind="random_features", length=[0.5, 1.0, 2.0]),
                    initial="normal",
                ),
                growing=dict(variant="growing", ridge=ridges),
                square_root=dict(variant="square_root", ridge=ridges),
                kanerva=dict(variant="kanerva", observation=ridges),
                direct=dict(variant="direct", query="prior"),
                newton_schulz=dict(variant="newton_schulz", query="prior"),
                nearest=dict(variant="nearest"),
                hopfield=dict(variant="hopfield", beta=[8.0, 32.0, 128.0]),
                delta_rule=dict(variant="delta_rule", rate=[0.3, 1.0]),
                none=dict(variant="none"),
            ),
            slots=[64],
            facts=[8, 32, 48, 64, 96, 256],
            rephrasings=[0],
            noises=[0.0, 0.25, 0.5],
            seeds=[0, 1],
        )
    )
