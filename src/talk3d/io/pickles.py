"""A pickle machine that runs nothing: it turns a stream into plain values and inert nodes, within limits.

Python's unpickler imports and calls what a file names, and allocates what a file claims. Files of published weights are pickles all the same.
This machine knows the opcodes that data needs (protocols 2 to 5). It cannot import or call anything, a global that is not allowed ends it, long
strings stay slices of the file, and what comes out has no cycles, is shallow, and is small even when shared parts are counted each time.

It must not import pickle, and does not know what the names in a file mean: that is for the readers above it.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from talk3d.errors import WeightsError

MAX_OPCODES = 250_000
MAX_STACK = 50_000
MAX_TEXT_BYTES = 16 * 2**20
MAX_DEPTH = 100
MAX_UNFOLDED = 500_000
_SHORT = 4096  # longer strings are not decoded
_LONGEST_INTEGER = 16  # bytes
_ODD_FILE = "this is no file of weights that talk3d can trust: get it from its authors again"


@dataclass(eq=False, slots=True)
class Global:
    """The name of a class or function in a file; nothing is looked up."""

    name: str


@dataclass(eq=False, slots=True)
class Node:
    """What a file wanted done with a global: the arguments of its call, and state and items set afterwards. Nothing is called."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Persistent:
    """A reference to something that lies outside the pickle, such as a storage of torch."""

    key: Any


@dataclass(eq=False, slots=True)
class LongText:
    """A long string in UTF-8, left in the file."""

    data: memoryview


@dataclass(frozen=True)
class Pickled:
    """What one pickle holds, where it ends, and its references to the outside in order."""

    value: Any
    end: int
    references: list[Persistent]


def read_pickle(data: memoryview, allowed: re.Pattern[str], *, start: int = 0, references: bool = False) -> Pickled:
    """Read one pickle without running anything.

    Args:
        data: the file.
        allowed: matches in full the dotted names of the globals that may occur.
        start: where the pickle starts.
        references: whether persistent references may occur.

    Raises:
        WeightsError: the pickle is damaged, crosses a limit, or wants a global that is not allowed; the message names it.
    """
    machine = _Machine(data, allowed, start, references)
    try:
        value = machine.run()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise WeightsError(f"the pickle is damaged or cut off near byte {machine.position}: get the file again") from error
    _check_form(value)
    return Pickled(value, machine.position, machine.references)


def shown(name: object) -> str:
    """Return a name from a file, short and without anything that a terminal could obey."""
    return ascii(str(name)[:80]).strip("'\"")


def _refuse(why: str) -> WeightsError:
    return WeightsError(f"{why}: {_ODD_FILE}")


