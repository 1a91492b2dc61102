// What the conformance suite asks of a handler, in JavaScript.
export async function handler(event, context) {
  const what = event.type.replace('conformance.', '');
  switch (what) {
    case 'echo': {
      const headers = { 'content-type': event.datacontenttype || 'application/octet-stream' };
      return context.response(event.data, { headers });
    }
    case 'attributes':
      return [event.id, event.source, event.type, event.subject, event.time, event.extensions.traceparent].join('\n');
    case 'http': {
      const { method, path, query, headers, client } = event.http;
      return [method, path, query, headers.map(([k, v]) => `${k}=${v}`).join(','), client].join('\n');
    }
    case 'status':
      return context.response('', { status: Number(event.text()), headers: { 'X-Conformance': 'yes' } });
    case 'stream':
      return (async function* pieces() {
        for (let n = 0; n < Number(event.text()); n++) yield `piece ${n}\n`;
      }());
    case 'large':
      return Buffer.alloc(Number(event.text()));
    case 'log':
      context.logger.warning(event.text());
      return undefined;
    default:
      throw new Error(event.text());
  }
}
