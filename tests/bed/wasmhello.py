#!/usr/bin/env python3
"""A small WebAssembly program, assembled by hand: it says hello and waits. usage: wasmhello.py OUT.wasm

(module
  (import "wasi_snapshot_preview1" "fd_write" (func $say (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $wait (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    (drop (call $say (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
    (drop (call $wait (i32.const 16) (i32.const 256) (i32.const 1) (i32.const 8))))
  (data (i32.const 0) ...))
"""
import struct, sys

TEXT = b"hello from WebAssembly\n"
# The text's address and length, room for a result, and a subscription to 1000 s of the monotonic clock.
DATA = struct.pack("<IIQ", 128, len(TEXT), 0)
DATA += struct.pack("<QB7xI4xQQH6x", 0, 0, 1, 1000 * 10**9, 0, 0)
DATA = DATA.ljust(128, b"\0") + TEXT


def number(n):
    """Unsigned LEB128."""
    out = bytearray()
    while True:
        out.append(n & 0x7F | (0x80 if n > 0x7F else 0))
        n >>= 7
        if not n:
            return bytes(out)


def sized(data):
    return number(len(data)) + data


def vector(*items):
    return number(len(items)) + b"".join(items)


def section(kind, data):
    return bytes([kind]) + sized(data)


def const(n):
    """i32.const of a number below 2 ** 13: signed LEB128."""
    return b"\x41" + (bytes([n]) if n < 64 else bytes([n & 0x7F | 0x80, n >> 7]))


def call(function, *arguments):
    return b"".join(map(const, arguments)) + b"\x10" + number(function) + b"\x1a"


def wasi(name):
    return sized(b"wasi_snapshot_preview1") + sized(name) + b"\x00\x00"


body = b"\x00" + call(0, 1, 0, 1, 8) + call(1, 16, 256, 1, 8) + b"\x0b"
module = b"\0asm" + struct.pack("<I", 1)
module += section(1, vector(b"\x60" + vector(*[b"\x7f"] * 4) + vector(b"\x7f"), b"\x60\x00\x00"))
module += section(2, vector(wasi(b"fd_write"), wasi(b"poll_oneoff")))
module += section(3, vector(b"\x01"))
module += section(5, vector(b"\x00\x01"))
module += section(7, vector(sized(b"memory") + b"\x02\x00", sized(b"_start") + b"\x00\x02"))
module += section(10, vector(sized(body)))
module += section(11, vector(b"\x00" + const(0) + b"\x0b" + sized(DATA)))
with open(sys.argv[1], "wb") as out:
    out.write(module)