class _Machine:
    def __init__(self, data: memoryview, allowed: re.Pattern[str], start: int, references: bool) -> None:
        self.data, self.allowed, self.position, self.may_refer = data, allowed, start, references
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.references: list[Persistent] = []
        self.text_bytes = self.height = 0

    def run(self) -> Any:
        if self.number(1) != 0x80 or not 2 <= self.number(1) <= 5:
            raise _refuse("no pickle of protocols 2 to 5 starts here")
        for _ in range(MAX_OPCODES):
            code = self.data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                if self.outer or len(self.stack) != 1:
                    raise _refuse("the pickle stops in the middle of something")
                return self.stack[0]
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise _refuse(f"opcode {code:#04x} is not one that weights need")
            operation(self)
            if len(self.stack) + self.height > MAX_STACK:
                raise _refuse(f"the pickle stacks more than {MAX_STACK} values")
        raise _refuse(f"the pickle has more than {MAX_OPCODES} operations")

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise WeightsError(f"the file ends {end - len(self.data)} bytes too early: get it again")
        taken, self.position = self.data[self.position : end], end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        """Read the rest of a line, as the text opcodes have it."""
        head = bytes(self.data[self.position : self.position + 256])
        length = head.index(b"\n") if b"\n" in head else _cut_off(head)
        return bytes(self.take(length + 1))[:-1].decode("utf-8")

    def text(self, size: int, encoding: str = "utf-8") -> None:
        data = self.take(self.number(size))
        if len(data) > _SHORT:
            self.stack.append(LongText(data) if encoding == "utf-8" else data)
            return
        self.text_bytes += len(data)
        if self.text_bytes > MAX_TEXT_BYTES:
            raise _refuse(f"the pickle holds more than {MAX_TEXT_BYTES} bytes of text")
        self.stack.append(str(data, encoding))

    def long(self) -> None:
        length = self.number(1)
        if length > _LONGEST_INTEGER:
            raise _refuse(f"an integer of {length} bytes is not one that weights need")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def mark(self) -> None:
        if len(self.outer) >= MAX_DEPTH:
            raise _refuse(f"the pickle is nested more than {MAX_DEPTH} deep")
        self.height += len(self.stack)
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        found, self.stack = self.stack, self.outer.pop()
        self.height -= len(self.stack)
        return found

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("the stack is too short")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self, kind: type, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not kind:
            raise _refuse(f"something is added to {shown(type(target).__name__)} as if it were a {kind.__name__}")
        if kind is set:
            target.update(_key(value) for value in values)
        else:
            target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Node) else target
        if type(items) is not dict or len(values) % 2:
            raise _refuse(f"items are set in {shown(type(target).__name__)} as if it were a dict")
        items.update((_key(key), value) for key, value in zip(values[::2], values[1::2], strict=True))

    def global_of(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _refuse("the name of a global is not a string")
        dotted = f"{module}.{name}"
        if not self.allowed.fullmatch(dotted):
            raise WeightsError(f"it wants the global {shown(dotted)}, which weights do not need, so nothing of it was run: {_ODD_FILE}")
        self.stack.append(Global(dotted))

    def call(self) -> None:
        arguments, what = self.stack.pop(), self.stack.pop()
        if not isinstance(what, Global) or not isinstance(arguments, tuple):
            raise _refuse("something other than a global is called")
        self.stack.append(Node(what.name, arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Node) or target.state is not None:
            raise _refuse(f"a state is given to {shown(type(target).__name__)}, or for a second time")
        target.state = state

    def refer(self) -> None:
        if not self.may_refer:
            raise _refuse("a persistent reference leads out of the pickle")
        self.references.append(Persistent(self.stack.pop()))
        self.stack.append(self.references[-1])

    def frame(self) -> None:
        if self.number(8) > len(self.data) - self.position:
            raise WeightsError("a frame of the pickle reaches beyond the end of the file: get it again")


def _cut_off(head: bytes) -> int:
    raise _refuse(f"the name of a global starts with {shown(head[:20])} and does not end")


def _key(value: Any) -> Any:
    """Return a key of a dict, if it is of a kind whose hash is quick and whose hashes do not collide by design."""
    if value is None or isinstance(value, str | bool | Node) or (isinstance(value, int) and abs(value) < 2**60):
        return value
    raise _refuse(f"{shown(type(value).__name__)} is used as a key")


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def operation(m: _Machine) -> None:
        value = make(m)  # which may change the stack
        m.stack.append(value)

    return operation


def _memoise(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    def operation(m: _Machine) -> None:
        m.memo[index(m)] = m.stack[-1]

    return operation


_OPERATIONS: dict[int, Callable[[_Machine], Any]] = {
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("J"): _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    ord("K"): _push(lambda m: m.number(1)),
    ord("M"): _push(lambda m: m.number(2)),
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    0x8A: _Machine.long,
    0x8C: lambda m: m.text(1),
    ord("X"): lambda m: m.text(4),
    0x8D: lambda m: m.text(8),
    ord("U"): lambda m: m.text(1, "latin-1"),  # the byte strings of Python 2
    ord("T"): lambda m: m.text(4, "latin-1"),
    ord("C"): _push(lambda m: m.take(m.number(1))),
    ord("B"): _push(lambda m: m.take(m.number(4))),
    0x8E: _push(lambda m: m.take(m.number(8))),
    ord(")"): _push(lambda m: ()),
    ord("]"): _push(lambda m: []),
    ord("}"): _push(lambda m: {}),
    0x8F: _push(lambda m: set()),
    ord("("): _Machine.mark,
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("t"): _push(lambda m: tuple(m.since_mark())),
    ord("a"): lambda m: m.extend(list, [m.stack.pop()]),
    ord("e"): lambda m: m.extend(list, m.since_mark()),
    0x90: lambda m: m.extend(set, m.since_mark()),
    ord("s"): lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    ord("u"): lambda m: m.set_items(m.since_mark()),
    ord("q"): _memoise(lambda m: m.number(1)),
    ord("r"): _memoise(lambda m: m.number(4)),
    0x94: _memoise(lambda m: len(m.memo)),
    ord("h"): _push(lambda m: m.memo[m.number(1)]),
    ord("j"): _push(lambda m: m.memo[m.number(4)]),
    ord("c"): lambda m: m.global_of(m.line(), m.line()),
    0x93: lambda m: m.global_of(m.stack.pop(-2), m.stack.pop()),
    ord("R"): _Machine.call,
    0x81: _Machine.call,  # NEWOBJ: the arguments of __new__
    ord("b"): _Machine.build,
    ord("Q"): _Machine.refer,
    0x95: _Machine.frame,
}


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Node):
        yield from value.arguments
        yield value.state
        value = value.items
    if isinstance(value, Persistent):
        yield value.key
    elif isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, tuple | list | set):
        yield from value


def _check_form(root: Any) -> None:
    """Refuse cycles, depth, and structures that shared parts would blow up for whoever walks through them."""
    extents: dict[int, tuple[int, int] | None] = {}  # values and levels in it; None while its parts are being visited
    path: list[tuple[Any, Iterator[Any]]] = [((root,), iter((root,)))]
    while path:
        value, parts = path[-1]
        for part in parts:
            if not isinstance(part, Node | Persistent | dict | tuple | list | set):
                continue
            if id(part) not in extents:
                extents[id(part)] = None
                path.append((part, _parts(part)))
                break
            if extents[id(part)] is None:
                raise _refuse("the pickle holds something that contains itself")
        else:
            path.pop()
            inner = [extents.get(id(part)) or (1, 0) for part in _parts(value)]
            extents[id(value)] = unfolded, depth = 1 + sum(size for size, _ in inner), 1 + max((level for _, level in inner), default=0)
            if unfolded > MAX_UNFOLDED or depth > MAX_DEPTH:
                raise _refuse(f"the pickle unfolds to more than {MAX_UNFOLDED} values or {MAX_DEPTH} levels")
        if len(path) > MAX_DEPTH:
            raise _refuse(f"the pickle is nested more than {MAX_DEPTH} deep")
