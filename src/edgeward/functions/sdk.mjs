// The Node side of a function: the handler's contract, and the loop that serves calls over the worker's socket.
//
// In come frames of docs/functions.md ("Workers in other languages") on the descriptor that EDGEWARD_WORKER_FD names, out
// go results, pieces, errors and log lines. One call at a time. It needs nothing but Node (18 or newer), and it decides
// nothing about limits or versions. The function's files lie in the working directory.

import dns from 'node:dns';
import fs from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import net from 'node:net';
import path from 'node:path';
import { pathToFileURL } from 'node:url';
import { format } from 'node:util';

const SDK = 'edgeward-node/1';
const MAX_LINES = 1000; // that one call may log; the rest is counted
const MAX_LINE = 8192;
const PIECE = 256 * 1024;
const MAX_FRAME = 6 * 1024 * 1024 + PIECE;
const LEVELS = { debug: 10, info: 20, warning: 30, error: 40 };
const JSON_TYPE = 'application/json';
const TEXT_TYPE = 'text/plain; charset=utf-8';

// -- msgpack, as much of it as the protocol has ------------------------------------------------------------------------

class Packer {
  constructor(size) {
    this.buffer = Buffer.allocUnsafe(size);
    this.at = 0;
  }

  room(size) {
    if (this.at + size > this.buffer.length) {
      const bigger = Buffer.allocUnsafe(Math.max(this.buffer.length * 2, this.at + size));
      this.buffer.copy(bigger, 0, 0, this.at);
      this.buffer = bigger;
    }
    const at = this.at;
    this.at += size;
    return at;
  }

  byte(value) {
    const at = this.room(1); // before the buffer is looked at, which it may replace
    this.buffer[at] = value;
  }

  head(size, small, limit, codes) {
    if (size < limit) this.byte(small | size);
    else if (size < 0x100 && codes[0]) {
      this.byte(codes[0]);
      this.byte(size);
    } else if (size < 0x10000) {
      const at = this.room(3);
      this.buffer[at] = codes[1];
      this.buffer.writeUInt16BE(size, at + 1);
    } else {
      const at = this.room(5);
      this.buffer[at] = codes[2];
      this.buffer.writeUInt32BE(size, at + 1);
    }
  }

  number(value) {
    if (Number.isInteger(value) && value >= 0 && value < 0x80) this.byte(value);
    else if (Number.isInteger(value) && value >= 0 && value <= 0xffffffff) {
      const at = this.room(5);
      this.buffer[at] = 0xce;
      this.buffer.writeUInt32BE(value, at + 1);
    } else if (Number.isSafeInteger(value)) {
      const at = this.room(9);
      this.buffer[at] = 0xd3;
      this.buffer.writeBigInt64BE(BigInt(value), at + 1);
    } else {
      const at = this.room(9);
      this.buffer[at] = 0xcb;
      this.buffer.writeDoubleBE(value, at + 1);
    }
  }

  bytes(value) {
    this.head(value.length, 0, 0, [0xc4, 0xc5, 0xc6]);
    const at = this.room(value.length);
    this.buffer.set(value, at);
  }

  pack(value) {
    if (value === null || value === undefined) this.byte(0xc0);
    else if (typeof value === 'boolean') this.byte(value ? 0xc3 : 0xc2);
    else if (typeof value === 'number') this.number(value);
    else if (typeof value === 'string') {
      const size = Buffer.byteLength(value);
      this.head(size, 0xa0, 32, [0xd9, 0xda, 0xdb]);
      const at = this.room(size);
      this.buffer.write(value, at);
    } else if (value instanceof Uint8Array) this.bytes(value);
    else if (Array.isArray(value)) {
      this.head(value.length, 0x90, 16, [0, 0xdc, 0xdd]);
      for (const one of value) this.pack(one);
    } else if (typeof value === 'object') {
      const entries = Object.entries(value);
      this.head(entries.length, 0x80, 16, [0, 0xde, 0xdf]);
      for (const [key, one] of entries) {
        this.pack(key);
        this.pack(one);
      }
    } else throw new TypeError(`msgpack cannot say a ${typeof value}`);
  }
}

