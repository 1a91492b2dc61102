// Answers requests for /NAME.

export async function handler(event, context) {
  let asked = null;
  try {
    asked = JSON.parse(event.text());
  } catch {
    // said below
  }
  if (!asked?.name) {
    return context.response({ error: 'send JSON like {"name": "edge"}' }, { status: 400 });
  }
  console.log(`greeting ${asked.name}`);
  return { hello: asked.name, version: context.version };
}
