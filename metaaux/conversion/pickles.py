"""Reads the pickles of NVIDIA's generators (StyleGAN2-ADA, EG3D) without Python's unpickler.

Those files hold modules that `torch_utils.persistence._reconstruct_persistent_obj` rebuilds by executing source text
that the file itself carries, and tensors that `torch.storage._load_from_bytes` unpickles once more: whoever opens
them in the usual way runs what they say. Here a small interpreter walks through the pickle's operations and makes
data only: containers, numbers, texts, tensors, and `Record`s of modules' attributes. Nothing that a file names is
imported or called. A name from outside a short list ends the reading, and so does source text that could reach
beyond tensors, although no source text is ever run.
"""

from __future__ import annotations

import ast
import io
import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PERSISTENT_OBJECT = "torch_utils.persistence._reconstruct_persistent_obj"
# Classes that are kept as records: their attributes count, their code is not wanted.
_RECORD_MODULES = re.compile(r"training(\.\w+)+|torch\.nn\.modules(\.\w+)+|_imported_module_\w+")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_DTYPE_NAME = re.compile(r"torch\.(float(16|32|64)|bfloat16|u?int8|int(16|32|64)|bool)")
_STORAGE_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_NUMPY_FORMATS = dict(zip("f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1".split(), "efdbhiqBHIQ?"))
# First two numbers of torch.save's older file format, the one that storages are pickled in.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
# Packages that the official sources import. None of them is imported here.
_SOURCE_IMPORTS = set(
    "abc click collections copy dataclasses dnnlib einops enum functools itertools json kornia math numpy PIL random "
    "re scipy time torch torch_utils torchvision tqdm training typing warnings".split()
)
_SOURCE_CALLS = {"__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "open"}
_MAX_DEPTH = 64


class ConversionError(ValueError):
    """A foreign checkpoint cannot be converted; the message names what was met. Nothing has been written."""


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names: text, never imported."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(eq=False)
class Record:
    """An object of a pickle: the name of its class and its attributes."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Storage:
    data: bytes
    dtype: torch.dtype


@dataclass(eq=False)
class _NumpyType:
    code: str
    order: str = "<"


_MARK = object()


def read_pickle(path: str | Path, on_progress: Callable[[int, int], None] | None = None) -> Any:
    """The data of an official pickle, modules as `Record`s.

    Args:
        path: the file.
        on_progress: called now and then as (bytes read, bytes in all).

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file is no pickle, is damaged, or names something that these checkpoints do not need.
    """
    data = Path(path).read_bytes()
    if data[:2] == b"PK":
        raise ConversionError("it is a zip archive as torch.save writes them, not a pickle of the official code")
    if data[:1] != b"\x80":
        raise ConversionError("it is not a pickle file")
    return _Reader(io.BytesIO(data), len(data), _REDUCERS, on_progress).read()


class _Reader:
    """Interpreter of one pickle in a stream; `names` are the functions that it may name, our own stand-ins."""

    def __init__(
        self,
        stream: io.BytesIO,
        size: int,
        names: dict[str, Callable[..., Any]],
        on_progress: Callable[[int, int], None] | None = None,
        storages: bool = False,
    ):
        self.stream, self.size, self.names, self.on_progress, self.storages = (
            stream,
            size,
            names,
            on_progress,
            storages,
        )
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        where = "in a tensor's storage" if self.storages else "in the file"
        try:
            for count, (operation, argument, _) in enumerate(pickletools.genops(self.stream)):
                if operation.name == "STOP":
                    (result,) = self.stack
                    return result
                handler = getattr(self, f"_do_{operation.name.lower()}", None)
                if handler is not None:
                    handler(argument)
                elif operation.name in _LITERALS:
                    self.stack.append(argument)
                elif operation.name not in _IGNORED:
                    raise ConversionError(
                        f"the pickle operation {operation.name} {where}, which is not expected there"
                    )
                if self.on_progress is not None and count % 64 == 0:
                    self.on_progress(self.stream.tell(), self.size)
        except ConversionError:
            raise
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            struct.error,
        ) as error:
            raise ConversionError(f"a damaged pickle {where} ({type(error).__name__}: {str(error)[:120]})") from None
        raise ConversionError(f"a pickle without end {where}")

    def _since_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _container(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ConversionError(f"items for a {type(self.stack[-1]).__name__}, where a {kind.__name__} was expected")
        return self.stack[-1]

    # Constants
    def _do_none(self, _):
        self.stack.append(None)

    def _do_newtrue(self, _):
        self.stack.append(True)

    def _do_newfalse(self, _):
        self.stack.append(False)

    # Stack and memo
    def _do_mark(self, _):
        self.stack.append(_MARK)

    def _do_pop(self, _):
        self.stack.pop()

    def _do_pop_mark(self, _):
        self._since_mark()

    def _do_memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def _do_put(self, index):
        self.memo[int(index)] = self.stack[-1]

    def _do_get(self, index):
        self.stack.append(self.memo[int(index)])

    _do_binput = _do_long_binput = _do_put
    _do_binget = _do_long_binget = _do_get

    # Containers
    def _do_empty_list(self, _):
        self.stack.append([])

    def _do_empty_dict(self, _):
        self.stack.append({})

    def _do_empty_set(self, _):
        self.stack.append(set())

    def _do_empty_tuple(self, _):
        self.stack.append(())

    def _do_list(self, _):
        self.stack.append(self._since_mark())

    def _do_tuple(self, _):
        self.stack.append(tuple(self._since_mark()))

    def _do_frozenset(self, _):
        self.stack.append(frozenset(self._since_mark()))

    def _do_dict(self, _):
        items = self._since_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _take(self, count):
        taken = tuple(self.stack[-count:])
        if len(taken) < count or _MARK in taken:
            raise IndexError("stack underflow")
        del self.stack[-count:]
        self.stack.append(taken)

    def _do_tuple1(self, _):
        self._take(1)

    def _do_tuple2(self, _):
        self._take(2)

    def _do_tuple3(self, _):
        self._take(3)

    def _do_append(self, _):
        item = self.stack.pop()
        self._container(list).append(item)

    def _do_appends(self, _):
        items = self._since_mark()
        self._container(list).extend(items)

    def _do_additems(self, _):
        items = self._since_mark()
        self._container(set).update(items)

    def _do_setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self._container(dict)[key] = value

    def _do_setitems(self, _):
        items = self._since_mark()
        self._container(dict).update(zip(items[::2], items[1::2], strict=True))

    # Names and what is made of them
    def _do_global(self, argument):
        self._name(*argument.split(" ", 1))

    def _do_stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _name(self, module, name):
        text = f"{module}.{name}"
        if self.storages:
            known = text in _STORAGE_DTYPES
        else:
            is_record = _RECORD_MODULES.fullmatch(str(module)) and _IDENTIFIER.fullmatch(str(name))
            known = text in self.names or text in _CLASSES or is_record or _DTYPE_NAME.fullmatch(text)
        if not known:
            place = "a tensor's storage" if self.storages else "the file"
            raise ConversionError(f"{place} names {text[:200]}, which no such checkpoint needs; it was not run")
        self.stack.append(Name(text))

    def _do_reduce(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or function.text not in self.names or type(arguments) is not tuple:
            raise ConversionError(f"a call of {str(function)[:200]}, which no such checkpoint needs; it was not run")
        self.stack.append(self.names[function.text](*arguments))

    def _do_newobj(self, _):
        arguments, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, Name) or cls.text in self.names or arguments != ():
            raise ConversionError(f"an object of {str(cls)[:200]} with arguments {str(arguments)[:80]}")
        self.stack.append({} if cls.text in _CLASSES else Record(cls.text.rpartition(".")[2]))

    def _do_build(self, _):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record) and type(state) is dict:
            target.state.update(state)
        elif isinstance(target, _NumpyType) and type(state) is tuple and state[1] in ("<", ">", "|", "="):
            target.order = "<" if state[1] in "|=" else state[1]
        else:
            raise ConversionError(f"a state of type {type(state).__name__} for a {type(target).__name__}")

    def _do_binpersid(self, _):
        if not self.storages:
            raise ConversionError("the file refers to data outside of itself (a persistent id)")


_LITERALS = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8".split()
)
_IGNORED = {"PROTO", "FRAME"}
_CLASSES = {"dnnlib.util.EasyDict", "dnnlib.EasyDict"}


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    return dict(items)


def _persistent_object(meta: Any) -> Record:
    if type(meta) is not dict or meta.get("type") != "class":
        raise ConversionError(f"an argument of {PERSISTENT_OBJECT} that describes no class")
    name, state, source = meta.get("class_name"), meta.get("state"), meta.get("module_src")
    if type(name) is not str or not _IDENTIFIER.fullmatch(name) or type(state) is not dict:
        raise ConversionError(f"a persistent object of class {str(name)[:80]!r} without attributes")
    if type(source) is str:
        _check_source(source, name)
    return Record(name, dict(state))


def _check_source(source: str, class_name: str) -> None:
    """Refuses source text that no such checkpoint would carry. It is parsed, never compiled or run."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # no interpreter could run it
    for node in ast.walk(tree):
        met = None
        if isinstance(node, ast.Import):
            met = next((a.name for a in node.names if a.name.partition(".")[0] not in _SOURCE_IMPORTS), None)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            met = node.module if node.module.partition(".")[0] not in _SOURCE_IMPORTS | {"__future__"} else None
        elif isinstance(node, ast.Name) and node.id in _SOURCE_CALLS:
            met = node.id
        elif isinstance(node, ast.Attribute) and node.attr in ("__builtins__", "__globals__", "__subclasses__"):
            met = node.attr
        if met is not None:
            raise ConversionError(
                f"the source text of class {class_name} uses {met[:80]}, which no checkpoint needs; it was not run"
            )


def _load_from_bytes(data: Any) -> _Storage:
    """A storage in torch.save's older format: three numbers and a description, each a pickle, then the raw values."""
    if type(data) is not bytes:
        raise ConversionError(f"a tensor's storage of type {type(data).__name__}")
    stream = io.BytesIO(data)

    def part():
        return _Reader(stream, len(data), {}, storages=True).read()

    if part() != _LEGACY_MAGIC or part() != _LEGACY_VERSION:
        raise ConversionError("a tensor's storage that is not in torch.save's older format")
    part()  # byte order and type sizes of the machine that wrote it
    description = part()
    keys = part()
    if type(description) is not tuple or len(description) not in (5, 6) or description[0] != "storage":
        raise ConversionError("a tensor's storage with an unknown description")
    _, kind, key, _, length = description[:5]
    view = description[5] if len(description) == 6 else None
    if view is not None or keys != [key] or type(length) is not int or not isinstance(kind, Name):
        raise ConversionError("a tensor's storage with an unknown layout")
    dtype = _STORAGE_DTYPES[kind.text]
    (stored,) = struct.unpack("<q", stream.read(8))
    values = stream.read()
    if stored != length or len(values) != length * dtype.itemsize:
        raise ConversionError(f"a tensor's storage of {len(values)} bytes, expected {length} values of {dtype}")
    return _Storage(values, dtype)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
    layout = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or len(size) != len(stride) or any(type(n) is not int for n in layout):
        raise ConversionError("a tensor without a valid storage or layout")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if min(layout) < 0 or len(rest) == 3 and rest[2]:
        raise ConversionError(f"a tensor with the layout {layout}")
    if math.prod(size) == 0 or not storage.data:
        return torch.empty(size, dtype=storage.dtype, device="cpu")
    if (last + 1) * storage.dtype.itemsize > len(storage.data) or math.prod(size) > 2**31:
        raise ConversionError(f"a tensor of size {list(size)} that reaches beyond its storage")
    values = torch.frombuffer(bytearray(storage.data), dtype=storage.dtype)
    return values.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


def _rebuild_parameter(data: Any, *_: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise ConversionError(f"a parameter of type {type(data).__name__}")
    return data


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    """How older protocols store bytes."""
    if type(text) is not str or encoding != "latin1":
        raise ConversionError(f"bytes made of a {type(text).__name__}")
    return text.encode("latin1")


def _numpy_type(code: Any, *_: Any) -> _NumpyType:
    if code not in _NUMPY_FORMATS:
        raise ConversionError(f"values of the numpy type {str(code)[:40]!r}, which is not a plain number")
    return _NumpyType(code)


def _numpy_scalar(kind: Any, data: Any) -> int | float | bool:
    if not isinstance(kind, _NumpyType) or type(data) is not bytes:
        raise ConversionError("a numpy scalar that is not a plain number")
    return struct.unpack(kind.order + _NUMPY_FORMATS[kind.code], data)[0]


_REDUCERS: dict[str, Callable[..., Any]] = {
    PERSISTENT_OBJECT: _persistent_object,
    "collections.OrderedDict": _ordered_dict,
    "_codecs.encode": _bytes,
    "__builtin__.bytes": _bytes,
    "builtins.set": set,
    "__builtin__.set": set,
    "torch.Size": tuple,
    "torch.storage._load_from_bytes": _load_from_bytes,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}


def module_tensors(module: Any, what: str) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module's record and those below it, named as in its state dictionary.

    Raises:
        ConversionError: something else than tensors and modules stands where those belong.
    """
    tensors: dict[str, torch.Tensor] = {}

    def collect(record, prefix, depth):
        if not isinstance(record, Record) or depth > _MAX_DEPTH:
            raise ConversionError(f"{what}{prefix and '.' + prefix[:-1]} is not a module")
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _entries(record, kind, what):
                if tensor is None:
                    continue
                if not isinstance(tensor, torch.Tensor):
                    raise ConversionError(f"{what}.{prefix}{name} is a {type(tensor).__name__}, not a tensor")
                tensors[prefix + name] = tensor
        for name, child in _entries(record, "_modules", what):
            if child is not None:
                collect(child, f"{prefix}{name}.", depth + 1)

    collect(module, "", 0)
    return tensors


def _entries(record: Record, kind: str, what: str) -> list[tuple[str, Any]]:
    entries = record.state.get(kind, {})
    if type(entries) is not dict or not all(type(name) is str for name in entries):
        raise ConversionError(f"{kind} of a module in {what} is not a dictionary of names")
    return list(entries.items())


def child(module: Record, path: str) -> Record | None:
    """The module below `module` with the dotted name `path`, or `None`."""
    for name in path.split("."):
        module = dict(_entries(module, "_modules", path)).get(name)
        if not isinstance(module, Record):
            return None
    return module
