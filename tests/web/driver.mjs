// Runs the browser's host in Node: node driver.mjs PARTS PACKAGE < JOB > RESULT, both JSON.
// JOB: {host_loop, runs: [{dials, feeds: [[ids], ...]}], texts: [{prompt, messages, further, dials, temperature, seed, max_tokens}]},
// runs each from an empty past; texts behind the `session` of a file, where there is one, and then saved as one to `save`.
// `damaged`: session files, what is said of each; `renders`: [{files, messages, open}], chat templates alone

import { openSync, readSync, closeSync, fstatSync, readFileSync, writeFileSync } from "node:fs";
import { FileBytes } from "../../web_demo/host/bytes.js";
import { Package } from "../../web_demo/host/package.js";
import { ChatTemplate } from "../../web_demo/host/chat.js";
import { Runtime } from "../../web_demo/host/runtime.js";
import { restoreSession, saveSession } from "../../web_demo/host/session.js";
import { Tokenizer } from "../../web_demo/host/tokenizer.js";
import { Writer } from "../../web_demo/host/writer.js";

const [parts, path] = process.argv.slice(2);
const ort = await import(`${parts}/onnxruntime-web/dist/ort.wasm.min.mjs`);
const tokenizers = await import(`${parts}/tokenizers/dist/tokenizers.min.mjs`);
const jinja = await import(`${parts}/jinja/dist/index.js`);
ort.env.wasm.numThreads = 1;

// A file as a browser's picker gives it: read by slices.
const blob = {
  size: fstatSync(openSync(path)).size,
  slice: (start, end) => ({
    async arrayBuffer() {
      const file = openSync(path), found = new Uint8Array(end - start);
      readSync(file, found, 0, end - start, start);
      closeSync(file);
      return found.buffer;
    },
  }),
};

const said = {};
try {
  const job = JSON.parse(readFileSync(0));
  const pack = await Package.fromArchive(new FileBytes(blob));
  const runtime = await Runtime.open(pack, ort, { hostLoop: job.host_loop ?? false });
  said.runs = [];
  for (const { dials, feeds } of job.runs ?? []) {
    const run = { logits: [], depth: [], steps: 0 };
    const calls = runtime.engine.run;
    runtime.engine.run = function (method, ...more) {
      run.steps += method === "step";
      return calls.call(this, method, ...more);
    };
    runtime.reset();
    for (const ids of feeds) {
      const { logits, depth } = await runtime.feed(ids, runtime.info.dialsWith(dials), true);
      run.logits.push(...logits.map((row) => Array.from(row)));
      run.depth.push(...depth);
    }
    runtime.engine.run = calls;
    said.runs.push(run);
  }
  const tokenizer = new Tokenizer(tokenizers, await pack.json(pack.manifest.text.tokenizer));
  const writer = new Writer(runtime, tokenizer, await ChatTemplate.open(pack, jinja));
  if (job.session) await restoreSession(writer, new Uint8Array(readFileSync(job.session)));
  said.refused = [];
  for (const file of job.damaged ?? []) {
    await restoreSession(writer, new Uint8Array(readFileSync(file))).then(() => said.refused.push("nothing"), ({ message }) => said.refused.push(message));
  }
  said.texts = [];
  for (const { dials, ...asked } of job.texts ?? []) {
    const found = { text: "", tokens: [], depth: [] }, start = performance.now();
    for await (const piece of writer.write({ ...asked, dials: runtime.info.dialsWith(dials ?? {}) })) {
      found.text += piece.spans.map((span) => span.text).join("");
      found.tokens.push(...piece.tokens);
      found.depth.push(...piece.depth);
    }
    found.tokens_per_s = (1000 * found.tokens.length) / (performance.now() - start);
    said.texts.push(found);
  }
  said.renders = [];
  for (const { files, messages, open } of job.renders ?? []) { // files of a package, by their names
    const own = { has: (name) => name in files, json: async (name) => JSON.parse(files[name]), text: async (name) => files[name] };
    const template = await ChatTemplate.open(own, jinja);
    said.renders.push([template.render(messages, open), template.endOfTurn(tokenizer)]);
  }
  if (job.save) writeFileSync(job.save, await saveSession(writer));
} catch (error) {
  said.error = error.message;
}
process.stdout.write(JSON.stringify(said), () => process.exit(0)); // the engine's threads would keep it alive
