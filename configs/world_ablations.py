"""Ablations of configs/world.py: what each part of the paper's recipe does to editing.

command   larimar compare --config=configs/world.py --set train.steps=300 data.batch=8 \\
              --memories direct,newton_schulz,none --variants configs/world_ablations.py
hardware  2 CPU cores

The three memories are the recipe as it is, with the released code's inverse, and without a memory.
"""


def get_variants() -> dict[str, list[str]]:
    return {
        "no_kl": ["objective.kl=0.0"],
        "no_autoencoding": ["objective.autoencoding=0.0"],
        "prior_fixed_identity": ['train.frozen=["^memory/prior_memory$"]'],
        "prior_fixed_normal": ['train.frozen=["^memory/prior_memory$"]', "memory.initial=normal"],
        "prior_from_normal": ["memory.initial=normal"],
        # 64 texts a step, as 8 episodes of 8.
        "episodes_of_1": ["data.episode=[1]", "data.batch=64"],
        "episodes_of_5": ["data.episode=[5]", "data.batch=13"],
        "episodes_of_16": ["data.episode=[16]", "data.batch=4"],
        "episodes_mixed": ["data.episode=[1,5,16]"],
        "no_observation_noise": ["memory.noise=0.0"],
        "observation_noise_1e-6": ["memory.noise=1e-6"],  # the paper's
        "sigma_by_slot": ["memory.variance=slot"],
        "sigma_by_query": ["memory.variance=query"],
        "sigma_by_memory": ["memory.variance=memory"],
        "sigma_by_both": ["memory.variance=both"],
        "gaussian_addressing": ["memory.addressing=gaussian"],
        "slots_4": ["model.slots_per_layer=4"],
        "embedding_only": ["model.conditioning=embedding"],
        "slots_only": ["model.conditioning=slots"],
    }
