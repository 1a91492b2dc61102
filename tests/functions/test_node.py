"""Functions in JavaScript: the handler's contract, its log, and a machine without Node."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.core.pair import until
from tests.functions.node import Node, function, looped

from edgeward.core.invocation import Call, CallFailed, Event, Http, Sample
from edgeward.core.resource import decode
from edgeward.functions import origins, programs, sources
from edgeward.functions.shelves import shelves
from edgeward.functions.versions import Config, Version, config_of

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
        assert "main.cjs:" in node.logged("cjs")
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
        await until(lambda: "nobody waits" in node.logged("f"), 30)
        text = node.logged("f")
        assert '"level":"info","message":"while it loads"' in text
        assert "hidden" not in text
        assert '"level":"warning","message":"to the console { a: 1 }","invocation":"' + reply.invocation in text
        assert '"fields":{"n":1,"deep":{"a":[1]}}' in text
        assert "[Function" in text and "by hand" in text
        assert text.count('"message":"many"') < 1000 and "more lines were dropped" in text
        assert (await node.call("f")).status == 200, "a promise that fails unseen does not end it"


@looped
async def test_it_asks_its_node_for_what_a_handler_may_ask(tmp_path: Path) -> None:
    code = """
export async function handler(event, context) {
  const { state } = context;
  const told = [await state.get('n'), await state.get('n', 'none')];
  const first = await state.set('n', { a: 1 }, 0);
  told.push(String(await state.get('n')), (await state.entry('n')).revision === first, await state.keys());
  try { await state.set('n', 'x', first + 7); } catch (error) { told.push(error.name, error.kind); }
  told.push(await state.delete('n'), await state.delete('n'));
  await Promise.all(['a', 'b'].map((topic) => context.publish(topic, { topic })));
  try { await context.publish('c'); } catch (error) { told.push(error.name, error.kind); }
  told.push(await context.sample(event.data, { label: 'cat' }, { score: 1, tags: { camera: 3 } }));
  told.push(context.secrets.db.password, event.batch === undefined);
  setTimeout(() => context.publish('a').catch((error) => console.log(`later: ${error.kind}`)), 50);
  return told;
}
"""
    sent, samples = [], []

    async def publisher(key: str, topic: str, data: bytes, qos: int, hops: int) -> None:
        sent.append((topic, data, qos))

    async def sampler(version: Version, call: str, sample: Sample) -> bool:
        samples.append(sample)
        return True

    doc = {
        "apiVersion": "edgeward/v1",
        "kind": "Function",
        "metadata": {"name": "f"},
        "spec": {"runtime": "node", "source": {"inline": code}, "publish": ["a", "b"], "secrets": ["db"]},
    }
    async with Node(tmp_path) as node:
        node.d.asks.publisher, node.d.asks.sampler = publisher, sampler
        node.d.configure([config_of(decode(doc), {}, {}, [], {"db": {"password": "swordfish"}})])
        assert json.loads((await node.call("f", b"in")).body) == [
            None, "none", '{"a":1}', True, ["n"], "Conflict", "conflict", True, False, "Refused", "refused", True,
            "swordfish", False,
        ]  # fmt: skip
        assert sorted(sent) == [("a", b'{"topic":"a"}', 1), ("b", b'{"topic":"b"}', 1)]
        assert (samples[0].input, samples[0].output, samples[0].score) == (b"in", b'{"label":"cat"}', 1.0)
        assert samples[0].tags == {"camera": "3"}
        await until(lambda: "later: refused" in node.logged("f"), 30)


@looped
async def test_an_archive_is_where_it_works(tmp_path: Path) -> None:
    digest = "ab" * 32
    async with Node(tmp_path) as node:
        (folder,) = shelves(node.d.folder, digest, "")
        (folder / "node_modules/greet").mkdir(parents=True)
        (folder / "main.js").write_text("const g = require('greet');\nexports.handler = (e) => g(e.text());\n")
        (folder / "node_modules/greet/index.js").write_text("module.exports = (who) => `hello ${who}`;\n")
        (folder / "run").write_text("#!/bin/sh\ncat greeting\npwd\n")
        (folder / "greeting").write_text("hello\n")
        (folder / "run").chmod(0o755)
        source = {"archive": {"digest": f"sha256:{digest}"}}
        node.d.configure([
            function("js", "", runtime="node", source=source),
            function("sh", "", runtime="command", source=source, command=["./run"], mode="stdio"),
        ])  # fmt: skip
        assert (await node.call("js", b"edge")).body == b"hello edge"
        if "pids" in (await node.d.probe()).enforced:
            where = b"/srv" if "tmp" in node.status("sh")["enforced"] else str(folder).encode()
            assert (await node.call("sh")).body == b"hello\n" + where + b"\n"
        assert (folder / "greeting").exists(), "it goes with no instance"


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
        await until(lambda: "main.mjs:1" in node.logged("f"), 30)


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
