"""Functions in JavaScript: the handler's contract, its log, and a machine without Node."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until
from tests.functions.node import Node, function, looped

from edgeward.core.invocation import Call, CallFailed, Event, Http
from edgeward.functions import origins, programs, sources
from edgeward.functions.versions import Config

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None, reason="there is no node on this machine (scripts/system-packages.sh installs it)"
)


def script(name: str, code: str, **spec: Any) -> Config:
    return function(name, code, **({"runtime": "node", "scale": {"max": 1}} | spec))


HELLO = "export const handler = (event, context) => ({ hello: event.text(), version: context.version });\n"


@looped
async def test_modules_of_both_kinds_answer_in_every_way(tmp_path: Path) -> None:
    many = """
exports.handler = async (event, context) => {
  switch (event.text()) {
    case 'none': return undefined;
    case 'bytes': return new Uint8Array([0, 255]);
    case 'text': return 'grüße';
    case 'json': return { a: [1, 2.5, null, true], big: 2 ** 40 };
    case 'response': return context.response({ a: 1 }, { status: 201, headers: { 'X-A': 1 } });
    case 'web': return new Response('web', { status: 202, headers: { 'x-b': '2' } });
    case 'http': return event.http;
    case 'left': return context.left() > 1 && context.deadline > performance.now();
    default: throw new TypeError('no');
  }
};
"""
    async with Node(tmp_path) as node:
        node.d.configure([script("esm", HELLO), script("cjs", many)])
        reply = await node.call("esm", b"edge")
        assert reply.body == f'{{"hello":"edge","version":"{reply.version}"}}'.encode()
        for what, status, kind, body in (
            (b"none", 200, None, b""),
            (b"bytes", 200, "application/octet-stream", b"\0\xff"),
            (b"text", 200, "text/plain; charset=utf-8", "grüße".encode()),
            (b"json", 200, "application/json", b'{"a":[1,2.5,null,true],"big":1099511627776}'),
            (b"response", 201, "application/json", b'{"a":1}'),
            (b"web", 202, "text/plain;charset=UTF-8", b"web"),
            (b"left", 200, "application/json", b"true"),
        ):
            reply = await node.call("cjs", what)
            assert (reply.status, dict(reply.headers).get("content-type"), reply.body) == (status, kind, body), what
        error = await node.fails("cjs", b"other")
        assert (error.kind, error.message) == ("error", "the handler raised TypeError; its log says where")
        assert "main.cjs:" in node.log("cjs").path.read_text()
        http = Http("PUT", "/a", "q", [("x", "1")], "192.0.2.1")
        reply = await node.d.invoke(Call("default/cjs", Event("1", "s", "t", b"http", http=http)))
        assert reply.body == b'{"method":"PUT","path":"/a","query":"q","headers":[["x","1"]],"client":"192.0.2.1"}'
        assert "exec" in node.status("cjs")["enforced"] or os.geteuid(), "it starts nothing but itself"


@looped
async def test_generators_stream_and_answers_too_large_are_named(tmp_path: Path) -> None:
    code = """
export async function* handler(event) {
  for (let n = 0; n < 40; n++) yield Buffer.alloc(100000, n);
  if (event.text() === 'fail') throw new Error('in the middle');
}
export const whole = () => Buffer.alloc(2000000);
"""
    async with Node(tmp_path) as node:
        node.d.configure([script("f", code), script("g", code, handler="whole", limits={"body": "1Mi"})])
        reply = await node.call("f")
        assert reply.chunks is not None
        body = b"".join([piece async for piece in reply.chunks])
        assert body == b"".join(bytes([n]) * 100_000 for n in range(40))
        reply = await node.call("f", b"fail")
        assert reply.chunks is not None
        with pytest.raises(CallFailed, match="Error"):
            async for _ in reply.chunks:
                pass
        assert (await node.fails("g")).kind == "too-large"


@looped
async def test_files_lie_in_the_working_directory(tmp_path: Path) -> None:
    files = {
        "package.json": '{"type": "module"}',
        "lib/deep/a.js": "export const a = 'from a file';",
        "app.js": """
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { a } from './lib/deep/a.js';
const here = path.dirname(fileURLToPath(import.meta.url));
export function start() {
  fs.writeFileSync(path.join(process.env.TMPDIR, 'x'), 'kept');
  let refused = '';
  try { fs.writeFileSync(path.join(here, 'x'), ''); } catch (error) { refused = error.code; }
  const note = fs.readFileSync('note.txt', 'utf8');
  const there = fs.existsSync(path.join(here, 'note.txt')); // asks access(2)
  return [a, note, there, fs.readFileSync(process.env.TMPDIR + '/x', 'utf8'), refused];
}
""",
        "note.txt": "a note",
    }
    async with Node(tmp_path) as node:
        probed = await node.d.probe()
        node.d.configure([function("f", "", runtime="node", source={"files": files}, handler="app:start")])
        body = (await node.call("f")).body
        assert body.startswith(b'["from a file","a note",true,"kept",')
        if "files" in probed.enforced:
            assert body.endswith(b'"EACCES"]')


@looped
async def test_what_it_prints_becomes_lines_of_its_log(tmp_path: Path) -> None:
    code = """
