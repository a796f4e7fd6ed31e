"""Gaussian keys against pseudo-inverse ones, by how many wordings of a fact are written (Table 14).

command   larimar sweep --config=configs/sweep_table14.py --out runs/table14 --set zsre=FILE
          (FILE: ZsRE in KnowEdit's schema; without it, random facts alone)
hardware  2 CPU cores, 4 GB of memory
expected  see README, the memory lab
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    keys = dict(gaussian=dict(addressing="gaussian", width=1e-3), pinv=dict(addressing="pinv"))
    stores = dict(direct=dict(variant="direct", query="prior"), streaming=dict(variant="streaming"))
    variants = {
        f"{store}_{kind}_{reference}": dict(
            initial="normal", reference=reference, **stores[store], **keys[kind]
        )
        for store in stores
        for kind in keys
        for reference in ("prior", "prompts")
    }
    return ConfigDict(
        dict(
            name="sweep_table14",
            latent=384,
            paired=False,
            zsre="",
            variants=variants,
            slots=[512],
            facts=[1, 20, 40, 100, 200],
            rephrasings=[0, 1, 4, 9],
            noises=[1.0],
            seeds=[0, 1, 2],
        )
    )