function frame(message) {
  const packer = new Packer(256);
  packer.room(4);
  packer.pack(message);
  packer.buffer.writeUInt32BE(packer.at - 4, 0);
  return packer.buffer.subarray(0, packer.at);
}

class Unpacker {
  constructor(buffer) {
    this.buffer = buffer;
    this.at = 0;
  }

  uint(size) {
    const value = size === 8 ? Number(this.buffer.readBigUInt64BE(this.at)) : this.buffer.readUIntBE(this.at, size);
    this.at += size;
    return value;
  }

  int(size) {
    const value = size === 8 ? Number(this.buffer.readBigInt64BE(this.at)) : this.buffer.readIntBE(this.at, size);
    this.at += size;
    return value;
  }

  take(size) {
    if (this.at + size > this.buffer.length) throw new RangeError('a frame that ends too early');
    this.at += size;
    return this.buffer.subarray(this.at - size, this.at);
  }

  array(size) {
    const found = [];
    for (let n = 0; n < size; n++) found.push(this.unpack());
    return found;
  }

  map(size) {
    const found = {};
    for (let n = 0; n < size; n++) {
      const key = this.unpack();
      // a key "__proto__" is a key like others
      Object.defineProperty(found, key, { value: this.unpack(), enumerable: true, writable: true, configurable: true });
    }
    return found;
  }

  unpack() {
    const code = this.uint(1);
    if (code < 0x80) return code;
    if (code < 0x90) return this.map(code & 15);
    if (code < 0xa0) return this.array(code & 15);
    if (code < 0xc0) return this.take(code & 31).toString();
    if (code >= 0xe0) return code - 0x100;
    switch (code) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: case 0xc5: case 0xc6: return this.take(this.uint(1 << (code - 0xc4)));
      case 0xca: return this.take(4).readFloatBE(0);
      case 0xcb: return this.take(8).readDoubleBE(0);
      case 0xcc: case 0xcd: case 0xce: case 0xcf: return this.uint(1 << (code - 0xcc));
      case 0xd0: case 0xd1: case 0xd2: case 0xd3: return this.int(1 << (code - 0xd0));
      case 0xd9: case 0xda: case 0xdb: return this.take(this.uint(1 << (code - 0xd9))).toString();
      case 0xdc: return this.array(this.uint(2));
      case 0xdd: return this.array(this.uint(4));
      case 0xde: return this.map(this.uint(2));
      case 0xdf: return this.map(this.uint(4));
      default: throw new RangeError(`msgpack code ${code} is not of the protocol`);
    }
  }
}

// -- the socket --------------------------------------------------------------------------------------------------------

// -- names: with a list of what it may reach there is no DNS; the node looks names up when they are connected to --------

function giveNames(text) {
  const hosts = new Map();
  for (const part of text.split(' ')) {
    const [name, addresses] = part.split('=');
    hosts.set(name, addresses ? addresses.split(',') : []);
  }
  const found = (name, options) => {
    const family = typeof options === 'number' ? options : { IPv4: 4, IPv6: 6 }[options?.family] ?? options?.family ?? 0;
    const known = net.isIP(name) ? [name] : hosts.get(String(name).toLowerCase().replace(/\.$/, '')) ?? [];
    const all = known.map((address) => ({ address, family: net.isIP(address) })).filter((a) => !family || a.family === family);
    if (all.length) return all;
    throw Object.assign(new Error(`${name} is not in limits.network`), { code: 'ENOTFOUND', hostname: name, syscall: 'getaddrinfo' });
  };
  dns.lookup = (name, options, callback) => {
    if (typeof options === 'function') [options, callback] = [{}, options];
    let all;
    try {
      all = found(name, options);
    } catch (e) {
      process.nextTick(callback, e);
      return;
    }
    if (options?.all) process.nextTick(callback, null, all);
    else process.nextTick(callback, null, all[0].address, all[0].family);
  };
  dns.promises.lookup = async (name, options) => {
    const all = found(name, options);
    return options?.all ? all : all[0];
  };
  syncBuiltinESMExports();
}
if (process.env.EDGEWARD_HOSTS) giveNames(process.env.EDGEWARD_HOSTS);

