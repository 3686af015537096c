// The server's page, with the model in a worker of this browser.

import { start } from "./page/page.js";

class Browser {
  #worker = new Worker("worker.js", { type: "module" });
  #heard = null; // who is told what the worker says
  #model = null;

  constructor() {
    this.#worker.addEventListener("message", ({ data }) => {
      if (data.type === "progress") document.getElementById("progress").textContent = data.text;
      else this.#heard?.(data);
    });
    this.#worker.addEventListener("error", (event) => this.#heard?.({ type: "problem", text: event.message ?? "the worker failed" }));
  }

  // Load what was picked: {url} or {file}.
  async load(what) {
    this.#model = null;
    this.#worker.postMessage({ type: "open", ...what });
    const said = await new Promise((heard) => { this.#heard = heard; });
    document.getElementById("progress").textContent = "";
    if (said.type === "problem") throw new Error(said.text);
    this.#model = said.model;
  }

  async describe() {
    if (this.#model) return this.#model;
    throw new Error("Choose a package: the archive that rmse-export --archive writes.");
  }

  async *write(asked, signal) {
    const queue = [];
    let wake = null;
    this.#heard = (data) => {
      queue.push(data);
      wake?.();
    };
    const stop = () => this.#worker.postMessage({ type: "stop" });
    signal.addEventListener("abort", stop);
    this.#worker.postMessage({ type: "write", asked });
    try {
      while (true) {
        while (!queue.length) await new Promise((resolve) => { wake = resolve; });
        const said = queue.shift();
        if (said.type === "problem") throw new Error(said.text);
        if (said.type === "done") return;
        yield said;
      }
    } finally {
      signal.removeEventListener("abort", stop);
      this.#heard = null;
    }
  }

  async turn(dials) {
    this.#worker.postMessage({ type: "turn", dials });
  }
}

const OPENER = `
<label>package <input id="file" type="file" accept=".zip"></label>
<span id="progress" role="status"></span>`;

const source = new Browser();
const page = await start(source);
const opener = Object.assign(document.createElement("div"), { className: "row", innerHTML: OPENER });
document.querySelector("header").after(opener);

async function load(what) {
  try {
    await source.load(what);
    await page.open();
  } catch (error) {
    page.problem(error);
  }
}

document.getElementById("file").addEventListener("change", ({ target }) => target.files[0] && load({ file: target.files[0] }));
const given = new URLSearchParams(location.search).get("package") ?? document.querySelector("meta[name=package]")?.content;
if (given) await load({ url: new URL(given, location.href).href });
