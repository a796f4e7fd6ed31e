"""torch's pickles, read by an interpreter of our own that has no way to run anything.

A pickle is a program for a stack machine, and Python's machine imports and calls whatever the
program names. This one knows the same instructions but imports and calls nothing: a name becomes a
`Global`, a call or an instance an `Opaque` record of it, and the few calls that say where a tensor
lies become a `Tensor`. A name outside a short list is an error.
"""

import dataclasses
import io
import math
import mmap
import pickletools
import struct
from typing import Any, NamedTuple

import numpy as np

from larimar_jax.weights import torch_names
from larimar_jax.weights.fill import WeightsError

# The largest real pickle, of a 70B model in one file with its optimiser, is a few megabytes, and a
# tensor takes some 40 instructions. More could be made to take any amount of memory.
LIMIT, _INSTRUCTIONS, _COPIED = 1 << 25, 1 << 22, 1 << 20
_AXES = 64  # NumPy's own limit


class Global(NamedTuple):
    """A name that the pickle asks for. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False, repr=False)
class Opaque:
    """An object that would have been made: what of, from what, and what it was given since."""

    made_by: Global
    arguments: Any
    state: Any = None
    items: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        # Without its parts: tuples that hold each other twice could be spelled out for ever.
        return f"<{self.made_by}>"


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """Numbers of one kind, somewhere else in the file. dtype None: bytes, typed by the tensor."""

    key: str
    dtype: np.dtype | None
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A strided view of a storage, all in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where the arguments of a variadic instruction begin."""


_MARK = _Mark()


def load(file: bytes | mmap.mmap, path: str) -> Any:
    """The object that one pickle describes; a file is left behind its end.

    Dicts, lists, tuples, sets and scalars are Python's; the rest is this module's.

    Args:
      path: the file's name, for messages.

    Raises:
      WeightsError: a name that is not on the list (nothing was run), a tensor of a kind that is not
        read here, a pickle beyond all real ones, or a damaged one.
    """
    start = file.tell() if isinstance(file, mmap.mmap) else 0
    content = io.BytesIO(file[start : start + LIMIT + 1])
    size = content.getbuffer().nbytes
    machine = _Machine(path, min(size, _COPIED))
    try:
        for count, (opcode, argument, at) in enumerate(pickletools.genops(content)):
            if count >= _INSTRUCTIONS or at >= LIMIT:
                raise ValueError(f"a pickle of over {_INSTRUCTIONS} instructions or {LIMIT} bytes")
            if opcode.name == "STOP":
                if isinstance(file, mmap.mmap):
                    file.seek(start + content.tell())
                return machine.pop()
            machine.step(opcode.name, argument)
    except (
        ValueError, IndexError, OverflowError, struct.error, RecursionError, MemoryError
    ) as error:
        if isinstance(error, WeightsError):
            raise
        reason = str(error) or type(error).__name__
        raise WeightsError(
            f"{path} cannot be read as a torch file ({reason}); it is damaged or was"
            " cut short while being fetched. Fetch it again"
        ) from error
    raise AssertionError("genops ends with STOP or raises")