const socket = new net.Socket({ fd: Number(process.env.EDGEWARD_WORKER_FD), readable: true, writable: true });
delete process.env.EDGEWARD_WORKER_FD;
let waiting = []; // received, but not a whole frame yet
let received = 0;

/** Resolves when more may be written: a slow reader slows the answer down. */
function send(message) {
  if (socket.write(frame(message))) return undefined;
  return new Promise((resolve) => socket.once('drain', resolve));
}

socket.on('data', (data) => {
  waiting.push(data);
  received += data.length;
  while (received >= 4) {
    if (waiting[0].length < 4) waiting = [Buffer.concat(waiting)];
    const size = waiting[0].readUInt32BE(0);
    if (size > MAX_FRAME) throw new RangeError(`a frame of ${size} bytes`);
    if (received < size + 4) return;
    if (waiting.length > 1) waiting = [Buffer.concat(waiting)];
    const whole = waiting[0];
    received -= size + 4;
    waiting = received ? [whole.subarray(size + 4)] : [];
    take(new Unpacker(whole.subarray(4, size + 4)).unpack());
  }
});
socket.on('end', () => process.exit(0));
socket.on('error', () => process.exit(0)); // the node has gone

function take(message) {
  if (message[0] === 0) start(message);
  else if (message[0] === 1) serve(message);
  else if (message[0] === 2) answered(message);
}

// -- the log -----------------------------------------------------------------------------------------------------------

let call = ''; // id of the call in hand
let lines = 0;
let dropped = 0;
let least = LEVELS.info;

function log(level, text, fields) {
  if (level < least) return;
  lines += 1;
  if (lines > MAX_LINES) {
    dropped += 1;
    return;
  }
  const now = Date.now() / 1000;
  try {
    send([23, call, level, now, text.slice(0, MAX_LINE), fields || {}]);
  } catch (error) { // fields that msgpack cannot say
    send([23, call, level, now, text.slice(0, MAX_LINE), { fields: format('%o', fields).slice(0, MAX_LINE) }]);
  }
}

for (const [name, level] of Object.entries({ debug: 10, log: 20, info: 20, warn: 30, error: 40, trace: 10 })) {
  console[name] = (...words) => log(level, format(...words));
}
for (const [stream, level] of [[process.stdout, 20], [process.stderr, 30]]) {
  let begun = '';
  stream.write = (data, encoding, done) => {
    const parts = (begun + (typeof data === 'string' ? data : Buffer.from(data).toString())).split('\n');
    begun = parts.pop();
    if (begun.length > MAX_LINE) {
      parts.push(begun);
      begun = '';
    }
    for (const line of parts) log(level, line);
    const then = typeof encoding === 'function' ? encoding : done;
    if (then) process.nextTick(then);
    return true;
  };
}
const logger = {
  debug: (text, fields) => log(10, String(text), fields),
  info: (text, fields) => log(20, String(text), fields),
  warning: (text, fields) => log(30, String(text), fields),
  warn: (text, fields) => log(30, String(text), fields),
  error: (text, fields) => log(40, String(text), fields),
};
process.on('unhandledRejection', (error) => log(40, `nobody waited for what failed: ${trace(error)}`));

function trace(error) {
  const text = String((error && error.stack) || error);
  // the frames of this file tell the function's author nothing
  return text.split('\n').filter((line) => !line.includes('/functions/sdk.mjs') && !line.includes('node:internal'))
    .join('\n').slice(-MAX_LINE);
}

// -- what a handler is given -------------------------------------------------------------------------------------------

