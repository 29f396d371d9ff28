"""A program, run by the tests in a process of its own: files made to harm their reader, each given to every reader, under limits.

    python hostile.py FOLDER

FOLDER holds good files to start from (eg3d.pkl, zip.pt, legacy.pt); a hostile file that gets its way leaves `ran` there.
Prints one JSON object: what came of each file, and what the whole cost.
"""

import json
import os
import pickletools
import resource
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from talk3d.errors import WeightsError
from talk3d.io.eg3d import import_eg3d
from talk3d.io.published import import_checkpoint, import_talk3d, read_checkpoint, read_state_dict

SECONDS = 20  # generous: other things run on the machine that tests this
MEBIBYTE = 2**20
PROTO = b"\x80\x04"
STOP = b"."


# ---- pickles by hand


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def old_named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tupled(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def called(what: bytes, *arguments: bytes) -> bytes:
    return what + tupled(*arguments) + b"R"


def in_dict(content: bytes, key: str = "G_ema") -> bytes:
    return PROTO + b"}" + text(key) + content + b"s" + STOP


def binary(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


ORDERED = called(named("collections", "OrderedDict"))


def calls(command: bytes) -> Iterator[tuple[str, bytes]]:
    """Ways of running something when a pickle is read."""
    say = text(command.decode())
    for module, name in [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("os", "popen"),
        ("subprocess", "Popen"),
        ("subprocess", "check_output"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "compile"),
        ("builtins", "open"),
        ("builtins", "__import__"),
        ("builtins", "getattr"),
        ("__builtin__", "eval"),
        ("importlib", "import_module"),
        ("runpy", "_run_code"),
        ("pickle", "loads"),
        ("_pickle", "loads"),
        ("marshal", "loads"),
        ("code", "interact"),
        ("pty", "spawn"),
        ("webbrowser", "open"),
        ("operator", "attrgetter"),
        ("functools", "partial"),
        ("types", "FunctionType"),
        ("types", "CodeType"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.serialization", "load"),
        ("torch._utils", "_import_dotted_name"),
        ("torch._dynamo.guards", "eval"),
        ("torch.utils.cpp_extension", "load_inline"),
        ("torch.storage", "_load_from_bytes.__globals__"),
        ("torch_utils.persistence", "import_hook"),
        ("torch_utils.persistence", "_src_to_module"),
        ("numpy", "load"),
        ("numpy.f2py.diagnose", "run"),
        ("numpy.testing._private.utils", "runstring"),
        ("copyreg", "__newobj__"),
        ("copyreg", "add_extension"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("collections", "__builtins__"),
        ("builtins", "dict.update"),
        ("_imported_module_0123", "OSGDecoder"),
        ("_imported_module_" + "0" * 32, "os.system"),
        ("_imported_module_" + "0" * 32 + ".os", "system"),
        ("talk3d.io.weights", "os.system"),
        ("torch.optim", "os.system"),
        ("\u043es", "system"),  # the first letter is Cyrillic
        ("\uff4f\uff53", "system"),
        ("os\x00", "system"),
        ("collections\n", "OrderedDict"),
        ("", ""),
        ("collections", "OrderedDict\u200b"),
        ("\x1b]0;owned\x07os", "system\x1b[31m"),
        ("training", ""),
    ]:
        yield f"{module}.{name}, stacked", in_dict(called(named(module, name), say))
        if "\n" not in module:
            yield f"{module}.{name}, old", in_dict(old_named(module, name) + tupled(say) + b"R")
    system = named("os", "system")
    yield "alone", PROTO + called(system, say) + STOP
    yield "new object", PROTO + system + tupled(say) + b"\x81" + STOP
    yield "never used", PROTO + b"}" + text("x") + system + b"s" + STOP
    yield "in the memory only", PROTO + system + b"\x940" + b"}" + STOP
    yield "first letter of INST", PROTO + b"(" + say + b"ios\nsystem\n" + STOP
    yield "OBJ", PROTO + b"(" + old_named("os", "system") + say + b"o" + STOP
    yield "text persistent id", PROTO + b"Pos.system\n" + STOP
    yield "persistent id", PROTO + tupled(text("storage"), system, say, text("cpu"), b"K\x01") + b"Q" + STOP
    yield "names that are no text", PROTO + b"K\x01K\x02\x93" + STOP
    yield "a name that is a call", PROTO + text("os") + ORDERED + b"\x93" + STOP
    yield "call of a call", PROTO + called(ORDERED, say) + STOP
    yield "call of a text", PROTO + called(text("os.system"), say) + STOP
    yield "arguments that are no tuple", PROTO + named("collections", "OrderedDict") + b"]R" + STOP
    yield "nested call", in_dict(called(named("collections", "OrderedDict"), called(system, say)))
    yield "state by a call", in_dict(ORDERED + called(system, say) + b"b")
    yield "slots", in_dict(ORDERED + tupled(b"N", b"}" + text("__class__") + system + b"s") + b"b")
    yield "reconstructor of a function", in_dict(called(named("copyreg", "_reconstructor"), system, named("builtins", "object"), b"N"))
    yield "class that is text", in_dict(called(named("copyreg", "_reconstructor"), text("os.system"), named("builtins", "object"), b"N"))
    for size, code in ((1, b"\x82"), (2, b"\x83"), (4, b"\x84")):
        yield f"extension of {size} bytes", PROTO + code + b"\x01" * size + b"(" + say + b"tR" + STOP
    inner = PROTO + called(system, say) + STOP
    yield "inside storage bytes", in_dict(tensor(called(named("torch.storage", "_load_from_bytes"), binary(inner))))
    yield "inside the third part of storage bytes", in_dict(tensor(called(named("torch.storage", "_load_from_bytes"), binary(legacy_head() + inner))))
    source = text("import os; os.system(" + repr(command.decode()) + ")")
    meta = b"}(" + text("type") + text("class") + text("version") + b"K\x06" + text("module_src") + source
    meta += text("class_name") + text("TriPlaneGenerator") + text("state") + b"}u"
    yield "source of a module", in_dict(called(named("torch_utils.persistence", "_reconstruct_persistent_obj"), meta))
    yield "module with a hook", in_dict(called(named("torch.nn.modules.module", "Module")) + b"}" + text("_forward_hooks") + system + b"sb")


# ---- what costs much


def tensor(storage: bytes, offset: bytes = b"K\x00", size: bytes | None = None, stride: bytes | None = None) -> bytes:
    size, stride = size or tupled(b"K\x02"), stride or tupled(b"K\x01")
    return called(named("torch._utils", "_rebuild_tensor_v2"), storage, offset, size, stride, b"\x89", ORDERED)


def legacy_head(magic: int = 0x1950A86A20F9469CFC6C, version: int = 1001, little: bool = True) -> bytes:
    system = b"\x80\x02}(" + text("protocol_version") + b"M\xe9\x03" + text("little_endian") + (b"\x88" if little else b"\x89") + b"u."
    return b"\x80\x02" + number(magic) + b".\x80\x02" + number(version) + b"." + system


def legacy(
    count: int = 2, claimed: int = 2, numbers: int = 2, key: str = "0", kind: str = "FloatStorage", head: bytes = b"", listed: str = "0"
) -> bytes:
    """A storage as torch wrote it, with claims that may be wrong."""
    reference = tupled(text("storage"), old_named("torch", kind), text(key), text("cpu"), number(count), b"N") + b"Q."
    keys = b"\x80\x02]" + text(listed) + b"a."
    return (head or legacy_head()) + b"\x80\x02" + reference + keys + struct.pack("<q", claimed) + b"\0" * (4 * numbers)


def stored(**claims: Any) -> bytes:
    return called(named("torch.storage", "_load_from_bytes"), binary(legacy(**claims)))


def storages() -> Iterator[tuple[str, bytes]]:
    for name, claims in {
        "counts too many": {"count": 10**12, "claimed": 10**12},
        "counts beyond integers": {"count": 2**63, "claimed": 2},
        "counts below zero": {"count": -1, "claimed": -1},
        "two counts": {"count": 2, "claimed": 1000},
        "cut off": {"numbers": 1},
        "another key": {"key": "1"},
        "a key of another kind": {"key": "../../etc/passwd"},
        "strange type": {"kind": "QUInt8Storage"},
        "type of no storage": {"kind": "system"},
        "wrong magic": {"head": legacy_head(magic=7)},
        "wrong version": {"head": legacy_head(version=7)},
        "big-endian": {"head": legacy_head(little=False)},
    }.items():
        yield f"storage {name}", in_dict(tensor(stored(**claims)))
    good = stored()
    for name, parts in {
        "size beyond": (b"K\x00", tupled(b"K\x03"), tupled(b"K\x01")),
        "offset beyond": (b"K\x02", tupled(b"K\x01"), tupled(b"K\x01")),
        "offset far beyond": (number(2**62), tupled(b"K\x01"), tupled(b"K\x01")),
        "offset before": (number(-1), tupled(b"K\x02"), tupled(b"K\x01")),
        "size below zero": (b"K\x00", tupled(number(-2)), tupled(b"K\x01")),
        "stride below zero": (b"K\x01", tupled(b"K\x02"), tupled(number(-1))),
        "stride that overflows": (b"K\x00", tupled(b"K\x03"), tupled(number(2**62))),
        "overlap of everything": (b"K\x00", tupled(number(10**6), number(10**6)), tupled(b"K\x00", b"K\x00")),
        "overlap of windows": (b"K\x00", tupled(b"K\x02", b"K\x02"), tupled(b"K\x01", b"K\x01")),
        "product that overflows": (b"K\x00", tupled(number(2**32), number(2**32)), tupled(b"K\x01", b"K\x01")),
        "many dimensions": (b"K\x00", tupled(*[b"K\x01"] * 65), tupled(*[b"K\x01"] * 65)),
        "dimensions that differ": (b"K\x00", tupled(b"K\x01", b"K\x01"), tupled(b"K\x01")),
        "size that is a list": (b"K\x00", b"](K\x01e", tupled(b"K\x01")),
        "size that is text": (b"K\x00", tupled(text("2")), tupled(b"K\x01")),
        "size that is a float": (b"K\x00", tupled(b"G" + struct.pack(">d", 2.0)), tupled(b"K\x01")),
        "size that is true": (b"K\x00", tupled(b"\x88"), tupled(b"K\x01")),
    }.items():
        yield name, in_dict(tensor(good, *parts))
        yield f"{name}, as plane axes", generator_with(tensor(good, *parts))
    yield "storage that is no storage", in_dict(tensor(b"K\x01"))
    yield "storage that is a call", in_dict(tensor(ORDERED))
    yield "too few arguments", in_dict(called(named("torch._utils", "_rebuild_tensor_v2"), good))
    yield "parameter of nothing", in_dict(called(named("torch._utils", "_rebuild_parameter")))
    deep = tensor(good)
    for _ in range(3000):
        deep = called(named("torch._utils", "_rebuild_parameter"), deep, b"\x89", b"N")
    yield "parameters in parameters", in_dict(deep)
    yield (
        "text beyond bytes",
        in_dict(tensor(called(named("torch.storage", "_load_from_bytes"), called(named("_codecs", "encode"), text("é€" * 5000), text("latin1"))))),
    )
    yield (
        "other encoding",
        in_dict(tensor(called(named("torch.storage", "_load_from_bytes"), called(named("_codecs", "encode"), text("x" * 5000), text("zip_codec"))))),
    )
    once = stored(count=250_000, claimed=250_000, numbers=250_000)
    many = PROTO + b"}" + once + b"\x940" + b"".join(text(str(i)) + tensor(b"h\x00", size=tupled(number(250_000))) + b"s" for i in range(2000))
    yield "one storage in thousands of tensors", many + STOP


def generator_with(axes: bytes) -> bytes:
    """A generator that is good as far as its plane axes, or seems so."""
    renderer = named("training.volumetric_rendering.renderer", "ImportanceRenderer") + b")\x81}" + text("plane_axes") + axes + b"sb"
    state = b"}" + text("_modules") + b"}" + text("renderer") + renderer + b"ss"
    meta = b"}(" + text("type") + text("class") + text("class_name") + text("TriPlaneGenerator") + text("state") + state + b"u"
    return in_dict(called(named("torch_utils.persistence", "_reconstruct_persistent_obj"), meta))


def claims() -> Iterator[tuple[str, bytes]]:
    """Opcodes that claim more than there is, or more than anybody needs."""
    for name, code, size in (
        ("BINBYTES", b"B", 4),
        ("BINBYTES8", b"\x8e", 8),
        ("BINUNICODE", b"X", 4),
        ("BINUNICODE8", b"\x8d", 8),
        ("BYTEARRAY8", b"\x96", 8),
    ):
        yield f"{name} of more than there is", PROTO + code + b"\xff" * size + b"x" * 100 + STOP
    yield "BINBYTES8 of 2^40", PROTO + b"\x8e" + struct.pack("<Q", 2**40) + b"x" * 100 + STOP
    yield "LONG4 of 2 GB", PROTO + b"\x8b\xff\xff\xff\x7f" + b"\x01" * 100 + STOP
    yield "LONG4 below zero", PROTO + b"\x8b\xff\xff\xff\xff" + STOP
    yield "LONG1 of 255 bytes", PROTO + b"\x8a\xff" + b"\x7f" * 255 + STOP
    yield "LONG as text", PROTO + b"L" + b"9" * 10**6 + b"L\n" + STOP
    yield "INT as text", PROTO + b"I" + b"9" * 10**6 + b"\n" + STOP
    yield "FLOAT as text", PROTO + b"F" + b"9" * 10**6 + b"\n" + STOP
    yield "STRING as text", PROTO + b"S'" + b"\\x41" * 10**5 + b"'\n" + STOP
    yield "UNICODE as text", PROTO + b"V" + b"\\u0041" * 10**5 + b"\n" + STOP
    yield "endless name, old", PROTO + b"c" + b"a" * 10**6
    yield "frame of 2^62", PROTO + b"\x95" + struct.pack("<Q", 2**62) + b"}" + STOP
    yield "memory slot 2^32-1", PROTO + b"}r\xff\xff\xff\xff" * 10 + STOP
    yield "memory slot that is empty", PROTO + b"h\x07" + STOP
    yield "memory slot as text", PROTO + b"}p" + b"9" * 5000 + b"\n" + STOP


def circles() -> Iterator[tuple[str, bytes]]:
    """Values in themselves, and towers of them."""
    yield "list in itself", PROTO + b"]\x94h\x00a" + STOP
    yield "dict in itself", PROTO + b"}\x94" + text("a") + b"h\x00s" + STOP
    yield "generator in itself", PROTO + b"}\x94" + text("G_ema") + b"h\x00s" + STOP
    yield "tuple in itself", PROTO + b"]\x94\x85\x94h\x00h\x01a0" + STOP
    yield "state in itself", PROTO + ORDERED + b"\x94h\x00b" + STOP
    yield "keys in themselves", PROTO + ORDERED + b"\x94h\x00h\x00s" + STOP
    yield "circle of two", PROTO + b"]\x94]\x94h\x00ah\x00h\x01a" + STOP
    for name, inner in {
        "lists": b"]" * 40_000 + b"a" * 39_999,
        "tuples": b")" + b"\x85" * 100_000,
        "dicts": (b"}" + text("a")) * 20_000 + b"}" + b"s" * 20_000,
    }.items():
        yield f"deep {name}", PROTO + inner + STOP
        yield f"deep {name} inside", in_dict(inner)
    yield "deep marks", PROTO + b"(" * 100_000 + b"t" * 100_000 + STOP
    yield "deep calls", PROTO + b"".join(named("collections", "OrderedDict") for _ in range(1000)) + b")R" + b"\x85R" * 999 + STOP
    yield "deep in steps", PROTO + b")\x940" + b"".join(b"h" + bytes([i]) + b"\x85" * 60 + b"\x940" for i in range(200)) + b"h\xc8" + STOP


def crowds() -> Iterator[tuple[str, bytes]]:
    """Few bytes that would become many values, or take long."""
    for name in ("tuples", "lists"):
        laughs = PROTO + b")\x94"
        for i in range(80):
            pair = b"h" + bytes([i]) + b"h" + bytes([i])
            laughs += pair + b"\x86\x94" if name == "tuples" else b"](" + pair + b"e\x94"
        yield f"a billion laughs of {name}", laughs + STOP
    laughs = PROTO + b"K\x00\x94"
    for i in range(60):
        laughs += b"}(" + b"".join(text(str(k)) + b"h" + bytes([i]) for k in range(30)) + b"u\x94"
    yield "a billion laughs of dicts", laughs + STOP
    yield "many operations", PROTO + b"N0" * 10**6 + STOP
    yield "many values", PROTO + b"N" * 10**6 + STOP
    yield "many empty sets", PROTO + b"](" + b"\x8f" * 10**6 + b"e" + STOP
    yield "much text", PROTO + b"](" + text("é" * 2000) * 10_000 + b"e" + STOP
    yield "much wide text", PROTO + b"](" + text("😀" + "a" * 4000) * 12_000 + b"e" + STOP
    big = PROTO + b"](" + b"".join(number(i) for i in range(20_000)) + b"e\x940"
    yield "sets of one list", big + b"](" + (named("builtins", "set") + b"h\x00\x85R") * 2000 + b"e" + STOP
    yield (
        "sets of one list, in a checkpoint",
        big + b"}(" + b"".join(text(str(i)) + named("builtins", "set") + b"h\x00\x85R" for i in range(2000)) + b"u" + STOP,
    )
    yield (
        "bytes of one text",
        PROTO
        + text("a" * 60_000)
        + b"\x940}("
        + b"".join(text(str(i)) + called(named("_codecs", "encode"), b"h\x00", text("latin1")) for i in range(9000))
        + b"u"
        + STOP,
    )
    colliding = b"".join(number(k * (2**61 - 1)) + b"N" for k in range(1, 50_000))
    yield "keys that collide", PROTO + b"}(" + colliding + b"u" + STOP
    yield "floats that collide in a set", PROTO + b"\x8f(" + b"".join(b"G" + struct.pack(">d", float(2**k)) for k in range(1000)) + b"\x90" + STOP


def misuse() -> Iterator[tuple[str, bytes]]:
    """Operations on what they are not meant for."""
    yield "a list as key", PROTO + b"}]Ns" + STOP
    yield "a tuple as key", PROTO + b"})" + b"\x85" * 50 + b"Ns" + STOP
    yield "bytes as key", PROTO + b"}" + binary(b"x" * 100) + b"Ns" + STOP
    yield "items without values", PROTO + b"}(N" + b"u" + STOP
    yield "items in a list", PROTO + b"](NNu" + STOP
    yield "append to a dict", PROTO + b"}Na" + STOP
    yield "append to a call", PROTO + ORDERED + b"Na" + STOP
    yield "state of a list", PROTO + b"]}b" + STOP
    yield "state twice", PROTO + ORDERED + b"}" + text("a") + b"Nsb}b" + STOP
    yield "persistent id outside", in_dict(tupled(text("storage"), b"N") + b"Q")
    yield "buffer outside", PROTO + b"\x97" + STOP
    yield "read-only buffer", PROTO + b"}\x98" + STOP
    yield "keywords of a new object", PROTO + named("collections", "OrderedDict") + b")}\x92" + STOP
    yield "stop with two values", PROTO + b"}}" + STOP
    yield "stop inside a mark", PROTO + b"(}" + STOP
    yield "stop at once", PROTO + STOP
    yield "text that is no UTF-8", in_dict(b"X\x02\x00\x00\x00\xff\xfe")
    yield "unknown opcode", PROTO + b"\xff" + STOP
    yield "protocol 0", b"(dp0\n."
    yield "protocol 9", b"\x80\x09}."
    yield "protocol twice", PROTO + PROTO + b"}" + STOP
    yield "old codes", b"\x80\x04(lp0\n."
    yield "a class that is a number", generator_with(b"N").replace(text("TriPlaneGenerator"), number(7))
    yield "class that is long text", generator_with(b"N").replace(text("TriPlaneGenerator"), text("A" * 100_000))
    yield "numpy object", in_dict(called(named("numpy.core.multiarray", "scalar"), called(named("numpy", "dtype"), text("O8")), binary(b"x" * 8)))
    yield "numpy array", in_dict(called(named("numpy.core.multiarray", "_reconstruct"), named("numpy", "ndarray"), tupled(number(10**12)), text("b")))
    for code in sorted({ord(op.code) for op in pickletools.opcodes} - set(b".")):
        if code == ord("}"):
            continue  # an empty dict holds no weights, and no harm
        yield f"underflow at {code:#04x}", PROTO + bytes([code]) + STOP
        yield f"end at {code:#04x}", PROTO + b"](K\x01K\x02" + bytes([code])


def cut(good: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """A good pickle cut off before and inside each kind of opcode, and at other places."""
    seen: set[str] = set()
    for opcode, _, position in pickletools.genops(good):
        if opcode.name not in seen | {"STOP"} and position is not None:
            seen.add(opcode.name)
            yield f"cut before {opcode.name}", good[:position]
            yield f"cut inside {opcode.name}", good[: position + 1]
    for i in range(1, count):
        yield f"cut at {i}/{count}", good[: len(good) * i // count]


# ---- archives


def archive(entries: list[tuple[bytes, bytes]], **odd: Any) -> bytes:
    """A zip archive, with one thing odd."""
    body, directory = b"", b""
    method, flags = odd.get("method", 0), odd.get("flags", 0)
    for name, data in entries:
        packed = zlib.compress(data, 9)[2:-4] if method == 8 else data
        length = odd.get("length", len(data))
        size = odd.get("packed", len(packed))
        offset = odd.get("offset", 0 if odd.get("overlap") else len(body))
        crc = zlib.crc32(data)
        lengths = struct.pack("<IIIHH", crc, min(size, 2**32 - 1), min(length, 2**32 - 1), len(name), 0)
        header = b"PK\3\4" + struct.pack("<HHHHH", 20, flags, method, 0, 0) + lengths
        extra = odd.get("extra", b"")
        entry = struct.pack("<IIIHHHHHII", crc, min(size, 2**32 - 1), min(length, 2**32 - 1), len(name), len(extra), 0, 0, 0, 0, offset)
        directory += b"PK\1\2" + struct.pack("<HHHHHH", 20, 20, flags, method, 0, 0) + entry + name + extra
        if not (odd.get("overlap") and body):
            body += header + name + packed
    count = odd.get("count", len(entries))
    end = struct.pack("<HHHHIIH", 0, 0, min(count, 65535), min(count, 65535), odd.get("size", len(directory)), odd.get("start", len(body)), 0)
    wide = b""
    if "wide" in odd:
        record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, *odd["wide"])
        wide = record + b"PK\6\7" + struct.pack("<IQI", 0, odd.get("where", len(body) + len(directory)), 1)
        end = struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    return body + directory + wide + b"PK\5\6" + end


def referred(key: bytes = text("0"), count: int = 2, kind: str = "FloatStorage") -> bytes:
    return tupled(text("storage"), old_named("torch", kind), key, text("cpu"), number(count)) + b"Q"


def archives(command: bytes) -> Iterator[tuple[str, bytes]]:
    root = in_dict(tensor(referred()), "w")
    good = [(b"a/data.pkl", root), (b"a/byteorder", b"little"), (b"a/data/0", b"\0" * 8), (b"a/version", b"3\n")]
    zeros = b"\0" * (50 * MEBIBYTE)
    yield "calls system", archive([(b"a/data.pkl", in_dict(called(named("os", "system"), text(command.decode()))))])
    yield (
        "optimizer that calls system",
        archive(
            [(b"a/data.pkl", in_dict(named("torch.optim.adam", "Adam") + b")\x81" + called(named("os", "system"), text(command.decode())) + b"b"))]
        ),
    )
    yield "bomb", archive([good[0], (b"a/data/0", zeros)], method=8)
    yield "bomb in the pickle", archive([(b"a/data.pkl", zeros)], method=8)
    yield "claims 2^31 bytes", archive(good, length=2**31)
    yield "claims 2^31 bytes of both", archive(good, length=2**31, packed=2**31)
    yield "claims 2^63 bytes", archive(good, length=2**63, packed=2**63, extra=struct.pack("<HHQQ", 1, 16, 2**63, 2**63))
    yield "extra field too short", archive(good, length=2**63, packed=2**63, extra=b"\1\0\x10\0ab")
    yield "overlap", archive([(b"a/data.pkl", root), (b"a/data.pk2", root)], overlap=True)
    yield "entries everywhere the same", archive([(f"a/data/{i}".encode(), b"x" * 100) for i in range(1000)], offset=0)
    yield "name twice", archive([good[0], good[0]])
    yield "name that climbs", archive([*good, (b"a/../../../etc/cron.d/x", b"x")])
    yield "name from the root", archive([*good, (b"/etc/passwd", b"x")])
    yield "name with a backslash", archive([*good, (b"a\\..\\x", b"x")])
    yield "name with a drive", archive([*good, (b"C:/x", b"x")])
    yield "name with NUL", archive([*good, (b"a/x\0.txt", b"x")])
    yield "name with colours", archive([*good, (b"a/\x1b[31mx", b"x")])
    yield "name that is no ASCII", archive([*good, ("a/ж".encode(), b"x")])
    yield "no name", archive([*good, (b"", b"x")])
    yield "encrypted", archive(good, flags=1)
    yield "unknown method", archive(good, method=99)
    yield "offset beyond", archive(good, offset=2**31)
    yield "offset in a pickle", archive(good, offset=40)
    yield "directory beyond", archive(good, start=2**31)
    yield "directory longer", archive(good, size=2**20)
    yield "more entries than there are", archive(good, count=1000)
    yield "65535 entries", archive(good, count=65535)
    yield "2^40 entries", archive(good, wide=(2**40, 2**40, 100, 100))
    yield "wide directory that is not there", archive(good, wide=(4, 4, 100, 100), where=2**63)
    yield "wide directory of 2^63", archive(good, wide=(4, 4, 2**63, 2**63))
    yield "no pickle", archive([(b"a/data/0", b"\0" * 8)])
    yield "two pickles", archive([*good, (b"b/data.pkl", root)])
    yield "pickle at the top", archive([(b"data.pkl", root)])
    yield "no storage", archive(good[:2])
    yield "short storage", archive([good[0], (b"a/data/0", b"\0" * 7)])
    yield "long storage", archive([good[0], (b"a/data/0", b"\0" * 80)])
    yield "big-endian", archive([good[0], (b"a/byteorder", b"big"), good[2]])
    yield "empty", archive([])
    yield "only an end", b"PK\5\6" + b"\0" * 18
    yield "only a start", b"PK\3\4" + b"\0" * 100
    yield "script", archive([(b"a/data.pkl", PROTO + named("__torch__.model", "Net") + b")\x81}b" + STOP), (b"a/code/x.py", b"x")])
    for name, reference in {
        "huge": referred(count=10**15),
        "negative": referred(count=-2),
        "key that climbs": referred(key=text("../data.pkl")),
        "key that is a number": referred(key=b"K\x00"),
        "key that is a list": referred(key=b"]"),
        "other type": referred(kind="ComplexFloatStorage"),
        "no tuple": text("storage") + b"Q",
        "short": tupled(text("storage")) + b"Q",
        "in itself": b"]\x94h\x00aQ",
        "of a call": tupled(text("storage"), ORDERED, text("0"), text("cpu"), b"K\x02") + b"Q",
    }.items():
        yield f"reference {name}", archive([(b"a/data.pkl", in_dict(tensor(reference), "w")), *good[1:]])
    half = [(b"a/data.pkl", root), (b"a/data/0", b"\0" * 8)]
    whole = archive(half)
    for i in range(1, 20):
        yield f"cut at {i}/20", whole[: len(whole) * i // 20]
    shared = b"".join(text(str(i)) + tensor(referred(count=250_000), size=tupled(number(250_000))) + b"s" for i in range(2000))
    yield "one storage in thousands of tensors", archive([(b"a/data.pkl", PROTO + b"}" + shared + STOP), (b"a/data/0", b"\0" * 10**6)])


def others() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "text", b"These are no weights.\n" * 100
    yield "web page", b"<!DOCTYPE html><html>"
    yield "gzip", b"\x1f\x8b\x08" + b"\0" * 100
    yield "zeros", b"\0" * 1000
    yield "header of 2^63", struct.pack("<Q", 2**63) + b"{" + b" " * 100
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    yield "tensors beyond", struct.pack("<Q", len(header)) + header + b"\0" * 100
    header = json.dumps({"a": {"dtype": "F32", "shape": [-1, -25], "data_offsets": [0, 100]}}).encode()
    yield "shape below zero", struct.pack("<Q", len(header)) + header + b"\0" * 100
    yield "deep header", struct.pack("<Q", 200_001) + b'{"a":' + b"[" * 199_996


def places(folder: Path) -> Iterator[tuple[str, Path]]:
    """Paths that are no ordinary files, and files that claim to be larger than the machine."""
    yield "folder", folder
    yield "nothing", folder / "nothing"
    os.mkfifo(folder / "pipe")
    yield "pipe", folder / "pipe"
    (folder / "endless").symlink_to("/dev/zero")
    yield "device", folder / "endless"
    (folder / "loop").symlink_to(folder / "loop")
    yield "link to itself", folder / "loop"
    for name, start in {
        "sparse": b"",
        "sparse pickle": PROTO + b"}" + text("G_ema"),
        "sparse bytes": in_dict(b"\x8e" + struct.pack("<Q", 2**32 - 100))[:-2],
        "sparse text": PROTO + b"\x8d" + struct.pack("<Q", 2**32 - 100),
        "sparse storage": PROTO + b"}" + text("G_ema") + named("torch.storage", "_load_from_bytes") + b"\x8e" + struct.pack("<Q", 2**32 - 2**20),
        "sparse archive": b"PK\3\4",
    }.items():
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(2**32)
        yield name, folder / name


# ---- running them


def attacks(folder: Path) -> Iterator[tuple[str, Path]]:
    command = f"touch {folder / 'ran'}".encode()
    good = (folder / "eg3d.pkl").read_bytes()
    groups: dict[str, Iterator[tuple[str, bytes]]] = {
        "call": calls(command),
        "storage": storages(),
        "claim": claims(),
        "circle": circles(),
        "crowd": crowds(),
        "misuse": misuse(),
        "cut": cut(good, 40),
        "archive": archives(command),
        "other": others(),
    }
    for name in ("zip.pt", "legacy.pt"):
        whole = (folder / name).read_bytes()
        groups[f"cut {name}"] = iter([(f"at {i}/40", whole[: len(whole) * i // 40]) for i in range(1, 40)])
    system = named("os", "system") + tupled(text(command.decode())) + b"R"
    middle = good.index(text("rendering_kwargs")) if text("rendering_kwargs") in good else good.index(b"rendering_kwargs") - 2
    groups["inside"] = iter([("a good generator", good[:middle] + system + b"0" + good[middle:])])
    path = folder / "hostile"
    for group, files in groups.items():
        for name, content in files:
            path.write_bytes(content)
            yield f"{group}: {name}", path
    for name, place in places(folder):
        yield f"place: {name}", place


READERS: dict[str, Callable[[Path], Any]] = {
    "import_eg3d": import_eg3d,
    "read_checkpoint": read_checkpoint,
    "read_state_dict": read_state_dict,
    "import_talk3d": import_talk3d,
    "import_checkpoint": lambda path: import_checkpoint(path, path.parent / "out.safetensors"),
}


def outcome(read: Callable[[Path], Any], path: Path) -> str:
    try:
        read(path)
    except WeightsError as error:
        message = str(error)
        return "refused" if message.isascii() and message.isprintable() and len(message) < 600 else f"refused with {message[:300]!a}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]!a}"
    return "accepted"


def give_up(*_: Any) -> None:
    raise TimeoutError(f"{SECONDS} s are over")


def main() -> None:
    signal.signal(signal.SIGALRM, give_up)
    folder = Path(sys.argv[1])
    for name, read in {"eg3d.pkl": import_eg3d, "zip.pt": read_checkpoint, "legacy.pt": read_checkpoint}.items():
        read(folder / name)  # what is good is read, and what is loaded late is loaded
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    mapped = 2**32  # the sparse files
    resource.setrlimit(resource.RLIMIT_AS, (virtual + mapped + 200 * MEBIBYTE, resource.RLIM_INFINITY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results: dict[str, dict[str, str]] = {}
    slowest = (0.0, "")
    for name, path in attacks(folder):
        results[name] = {}
        for reader, read in READERS.items():
            signal.alarm(SECONDS)
            start = time.process_time()
            results[name][reader] = outcome(read, path)
            slowest = max(slowest, (time.process_time() - start, f"{name}, {reader}"))
            signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"results": results, "slowest": slowest, "grown_mib": grown, "ran": (folder / "ran").exists()}))


if __name__ == "__main__":
    main()