class _Machine:
    """The stack, the memo, and one method that knows every instruction."""

    def __init__(self, path: str, copied: int):
        """copied: how many items calls may copy; every item of a real file is copied once at most."""
        self._path, self._stack, self._memo, self._copied = path, [], {}, copied

    def pop(self) -> Any:
        """The topmost value; IndexError without one."""
        value = self._stack.pop()
        if value is _MARK:
            raise IndexError("a mark where a value belongs")
        return value

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        push = self._stack.append
        if name in _CONSTANTS:
            push(_CONSTANTS[name]())
        elif name in _LITERALS:
            push(argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            push(_MARK)
        elif name == "POP":
            self._stack.pop()
        elif name == "POP_MARK":
            self._marked()
        elif name == "DUP":
            top = self.pop()
            push(top)
            push(top)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            if argument not in self._memo:
                raise ValueError(f"nothing is memorised as {argument}")
            push(self._memo[argument])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            top = self.pop()
            push(top)
            self._memo[len(self._memo) if argument is None else argument] = top
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            push(self._collect(name, self._marked()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            push(tuple(self._several(int(name[-1]))))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [self.pop()] if name == "APPEND" else self._marked()
            self._add(self._stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._several(2) if name == "SETITEM" else self._marked()
            self._set(self._stack[-1], items)
        else:
            self._object(name, argument)

    def _object(self, name: str, argument: Any) -> None:
        push = self._stack.append
        if name == "GLOBAL":
            push(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            push(self._global(*self._several(2)))
        elif name == "PERSID":
            raise ValueError("a storage named by text")
        elif name == "BINPERSID":
            push(self._storage(self.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            push(self._call(*self._several(2)))
        elif name == "NEWOBJ_EX":
            kind, arguments, _ = self._several(3)
            push(self._call(kind, arguments))
        elif name in ("OBJ", "INST"):
            arguments = self._marked()
            made = arguments.pop(0) if name == "OBJ" else self._global(*argument.split(" ", 1))
            push(self._call(made, tuple(arguments)))
        elif name == "BUILD":
            state, made = self.pop(), self._stack[-1]
            if isinstance(made, Opaque):
                made.state = state
            elif not isinstance(made, dict | Tensor):  # attributes of theirs say nothing of weights
                raise ValueError(f"a state for a {type(made).__name__}")
        else:
            raise ValueError(f"instruction {name}, which torch does not write")

    def _several(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def _marked(self) -> list[Any]:
        items = []
        while (value := self._stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def _collect(self, name: str, items: list[Any]) -> Any:
        if name == "TUPLE":
            return tuple(items)
        if name == "LIST":
            return items
        made = {} if name == "DICT" else set()
        (self._set if name == "DICT" else self._add)(made, items)
        return frozenset(made) if name == "FROZENSET" else made

    def _add(self, made: Any, items: list[Any]) -> None:
        if isinstance(made, list):
            made.extend(items)
        elif isinstance(made, set):
            made.update(map(_key, items))
        elif not isinstance(made, Opaque):  # what a record of a list holds is of no use here
            raise ValueError(f"items for a {type(made).__name__}")

    def _set(self, made: Any, items: list[Any]) -> None:
        made = made.items if isinstance(made, Opaque) else made
        if not isinstance(made, dict) or len(items) % 2:
            raise ValueError(f"entries for a {type(made).__name__}")
        for key, value in zip(map(_key, items[::2]), items[1::2], strict=True):
            if key in made:
                said = repr(key[:80]) if isinstance(key, str) else f"of a {type(key).__name__}"
                raise ValueError(f"the entry {said} twice")
            made[key] = value

    def _global(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        module = torch_names.OLD.get(module, module)
        if not torch_names.listed(module, name):
            raise WeightsError(
                f"{self._path} asks for {module[:80]}.{name[:80]}, which a file of weights has no use"
                " for; nothing of it was run. If you trust where it is from, load it with torch and"
                " save its state_dict as safetensors"
            )
        return Global(module, name)

    def _storage(self, said: Any) -> Storage:
        if not (isinstance(said, tuple) and len(said) >= 5 and said[0] == "storage"):
            raise ValueError("a reference to something that is no storage")
        _, kind, key, _, count, *view = said
        if view and view[0] is not None:
            raise ValueError("a storage that is a view of another")
        if not isinstance(kind, Global) or not isinstance(key, str) or not _counts(count):
            raise ValueError("a storage that does not say its kind, name and size")
        dtype = torch_names.DTYPES.get(kind.name.removesuffix("Storage"))
        if dtype is None and kind.name != "UntypedStorage":
            raise ValueError(f"a storage of {kind.name}")
        return Storage(key, dtype, count)

    def _call(self, made_by: Any, arguments: Any) -> Any:
        if not isinstance(made_by, Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no name")
        name = str(made_by)
        if name == "torch._tensor._rebuild_from_type_v2":
            function, _, inner, *_ = arguments
            return self._call(function, inner)
        if name.startswith("torch._utils._rebuild_parameter"):
            if not isinstance(arguments[0], Tensor):
                raise ValueError("a parameter that is no tensor")
            return arguments[0]
        if name.startswith("torch._utils._rebuild_tensor"):
            if len(arguments) < 4:
                raise ValueError(f"a tensor of {len(arguments)} arguments")
            return _tensor(*arguments[:4], arguments[6:7] if name.endswith("v3") else ())
        if name in ("torch.Size", "collections.OrderedDict"):
            pairs = arguments[0] if arguments else ()
            if not isinstance(pairs, list | tuple):
                raise ValueError(f"a {made_by.name} of a {type(pairs).__name__}")
            # One list, memorised, could be copied by every instruction of the file.
            self._copied -= len(pairs)
            if self._copied < 0 or (made_by.name == "Size" and len(pairs) > _AXES):
                raise ValueError(f"a {made_by.name} of {len(pairs)} items, more than the file is long"
                                 " or a shape has axes")
            if made_by.name == "Size":
                return tuple(pairs)
            made: dict[Any, Any] = {}
            if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
                raise ValueError("an OrderedDict that is not made of pairs")
            self._set(made, [item for pair in pairs for item in pair])
            return made
        return Opaque(made_by, arguments)


_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING"
    " BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE"
    " BINUNICODE8".split()
)


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _key(value: Any) -> Any:
    """A value that hashes at once: large numbers and tuples are hashed anew each time."""
    if isinstance(value, Opaque | bytes | Global) or value is None or _scalar(value):
        return value
    if isinstance(value, tuple) and len(value) <= 16 and all(map(_scalar, value)):
        return value
    raise ValueError(f"an entry named by a {type(value).__name__}")


def _scalar(value: Any) -> bool:
    return isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 1 << 64)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, named: tuple[Any, ...]) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    whole = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    # First, since a product of many or of large numbers takes for ever.
    whole = whole and len(shape) <= _AXES
    if not whole or not all(map(_counts, (offset, *shape, *strides))):
        raise ValueError("a tensor whose place, shape or strides are no counts")
    dtype = storage.dtype
    if named:
        known = torch_names.BY_NAME.get(named[0].name) if isinstance(named[0], Global) else None
        dtype = torch_names.DTYPES.get(known)
    if dtype is None:
        raise ValueError("a tensor of an unknown kind of number")
    held = storage.count if storage.dtype is not None else storage.count // dtype.itemsize
    size = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    # As many numbers at most as there are: a stride of 0 could ask for any amount of memory.
    if size and (last >= held or size > held):
        raise ValueError(f"a tensor of shape {shape} at {offset} in a storage of {held}")
    return Tensor(storage, dtype, offset, shape, strides)
