// The server's page, with the model in a worker of this browser.

import { findGpu } from "./host/engine.js";
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

  // Load what was picked: {url} or {file}, and whether on the GPU.
  async load(what) {
    this.#model = null;
    const { model } = await this.ask("open", what).finally(() => { document.getElementById("progress").textContent = ""; });
    document.getElementById("progress").textContent = model.notice;
    this.#model = model;
  }

  // What the worker answers to a message.
  async ask(type, more = {}) {
    this.#worker.postMessage({ type, ...more });
    const said = await new Promise((heard) => { this.#heard = heard; });
    if (said.type === "problem") throw new Error(said.text);
    return said;
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
<label><input id="gpu" type="checkbox" disabled> on the GPU (WebGPU)</label>
<small id="no-gpu"></small>
<button id="save" type="button">Save the session</button>
<label>open a session <input id="session" type="file"></label>
<span id="progress" role="status"></span>`;

const source = new Browser();
const page = await start(source);
const opener = Object.assign(document.createElement("div"), { className: "row", innerHTML: OPENER });
document.querySelector("header").after(opener);
const [gpu, noGpu] = ["gpu", "no-gpu"].map((id) => document.getElementById(id));
let chosen = null;

async function load(what) {
  chosen = what;
  try {
    await source.load({ ...what, gpu: gpu.checked });
    await page.open();
  } catch (error) {
    page.problem(error);
  }
}

const trying = (act) => async (event) => {
  page.problem();
  try {
    if (page.writing()) throw new Error("A text is being written; stop it first.");
    await act(event);
  } catch (error) {
    page.problem(error);
  }
};

document.getElementById("save").addEventListener("click", trying(async () => {
  const { bytes } = await source.ask("save");
  const link = Object.assign(document.createElement("a"), { download: `${(await source.describe()).name}.session` });
  link.href = URL.createObjectURL(new Blob([bytes]));
  link.click();
  URL.revokeObjectURL(link.href);
}));
document.getElementById("session").addEventListener("change", trying(async ({ target }) => {
  const [file] = target.files;
  target.value = ""; // so that the same file can be picked again
  if (file) page.resume(await source.ask("restore", { file }));
}));

const query = new URLSearchParams(location.search);
try {
  await findGpu();
  gpu.disabled = false;
  gpu.checked = query.has("gpu");
} catch (error) {
  noGpu.textContent = error.message;
}
gpu.addEventListener("change", () => chosen && load(chosen));
document.getElementById("file").addEventListener("change", ({ target }) => target.files[0] && load({ file: target.files[0] }));
const given = query.get("package") ?? document.querySelector("meta[name=package]")?.content;
if (given) await load({ url: new URL(given, location.href).href });
