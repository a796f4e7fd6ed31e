"""Names that a torch pickle may ask for: whatever else it asks for is an error."""

import ml_dtypes
import numpy as np

# torch's storage classes and dtypes → NumPy's.
DTYPES = {
    "Float": np.dtype(np.float32),
    "Double": np.dtype(np.float64),
    "Half": np.dtype(np.float16),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Long": np.dtype(np.int64),
    "Int": np.dtype(np.int32),
    "Short": np.dtype(np.int16),
    "Char": np.dtype(np.int8),
    "Byte": np.dtype(np.uint8),
    "Bool": np.dtype(np.bool_),
}
BY_NAME = {
    "float32": "Float",
    "float": "Float",
    "float64": "Double",
    "double": "Double",
    "float16": "Half",
    "half": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}

# What a checkpoint may name beside tensors: kept as inert records. Modules and all below them.
RECORDED = (
    "argparse",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "torch.optim",
    "transformers",
)
NAMES = {
    "builtins": "bool bytearray complex dict float frozenset int list object range set slice str tuple",
    "collections": "Counter OrderedDict defaultdict deque",
    "copyreg": "_reconstructor",
    "_codecs": "encode",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "torch": "Size Tensor device dtype",
    "torch._tensor": "_rebuild_from_type_v2 Tensor",
    "torch._utils": "_rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter"
    " _rebuild_parameter_with_state",
    "torch.nn.parameter": "Parameter Buffer",
    "torch.serialization": "_get_layout",
    "torch.storage": "TypedStorage UntypedStorage",
}
# Python 2's names of what is listed above.
OLD = {"__builtin__": "builtins", "copy_reg": "copyreg"}


def listed(module: str, name: str) -> bool:
    """Whether a pickle may name it. (A module of Python 2 is first looked up in `OLD`.)"""
    recorded = any(module == known or module.startswith(known + ".") for known in RECORDED)
    storage = module in ("torch", "torch.cuda") and name.removesuffix("Storage") in DTYPES
    dtype = module == "torch" and name in BY_NAME
    return recorded or storage or dtype or name in NAMES.get(module, "").split()
