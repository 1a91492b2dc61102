// What a function must not be able to do, tried: in JavaScript.
import { spawn } from 'node:child_process';
import dgram from 'node:dgram';
import fs from 'node:fs';
import net from 'node:net';

const tried = (work) => new Promise((resolve) => {
  const refused = (error) => resolve(`refused: ${error.code}`);
  try { work(() => resolve('done'), refused); } catch (error) { refused(error); }
});

export async function handler(event) {
  const [what, rest] = event.text().split(' ');
  switch (what) {
    case 'pid': return String(process.pid);
    case 'memory': {
      const held = [];
      for (;;) held.push(Buffer.alloc(1 << 20, 'x'));
    }
    case 'fork': { // it may start Node, nothing else
      let made = 0;
      for (let n = 0; n < 200; n++) {
        const child = spawn(process.execPath, ['-e', 'setInterval(() => 0, 1e6)'], { stdio: 'ignore' });
        child.on('error', () => 0);
        if (child.pid) made += 1;
      }
      return String(made);
    }
    case 'loop': for (;;);
    case 'huge': return Buffer.alloc(2 ** 30, 'x');
    case 'kill': process.kill(process.pid, 'SIGKILL'); return new Promise(() => 0);
    case 'read': return tried((done) => { fs.readFileSync(rest); done(); });
    case 'write': return tried((done) => { fs.writeFileSync(rest, 'x'); done(); });
    case 'signal': return tried((done) => { process.kill(Number(rest), 'SIGKILL'); done(); });
    case 'tcp': return tried((done, refused) => { net.connect(Number(rest), '127.0.0.1', done).on('error', refused); });
    case 'udp': return tried((done, refused) => {
      dgram.createSocket('udp4').on('error', refused).send('x', Number(rest), '127.0.0.1', (e) => (e ? refused(e) : done()));
    });
    default: throw new Error(what);
  }
}
