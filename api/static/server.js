/* Talking to the server: JSON, streams, and the key that it may ask for. */

export class Refused extends Error {
  constructor(problem) {
    super(problem.detail);
    this.needsKey = problem.status === 401;
  }
}

/* Kept by this tab alone, until it is closed. */
export function setKey(key) {
  sessionStorage.setItem("key", key);
}

async function request(url, { headers, ...options } = {}) {
  const key = sessionStorage.getItem("key");
  // a header cannot carry every letter that someone may type; those of a real key stay as they are
  const authorization = key ? { Authorization: `Bearer ${encodeURIComponent(key)}` } : {};
  const response = await fetch(url, { cache: "no-store", ...options, headers: { ...authorization, ...headers } });
  const unknown = { detail: `The server answers ${response.status}.`, status: response.status }; // a proxy's, say
  if (!response.ok) throw new Refused(await response.json().catch(() => unknown));
  return response;
}

export async function ask(url, options = {}) {
  const type = options.body ? { "Content-Type": "application/json" } : {};
  const headers = { Accept: "application/json", ...type, ...options.headers };
  return (await request(url, { ...options, headers })).json();
}

/* Opens a file of the server: links carry no key. */
export async function openFile(url) {
  const local = URL.createObjectURL(await (await request(url)).blob());
  open(local);
  setTimeout(() => URL.revokeObjectURL(local), 60_000); // loaded by then; until then it takes memory
}

/* Calls take(type, data) for each event, until the stream ends. EventSource could carry no key. */
export async function follow(url, signal, take) {
  const { body } = await request(url, { signal, headers: { Accept: "text/event-stream" } });
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const messages = (text + value).split("\n\n");
    text = messages.pop();
    for (const message of messages) {
      const fields = new Map(message.split("\n").map((line) => line.split(/: ?(.*)/s, 2)));
      if (fields.has("data")) take(fields.get("event"), JSON.parse(fields.get("data")));
    }
  }
}
