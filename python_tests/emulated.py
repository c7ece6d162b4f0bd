"""The CPU library compiled for another processor, run by an emulator, as a backend: tests of the ops run on it without a change.

A call's structs, and all memory that they point to, go through a pipe to a program that makes the call (emulated_host/server.cpp),
and come back. The backend is the native one, with functions that do this in place of those of the library.
"""

import contextlib
import ctypes
import functools
import struct
import subprocess
from unittest import mock

import torch

from lozo_kernels.kernels.backends import native
from lozo_kernels.kernels.backends.packing import FIELDS

_POINTERS = [FIELDS.index(name) for name in ("x", "v", "n")]
_EXTENTS = [FIELDS.index(name) for name in ("batch", "rows", "cols")]


class Memory:
    """The storages that a call may point into, as the first buffers of a request."""

    def __init__(self, tensors):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.storages = [(start, size) for start, size in storages.items() if size]

    def find(self, address):
        """The buffer of an address and the place in it, or None."""
        found = (i for i, (start, size) in enumerate(self.storages) if start <= address < start + size)
        return next(((i, address - self.storages[i][0]) for i in found), None)

    def place(self, address):
        found = self.find(address)
        assert found is not None, "an address that is no tensor's"
        return found

    def read(self):
        return [ctypes.string_at(start, size) for start, size in self.storages]

    def write(self, contents, tables):
        """Takes over what a call made of the storages, except tables, whose addresses are those of the other process."""
        untouched = {rows.untyped_storage().data_ptr() for rows in tables}
        for (start, size), content in zip(self.storages, contents, strict=False):
            if start not in untouched:
                ctypes.memmove(start, content, size)


class EmulatedBackend(native.NativeBackend):
    """The native backend with the functions of a library that a program serves, which ``command`` starts."""

    name = "emulated"

    def __init__(self, command):
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._memory, self._tables = Memory(()), []

    def close(self):
        self._server.communicate()
        assert self._server.returncode == 0

    def set_isa(self, name):
        assert self._call("lozo_set_isa", ctypes.create_string_buffer(name.encode())) == 0

    def supports(self, name):
        return bool(self._call("lozo_isa_supported", ctypes.create_string_buffer(name.encode())))

    def run(self, op, table, call):
        tables = [native._packed(t, op.factors and t is table).rows for t in (table, call.out) if t is not None]
        outs = () if call.out is None else call.out.x
        values = (call.scales, call.decay, call.coefficients, call.alpha, call.beta)
        with self._serving(tables, table.x, table.v, table.n, outs, values):
            super().run(op, table, call)

    def resample_(self, table, seed, window, reproject):
        with self._serving([native._packed(table).rows], table.x, table.v, table.n):
            super().resample_(table, seed, window, reproject)

    def lowrank_linear_(self, call):
        with self._serving([], _tensors_of(call)):
            super().lowrank_linear_(call)

    def lowrank_embedding_(self, call):
        with self._serving([], _tensors_of(call)):
            super().lowrank_embedding_(call)

    def factor(self, seed, rows, rank, *rest, **settings):
        out = torch.empty(rows, rank)
        with self._serving([], [out]), mock.patch.object(torch, "empty", lambda *_, **__: out):
            return super().factor(seed, rows, rank, *rest, **settings)

    def __getattr__(self, name):
        """A function of the library."""
        if not name.startswith("lozo_"):
            raise AttributeError(name)
        function = functools.partial(self._call, name)
        function.__name__ = name
        return function

    @contextlib.contextmanager
    def _serving(self, tables, *groups):
        """Calls in the body may point into tables, whose rows hold addresses themselves, and into groups of tensors."""
        self._memory, self._tables = Memory([*tables, *(t for group in groups for t in group or () if t is not None)]), tables
        try:
            with mock.patch.object(native, "_library", lambda: self):
                yield
        finally:
            self._memory, self._tables = Memory(()), []

    def _call(self, name, *arguments):
        memory = self._memory
        buffers, pointers, given = memory.read(), self._pointers_of_tables(), []
        for argument in arguments:
            if isinstance(argument, int):
                given += memory.find(argument) or (-1, argument)
                continue
            if isinstance(argument, ctypes.Structure):
                pointers += _pointers_of(argument, len(buffers), memory)
            given += (len(buffers), 0)
            buffers.append(bytes(argument))
        status, contents = self._exchange(name, buffers, pointers, given)
        memory.write(contents, self._tables)
        return status

    def _pointers_of_tables(self):
        pointers = []
        for table in self._tables:
            for r, row in enumerate(table.tolist()):
                for field in _POINTERS:
                    if row[field] and all(row[extent] for extent in _EXTENTS):
                        buffer, start = self._memory.place(table.data_ptr())
                        pointers += (buffer, start + 8 * (r * len(FIELDS) + field), *self._memory.place(row[field]))
        return pointers

    def _exchange(self, name, buffers, pointers, given):
        to, back = self._server.stdin, self._server.stdout
        request = [_ints(len(name)), name.encode(), _ints(len(buffers))]
        for content in buffers:
            request += (_ints(len(content)), content)
        request.append(_ints(len(pointers) // 4, *pointers, len(given) // 2, *given))
        to.write(b"".join(request))
        to.flush()
        status = back.read(8)
        assert len(status) == 8, f"{name}: the program that serves the library died"
        return struct.unpack("<q", status)[0], [back.read(len(content)) for content in buffers]


def _pointers_of(argument, buffer, memory):
    """Where a struct's fields point to, of those that are addresses of tensors' values."""
    pointers = []
    for field, kind in argument._fields_:
        address = getattr(argument, field)
        if kind is ctypes.c_void_p and address and memory.find(address):
            pointers += (buffer, getattr(type(argument), field).offset, *memory.place(address))
    return pointers


def _tensors_of(call):
    return (call.y, call.x, call.v, call.b, call.draws, call.scales, call.gain, call.shift)


def _ints(*values):
    return struct.pack(f"<{len(values)}q", *values)
