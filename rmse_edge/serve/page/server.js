// The page with the model behind rmse-serve.

import { KeyNeeded, start } from "./page.js";

class Server {
  key = "";
  #model = null;
  #writing = null; // the address of the answer that is being written

  async #ask(path, options = {}) {
    const headers = options.body ? { "content-type": "application/json" } : {};
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    const answer = await fetch(path, { ...options, headers });
    if (answer.ok) return answer;
    const said = (await answer.json().catch(() => null))?.error?.message ?? `${answer.status} ${answer.statusText}`;
    throw answer.status === 401 ? new KeyNeeded(said) : new Error(said);
  }

  async describe() {
    const found = (await (await this.#ask("v1/models")).json()).data[0];
    this.#model = found;
    return { ...found, name: found.id };
  }

  async *write(asked, signal) {
    const path = asked.messages ? "v1/chat/completions" : "v1/completions";
    const body = JSON.stringify({ model: this.#model.id, stream: true, ...asked });
    const answer = await this.#ask(path, { method: "POST", body, signal });
    try {
      for await (const event of events(answer.body)) {
        if (event.error) throw new Error(event.error.message);
        this.#writing = `${path}/${event.id}`;
        yield event.choices[0];
      }
    } finally {
      this.#writing = null;
    }
  }

  async turn(dials) {
    if (this.#writing) await this.#ask(this.#writing, { method: "PATCH", body: JSON.stringify(dials) });
  }
}

// The documents of a stream of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the answer broke off; is the server still there?");
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part === "data: [DONE]") return;
        const event = JSON.parse(part.slice("data: ".length));
        yield event;
        if (event.error) return;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

await start(new Server());
