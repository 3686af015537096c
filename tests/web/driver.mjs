// Runs the browser's host in Node: node driver.mjs PARTS PACKAGE < JOB > RESULT, both JSON.
// JOB: {runs: [{dials, feeds: [[ids], ...]}], texts: [{prompt, dials, temperature, seed, max_tokens}]}, each from an empty past

import { openSync, readSync, closeSync, fstatSync, readFileSync } from "node:fs";
import { FileBytes } from "../../web_demo/host/bytes.js";
import { Package } from "../../web_demo/host/package.js";
import { Runtime, Writer } from "../../web_demo/host/runtime.js";

const [parts, path] = process.argv.slice(2);
const ort = await import(`${parts}/onnxruntime-web/dist/ort.wasm.min.mjs`);
const tokenizers = await import(`${parts}/tokenizers/dist/tokenizers.min.mjs`);
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
  const runtime = await Runtime.open(pack, ort);
  said.runs = [];
  for (const { dials, feeds } of job.runs ?? []) {
    const run = { logits: [], depth: [] };
    runtime.reset();
    for (const ids of feeds) {
      const { logits, depth } = await runtime.feed(ids, runtime.info.dialsWith(dials), true);
      run.logits.push(...logits.map((row) => Array.from(row)));
      run.depth.push(...depth);
    }
    said.runs.push(run);
  }
  said.texts = [];
  for (const { prompt, dials, ...asked } of job.texts ?? []) {
    const found = { text: "", tokens: [], depth: [] }, start = performance.now();
    const writer = await Writer.withTokenizer(pack, runtime, tokenizers);
    for await (const piece of writer.write(prompt, { ...asked, dials: runtime.info.dialsWith(dials) })) {
      found.text += piece.spans.map((span) => span.text).join("");
      found.tokens.push(...piece.tokens);
      found.depth.push(...piece.depth);
    }
    found.tokens_per_s = (1000 * found.tokens.length) / (performance.now() - start);
    said.texts.push(found);
  }
} catch (error) {
  said.error = error.message;
}
process.stdout.write(JSON.stringify(said), () => process.exit(0)); // the engine's threads would keep it alive