console.log('while it loads');
export function handler(event, context) {
  console.debug('hidden');
  console.warn('to the %s', 'console', { a: 1 });
  context.logger.error('with fields', { n: 1, deep: { a: [1] } });
  context.logger.info('cannot be said', { f: () => 1 });
  process.stdout.write('by hand\\n');
  for (let n = 0; n < 2000; n++) console.log('many');
  Promise.reject(new Error('nobody waits'));
}
"""
    async with Node(tmp_path) as node:
        node.d.configure([script("f", code)])
        reply = await node.call("f")
        await until(lambda: "nobody waits" in node.log("f").path.read_text(), 30)
        text = node.log("f").path.read_text()
        assert '"level":"info","message":"while it loads"' in text
        assert "hidden" not in text
        assert '"level":"warning","message":"to the console { a: 1 }","invocation":"' + reply.invocation in text
        assert '"fields":{"n":1,"deep":{"a":[1]}}' in text
        assert "[Function" in text and "by hand" in text
        assert text.count('"message":"many"') < 1000 and "more lines were dropped" in text
        assert (await node.call("f")).status == 200, "a promise that fails unseen does not end it"


@looped
async def test_code_that_does_not_load_says_where(tmp_path: Path) -> None:
    async with Node(tmp_path) as node:
        for code, why in (
            ("export function other() {}", "main has no function handler"),
            ("export function handler() {", "SyntaxError"),
            ("import 'nonesuch'; export const handler = 1;", "Cannot find package 'nonesuch'"),
            ("export const x = 1; throw new Error('at once');", "at once"),
            ("process.exit(3); export const handler = 1;", "ended with exit status 3"),
        ):
            node.d.configure([script("f", code)])
            await until(lambda why=why: why in node.status("f").get("message", ""), 60)
        await until(lambda: "main.mjs:1" in node.log("f").path.read_text(), 30)


@looped
async def test_a_machine_without_node_refuses_and_runs_it_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeward.functions import switch

    monkeypatch.setattr(switch, "_LOOK", 0.1)  # the period of looking again
    real = programs.find("node")
    old = tmp_path / "node"
    old.write_text("#!/bin/sh\necho v16.20.0\n")
    old.chmod(0o755)
    found = [""]
    monkeypatch.setattr(programs, "find", lambda name: found[0])
    async with Node(tmp_path / "data") as node:
        node.d.configure([script("f", HELLO)])
        await until(lambda: "there is no node on this machine" in node.status("f").get("message", ""), 30)
        assert node.status("f")["phase"] == "Refused"
        assert "apt-get install nodejs" in node.status("f")["message"]
        assert (await node.fails("f")).kind == "refused"
        found[0] = str(old)
        await until(lambda: "is version 16" in node.status("f").get("message", ""), 30)
        found[0] = real
        await node.phase("f", "Running")
        assert (await node.call("f", b"x")).status == 200


def test_inline_source_is_a_module_of_the_kind_that_it_is_written_as() -> None:
    for code, name in (
        ("export function handler() {}", "main.mjs"),
        ("import fs from 'fs';\nexports.handler = 1", "main.mjs"),
        ("exports.handler = () => import('fs')", "main.cjs"),
        ("const f = 1; // export this\nmodule.exports = f", "main.cjs"),
        ("  import('x');", "main.cjs"),
    ):
        assert list(script("f", code).version.files) == [name], code
    assert origins.NODE_SDK.endswith(".mjs") and Path(origins.NODE_SDK).exists()
    assert sources.RULES["node"]
