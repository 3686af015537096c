// Loads a package and writes, away from the page. Messages: open, write, turn, stop, save, restore; opened, piece, done, saved,
// restored, problem, progress.

import * as jinja from "./parts/jinja/dist/index.js";
import * as tokenizers from "./parts/tokenizers/dist/tokenizers.min.mjs";
import { FileBytes, UrlBytes } from "./host/bytes.js";
import { findGpu, NotOnGpu } from "./host/engine.js";
import { Package } from "./host/package.js";
import { restoreSession, saveSession } from "./host/session.js";
import { Writer } from "./host/writer.js";

const MOST_THREADS = 4; // one token has not enough work for more
// Threads share memory, which browsers allow pages alone that are isolated from all others (see README.md).
const THREADS = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;
const BUILDS = { wasm: "./parts/onnxruntime-web/dist/ort.wasm.min.mjs", webgpu: "./parts/onnxruntime-webgpu/dist/ort.webgpu.min.mjs" };

// The engine is fetched when a package first needs it: its two builds together have 40 MB.
async function engine(build) {
  const ort = await import(BUILDS[build]);
  ort.env.wasm.wasmPaths = new URL(".", new URL(BUILDS[build], import.meta.url)).href;
  ort.env.wasm.numThreads = THREADS;
  return ort;
}

let writer = null, stopped = false, dials = null;
const say = (type, more = {}) => self.postMessage({ type, ...more });

// Lets messages in: what the engine does, it does in one go.
const channel = new MessageChannel();
const breath = () => new Promise((resolve) => {
  channel.port1.onmessage = resolve;
  channel.port2.postMessage(null);
});

async function open({ url, file, gpu }) {
  const progress = (name, done, size) => say("progress", { text: `${name}: ${Math.round((100 * done) / Math.max(1, size))} %` });
  await writer?.runtime.close();
  writer = null;
  const archive = file ? new FileBytes(file) : url.endsWith("/") ? null : await UrlBytes.open(url);
  const pack = archive ? await Package.fromArchive(archive, progress) : await Package.fromFolder(url, progress);
  say("progress", { text: "the engine reads the model" });
  let notice = "";
  if (gpu) {
    try {
      await findGpu();
      writer = await Writer.open(pack, { ort: await engine("webgpu"), tokenizers, jinja }, { gpu });
    } catch (error) {
      if (!(error instanceof NotOnGpu)) throw error;
      notice = `${error.message}: the package runs in WebAssembly.`;
    }
  }
  const onGpu = writer !== null;
  writer ??= await Writer.open(pack, { ort: await engine("wasm"), tokenizers, jinja });
  const { name, max_loops, rules, dials: own, parameters, quant, longest } = writer.runtime.info;
  const where = onGpu ? "on the GPU" : `with ${THREADS} ${THREADS === 1 ? "thread" : "threads"}`;
  const about = `${(parameters / 1e6).toFixed(1)} M parameters, ${quant}, in this browser ${where}`;
  const max_tokens = Math.min(longest ?? Infinity, 100000);
  say("opened", { model: { name, max_loops, rules, dials: own, about, notice, chat: writer.template !== null, sessions: true, max_tokens } });
}

async function write(asked) {
  const given = Object.fromEntries(Object.entries(asked).filter(([name]) => name in writer.runtime.info.dials));
  const { prompt, further, messages, temperature, max_tokens, seed = crypto.getRandomValues(new Uint32Array(1))[0] } = asked;
  stopped = false;
  dials = writer.runtime.info.dialsWith(given);
  const wish = { prompt, further, messages, temperature, max_tokens, seed, get dials() { return dials; }, get stopped() { return stopped; } };
  for await (const { spans, depth } of writer.write(wish)) {
    say("piece", { spans, depth });
    await breath();
  }
  say("done");
}

async function restore(file) {
  await restoreSession(writer, new Uint8Array(await file.arrayBuffer()));
  const { messages, tail } = writer.standing;
  say("restored", { messages, text: writer.tokenizer.decode([...tail.context, ...tail.open]) });
}

self.addEventListener("message", async ({ data }) => {
  try {
    if (data.type === "open") await open(data);
    else if (data.type === "write") await write(data.asked);
    else if (data.type === "stop") stopped = true;
    else if (data.type === "save") say("saved", { bytes: await saveSession(writer) });
    else if (data.type === "restore") await restore(data.file);
    else if (data.type === "turn") dials = writer.runtime.info.dialsWith({ ...dials, ...data.dials });
  } catch (error) {
    say("problem", { text: error.message ?? String(error) });
  }
});