class Event {
  constructor([id, source, type, data, datacontenttype, subject, time, extensions, http]) {
    this.id = id;
    this.source = source;
    this.type = type;
    this.data = data || Buffer.alloc(0);
    this.datacontenttype = datacontenttype || '';
    this.subject = subject || '';
    this.time = time || '';
    this.extensions = extensions || {};
    this.http = null;
    if (http) {
      const [method, path, query, headers, client] = http;
      this.http = { method, path, query, headers, client };
    }
  }

  text() {
    return this.data.toString();
  }

  json() {
    return JSON.parse(this.data.toString());
  }

  /** The events of a batch (application/cloudevents-batch+json). */
  batch() {
    return this.json().map((one) => {
      const { id, source, type, data, data_base64, datacontenttype, subject, time, specversion, ...extensions } = one;
      let bytes = Buffer.alloc(0);
      if (data_base64 !== undefined) bytes = Buffer.from(data_base64, 'base64');
      else if (data !== undefined) bytes = Buffer.from(typeof data === 'string' ? data : JSON.stringify(data));
      return new Event([id, source, type, bytes, datacontenttype, subject, time, extensions, null]);
    });
  }
}

/** An answer with a status and headers of its own: `context.response(body, {status, headers})`. */
class Answer {
  constructor(body, { status = 200, headers = {} } = {}) {
    this.body = body;
    this.status = status;
    this.headers = Array.isArray(headers) ? headers : Object.entries(headers);
  }
}

/** The node did not do what was asked; `kind` is refused, conflict, too-large, too-many or unavailable. */
class Refused extends Error {
  constructor(kind, message) {
    super(message);
    this.name = kind === 'conflict' ? 'Conflict' : 'Refused';
    this.kind = kind;
  }
}

let asked = 0;
const asks = new Map(); // number -> what waits for the answer

function ask(kind, ...values) {
  asked += 1;
  const number = asked;
  return new Promise((resolve, reject) => {
    asks.set(number, { resolve, reject });
    send([kind, call, number, ...values]);
  });
}

function answered([, number, value, error]) {
  const one = asks.get(number);
  asks.delete(number);
  if (!one) return;
  if (error) one.reject(new Refused(error[0], error[1]));
  else one.resolve(value);
}

function bytesOf(value) {
  return bodyOf(value)[0];
}

const state = {
  get: async (key, otherwise = null) => { const found = await ask(25, key); return found ? found[0] : otherwise; },
  entry: async (key) => { const found = await ask(25, key); return found && { value: found[0], revision: found[1] }; },
  set: (key, value, revision = null) => ask(26, key, bytesOf(value), revision),
  delete: (key, revision = null) => ask(27, key, revision),
  keys: (prefix = '') => ask(28, prefix),
};

class Context {
  constructor([, namespace, name, version, node, site]) {
    Object.assign(this, { namespace, name, version, node, site, logger, state });
    this.invocation = ''; // id of this call
    this.deadline = 0; // on the clock of performance.now(), milliseconds: then this worker is ended
    this.secrets = {};
  }

  /** Seconds until this worker is ended. */
  left() {
    return (this.deadline - performance.now()) / 1000;
  }

  response(body, options) {
    return new Answer(body, options);
  }

  /** A message on a topic that the function declares (`publish`); with QoS 1 it is kept when this resolves. */
  publish(topic, data = '', { qos = 1 } = {}) {
    return ask(24, topic, bytesOf(data), qos);
  }

  /** Offers an input and what was made of it to those who train the model; whether it is kept. */
  sample(input, output = '', { score = null, tags = {} } = {}) {
    const words = Object.fromEntries(Object.entries(tags).map(([key, one]) => [key, String(one)]));
    return ask(29, bytesOf(input), bytesOf(output), score, words);
  }
}

// -- life --------------------------------------------------------------------------------------------------------------

let handler;
let context;
let bound;

