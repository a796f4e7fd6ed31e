"""Gaussian keys against pseudo-inverse ones, by how many wordings of a fact are written (Table 14).

command   larimar sweep --config=configs/sweep_table14.py --out runs/table14 --set zsre=FILE
          (FILE: ZsRE in KnowEdit's schema)
hardware  2 CPU cores, 4 GB of memory
time      4 minutes
expected  960 cells in 64 programs; at noise 3 and with `direct`, recall of unseen wordings by
          Gaussian and by pseudo-inverse keys is .984 and .977 for 200 facts written once, 1 and 1 for
          20 facts written ten times
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    keys = dict(gaussian=dict(addressing="gaussian"), pinv=dict(addressing="pseudo_inverse"))
    stores = dict(direct=dict(variant="direct", query="prior"), streaming=dict(variant="streaming"))
    variants = {
        f"{store}_{kind}": dict(
            initial="normal", reference="prompts", **stores[store], **keys[kind]
        )
        for store in stores
        for kind in keys
    }
    return ConfigDict(
        dict(
            latent=0,
            paired=False,
            zsre="",
            variants=variants,
            # K / C and facts x wordings / K as in the paper, for encodings of half its size.
            slots=[256],
            facts=[20, 40, 100, 200],
            rephrasings=[0, 1, 4, 9],
            # How far a wording is from its prompt: 1 is as far as ZsRE's own rephrasings are.
            noises=[1.0, 2.0, 3.0],
            seeds=[0, 1, 2, 3, 4],
        )
    )
