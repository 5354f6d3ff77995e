// Talking to the server: the key, JSON, and streams of server-sent events.

const STORE = "turnout-key";

/** What the server answered instead of 200. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let asking = null;

/** Ask for the key, once for all who wait for it. */
function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    document.getElementById("key-wrong").hidden = sessionStorage.getItem(STORE) === null;
    field.value = "";
    dialog.showModal();
    dialog.querySelector("form").onsubmit = () => sessionStorage.setItem(STORE, field.value);
    dialog.onclose = () => {
      asking = null; // closed without a key: who still needs one asks again
      resolve();
    };
  });
  return asking;
}

/** `fetch` with the key; while the server says 401 it is asked for. Throws ApiError for any other failure. */
export async function call(path, options = {}) {
  for (;;) {
    if (asking) await asking;
    const key = sessionStorage.getItem(STORE);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.ok) return answer;
    if (answer.status === 401) {
      if (sessionStorage.getItem(STORE) === key) await askKey();
      continue;
    }
    const body = await answer.json().catch(() => null);
    throw new ApiError(answer.status, body?.error?.message ?? `HTTP ${answer.status}`);
  }
}

export async function getJson(path) {
  return (await call(path)).json();
}

/** The JSON of every frame of a stream; a frame with an error is thrown. */
export async function* stream(path, body, signal) {
  const answer = await call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, "the connection was closed before the answer ended");
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue;
      const data = frame.slice(6);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(0, chunk.error.message);
      yield chunk;
    }
  }
}