async function load(spec) {
  const at = spec.lastIndexOf(':');
  const [module, name] = at < 0 ? ['main', spec] : [spec.slice(0, at), spec.slice(at + 1)];
  const file = ['.mjs', '.cjs', '.js'].map((end) => path.resolve(module + end))
    .find((one) => fs.statSync(one, { throwIfNoEntry: false }));
  if (!file) throw new Error(`there is no file ${module}.mjs, .cjs or .js`);
  const loaded = await import(pathToFileURL(file));
  const main = loaded.default;
  let found = loaded[name];
  if (found === undefined && main) found = main[name];
  if (found === undefined && name === 'handler' && typeof main === 'function') found = main;
  if (typeof found !== 'function') throw new Error(`${module} has no function ${name}`);
  return found;
}

async function start(init) {
  bound = init[8];
  least = LEVELS[init[9]] || LEVELS.info;
  context = new Context(init);
  context.secrets = init[10] || {};
  try {
    handler = await load(init[6]);
  } catch (error) {
    const text = `${(error && error.name) || 'Error'}: ${(error && error.message) || error}`.slice(0, MAX_LINE);
    socket.end(frame([17, text, trace(error)]), () => {
      if (error instanceof SyntaxError) throw error; // Node itself alone can say where, and does when it ends by it
      process.exit(1);
    });
    return;
  }
  lines = 0;
  send([16, 1, SDK]);
}

async function serve([, id, left, event]) {
  call = id;
  lines = 0;
  context.invocation = id;
  context.deadline = performance.now() + left * 1000;
  try {
    await answer(id, await handler(new Event(event), context));
  } catch (error) {
    const memory = error instanceof RangeError && /allocation failed|Invalid array buffer length/.test(error.message);
    send([22, id, memory ? 'memory' : 'error', (error && error.name) || 'Error', trace(error)]);
  }
  if (dropped) {
    const count = dropped;
    dropped = 0;
    lines = 0;
    log(30, `${count} more lines were dropped`);
  }
  if (call === id) call = '';
}

/** Bytes and their media type of what a handler returned. */
function bodyOf(value) {
  if (value === null || value === undefined) return [Buffer.alloc(0), ''];
  if (value instanceof Uint8Array) return [value, 'application/octet-stream'];
  if (value instanceof ArrayBuffer) return [new Uint8Array(value), 'application/octet-stream'];
  if (typeof value === 'string') return [Buffer.from(value), TEXT_TYPE];
  return [Buffer.from(JSON.stringify(value) ?? ''), JSON_TYPE];
}

const isPieces = (value) => value !== null && typeof value === 'object'
  && (typeof value[Symbol.asyncIterator] === 'function' || Object.prototype.toString.call(value) === '[object Generator]');

async function answer(id, given) {
  let value = given;
  let status = 200;
  let headers = [];
  if (value instanceof Answer) {
    ({ status } = value);
    headers = value.headers.map(([key, one]) => [key.toLowerCase(), String(one)]);
    value = value.body;
  } else if (value && typeof value.arrayBuffer === 'function' && value.headers) { // the Response of the web
    ({ status } = value);
    headers = [...value.headers];
    value = Buffer.from(await value.arrayBuffer());
  }
  if (isPieces(value)) {
    await stream(id, status, headers, value);
    return;
  }
  const [body, kind] = bodyOf(value);
  if (body.length > bound) {
    const words = `the answer has ${body.length} bytes; at most ${bound} are allowed in one piece: yield pieces`;
    send([22, id, 'too-large', words]);
    return;
  }
  if (kind && !headers.some(([key]) => key === 'content-type')) headers.push(['content-type', kind]);
  send([18, id, body, status, headers]);
}

async function stream(id, status, headers, pieces) {
  let begun = false;
  for await (const piece of pieces) {
    const [body, kind] = bodyOf(piece);
    if (!begun) {
      begun = true;
      if (kind && !headers.some(([key]) => key === 'content-type')) headers.push(['content-type', kind]);
      await send([19, id, status, headers]);
    }
    for (let at = 0; at < body.length; at += PIECE) await send([20, id, body.subarray(at, at + PIECE)]);
  }
  if (!begun) send([19, id, status, headers]);
  send([21, id]);
}
