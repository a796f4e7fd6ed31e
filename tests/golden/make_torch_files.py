"""Makes torch/: files that torch.save wrote, and what is in them.

pip install torch==2.13.0 numpy; then, in this folder: python make_torch_files.py
"""

import argparse
import collections
import pathlib

import numpy as np
import torch

OUT = pathlib.Path(__file__).parent / "torch"


def tensors() -> dict[str, torch.Tensor]:
    """One of every kind of number, and every way to lie in a storage."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 7
    kinds = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    return {
        "whole": base,
        "transposed": base.t(),
        "part": base[1:3, 2:],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[0].clone()),
        **{kind: (base[:2, :3] * 5).to(getattr(torch, kind)) for kind in kinds},
    }


def main() -> None:
    OUT.mkdir(exist_ok=True)
    named = tensors()
    ordered = collections.OrderedDict(named)
    ordered._metadata = {"": {"version": 1}}  # as state_dict() has it
    torch.save(ordered, OUT / "plain.bin")
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "state_dict": ordered,
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": argparse.Namespace(latent=8, name="tiny", parts=[1, 2.5, None, True]),
        "path": pathlib.PurePosixPath("a/b"),
        "best": np.float64(1.5),
    }
    torch.save(checkpoint, OUT / "lightning.ckpt")
    torch.save(checkpoint, OUT / "lightning_protocol_4.ckpt", pickle_protocol=4)
    plain = {name: tensor.detach().contiguous() for name, tensor in named.items()}
    plain["bfloat16"] = plain["bfloat16"].float()
    np.savez(OUT / "expected.npz", **{name: tensor.numpy() for name, tensor in plain.items()})


if __name__ == "__main__":
    main()
