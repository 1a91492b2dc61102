"""Small programs in WebAssembly's text form, for tests."""

from __future__ import annotations

from typing import Any

from tests.functions.node import function

from edgeward.functions.versions import Config

_IMPORTS = {
    "read": '(import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))',
    "write": '(import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))',
    "exit": '(import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))',
    "status": '(import "edgeward" "status" (func $status (param i32) (result i32)))',
    "header": '(import "edgeward" "header" (func $header (param i32 i32 i32 i32) (result i32)))',
    "flush": '(import "edgeward" "flush" (func $flush (result i32)))',
    "env": '(import "edgeward" "env" (func $env (param i32 i32 i32 i32) (result i32)))',
    "put": '(import "edgeward" "write" (func $put (param i32 i32) (result i32)))',
    "take": '(import "edgeward" "read" (func $take (param i32 i32) (result i32)))',
    "get": '(import "edgeward" "state_get" (func $get (param i32 i32 i32 i32) (result i32)))',
    "set": '(import "edgeward" "state_set" (func $set (param i32 i32 i32 i32 i64) (result i32)))',
    "delete": '(import "edgeward" "state_delete" (func $delete (param i32 i32 i64) (result i32)))',
    "keys": '(import "edgeward" "state_keys" (func $keys (param i32 i32 i32 i32) (result i32)))',
    "revision": '(import "edgeward" "revision" (func $revision (result i64)))',
    "publish": '(import "edgeward" "publish" (func $publish (param i32 i32 i32 i32 i32) (result i32)))',
    "secret": '(import "edgeward" "secret" (func $secret (param i32 i32 i32 i32 i32 i32) (result i32)))',
    "sample": '(import "edgeward" "sample" (func $sample (param i32 i32 i32 i32 f64) (result i32)))',
    "log": '(import "edgeward" "log" (func $log (param i32 i32 i32) (result i32)))',
}


def module(body: str, *, data: str = "", start: str = "_start", more: str = "", pages: str = "1") -> str:
    """A module whose ``start`` does ``body``; ``data`` lies at 1024, and 4096 is free. It imports what it names."""
    imports = " ".join(text for name, text in _IMPORTS.items() if f"${name}" in body + more)
    return (
        f'(module {imports} (memory (export "memory") {pages}) (data (i32.const 1024) "{data}") '
        f'(global $n (mut i32) (i32.const 0)) {more} (func (export "{start}") (local $i i32) {body}))'
    )


def say(fd: int, size: int, at: int = 1024) -> str:
    """Writes so many bytes."""
    return (
        f"(i32.store (i32.const 0) (i32.const {at})) (i32.store (i32.const 4) (i32.const {size})) "
        f"(drop (call $write (i32.const {fd}) (i32.const 0) (i32.const 1) (i32.const 8)))"
    )


#: Answers with what it was sent.
ECHO = module(
    "(i32.store (i32.const 0) (i32.const 4096)) (i32.store (i32.const 4) (i32.const 32768)) "
    "(drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8))) "
    "(i32.store (i32.const 4) (i32.load (i32.const 8))) "
    "(drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))"
)
#: Goes on for ever when it was sent something, else answers.
LOOP = module(f"(if (call $take (i32.const 4096) (i32.const 1)) (then (loop $l (br $l)))) {say(1, 4)}", data="well")


def wasm(name: str, text: str, **spec: Any) -> Config:
    return function(name, text, runtime="wasm", **spec)
