// Loads a package and writes, away from the page. Messages: open, write, turn, stop; opened, piece, done, problem, progress.

import * as ort from "./parts/onnxruntime-web/dist/ort.wasm.min.mjs";
import * as tokenizers from "./parts/tokenizers/dist/tokenizers.min.mjs";
import { FileBytes, UrlBytes } from "./host/bytes.js";
import { Package } from "./host/package.js";
import { Writer } from "./host/runtime.js";

const MOST_THREADS = 4; // one token has not enough work for more
ort.env.wasm.wasmPaths = new URL("./parts/onnxruntime-web/dist/", import.meta.url).href;
// Threads share memory, which browsers allow pages alone that are isolated from all others (see README.md).
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;

let writer = null, stopped = false, dials = null;
const say = (type, more = {}) => self.postMessage({ type, ...more });

// Lets messages in: what the engine does, it does in one go.
const channel = new MessageChannel();
const breath = () => new Promise((resolve) => {
  channel.port1.onmessage = resolve;
  channel.port2.postMessage(null);
});

async function open({ url, file }) {
  const progress = (name, done, size) => say("progress", { text: `${name}: ${Math.round((100 * done) / Math.max(1, size))} %` });
  await writer?.runtime.close();
  writer = null;
  const archive = file ? new FileBytes(file) : url.endsWith("/") ? null : await UrlBytes.open(url);
  const pack = archive ? await Package.fromArchive(archive, progress) : await Package.fromFolder(url, progress);
  say("progress", { text: "the engine reads the model" });
  writer = await Writer.open(pack, ort, tokenizers);
  const { name, max_loops, rules, dials: own, parameters, quant, longest } = writer.runtime.info;
  const about = `${(parameters / 1e6).toFixed(1)} M parameters, ${quant}, in this browser with ${ort.env.wasm.numThreads} ` +
    (ort.env.wasm.numThreads === 1 ? "thread" : "threads");
  say("opened", { model: { name, max_loops, rules, dials: own, about, chat: false, max_tokens: Math.min(longest ?? Infinity, 100000) } });
}

async function write(asked) {
  const given = Object.fromEntries(Object.entries(asked).filter(([name]) => name in writer.runtime.info.dials));
  const { prompt, temperature, max_tokens, seed = crypto.getRandomValues(new Uint32Array(1))[0] } = asked;
  stopped = false;
  dials = writer.runtime.info.dialsWith(given);
  const wish = { temperature, max_tokens, seed, get dials() { return dials; } };
  for await (const { spans, depth } of writer.write(prompt, wish)) {
    say("piece", { spans, depth });
    await breath();
    if (stopped) break;
  }
  say("done");
}

self.addEventListener("message", async ({ data }) => {
  try {
    if (data.type === "open") await open(data);
    else if (data.type === "write") await write(data.asked);
    else if (data.type === "stop") stopped = true;
    else if (data.type === "turn") dials = writer.runtime.info.dialsWith({ ...dials, ...data.dials });
  } catch (error) {
    say("problem", { text: error.message ?? String(error) });
  }
});
