// A looped language model that remembers what it was fed: runtimes/host/text.py in JavaScript, steered by the manifest.

import { Calls, planCalls } from "./calls.js";
import { Engine } from "./engine.js";
import { zeros } from "./place.js";
import { starts } from "./random.js";

// The dials that are no numbers of loops, by the value that turns them off.
const WHOLE = new Set(["max_loops", "min_loops", "exit_steady"]);

// What a host needs to know, of the manifest's "model".
export class Info {
  constructor(model) {
    Object.assign(this, model);
    if (this.blocks) throw new Error(`${this.name}: writes by blocks, which this page does not show; rmse-run does`);
    if (this.plan) throw new Error(`${this.name}: runs layers by a plan of its prompt, which this page does not know; rmse-run does`);
    if (!this.text) throw new Error(`${this.name}: fills in boards and reads no text, which this page does not show`);
    const appended = Object.values(this.state).find((state) => state.kind === "append");
    this.capacity = appended ? appended.shape.at(-2) : null;
    const limits = [this.text.max_seq_len, this.capacity].filter((limit) => limit !== null);
    this.longest = limits.length ? Math.min(...limits) : null;
  }

  // Slots of the appended state behind so many positions; null: nothing is appended.
  slots(positions) {
    if (this.capacity === null || this.page === null) return this.capacity;
    return Math.min(this.capacity, this.page * Math.max(1, Math.ceil(positions / this.page)));
  }

  shape(state, slots) {
    return slots === null || state.kind !== "append" ? state.shape : [...state.shape.slice(0, -2), slots, state.shape.at(-1)];
  }

  // The model's own dials with those given put in.
  dialsWith(given) {
    const dials = { ...this.dials, ...given };
    for (const [name, value] of Object.entries(dials)) {
      if (!(name in this.dials)) throw new Error(`${name}: is no dial`);
      if (!Number.isFinite(value) || (WHOLE.has(name) && !Number.isInteger(value))) throw new Error(`${name}: got ${value}`);
    }
    if (dials.max_loops < 1 || dials.max_loops > this.max_loops) throw new Error(`max_loops: got ${dials.max_loops}, expected 1..${this.max_loops}`);
    if (!("min_loops" in given)) dials.min_loops = Math.min(dials.min_loops, dials.max_loops);
    if (dials.min_loops < 1 || dials.min_loops > dials.max_loops) throw new Error(`min_loops: got ${dials.min_loops}, expected 1..${dials.max_loops}`);
    return dials;
  }
}

const TRIED = 8; // tokens that one call takes, of models that have calls of many rows

const scalar = (name, value) => WHOLE.has(name)
  ? { type: "int64", dims: [], data: BigInt64Array.of(BigInt(value)) }
  : { type: "float32", dims: [], data: Float32Array.of(value) };
const whole = (value) => ({ type: "int64", dims: [1], data: BigInt64Array.of(BigInt(value)) });

export class Runtime {
  position = 0;
  noiseSeed = 0;
  #calls;
  #hits = {};

  // `ort`: the module onnxruntime-web; `gpu`: compute on the GPU, whose engine leaves the loop to the host; `hostLoop`: own
  // the loop elsewhere, too.
  static async open(pack, ort, { gpu = false, hostLoop = gpu } = {}) {
    const runtime = new Runtime(), info = new Info(pack.manifest.model);
    info.hostLoop = hostLoop;
    // Nothing is drafted here, so heads that draft are not loaded.
    const methods = info.methods.filter((method) => method !== "embed_segment" && !/^draft\d+$/.test(method) && !(hostLoop && method === "loop"));
    const engine = await Engine.open(pack, ort, hostLoop ? [...methods, "begin", "step"] : methods, info.chunks, gpu);
    runtime.info = info;
    runtime.engine = engine;
    runtime.#calls = await Calls.open(info, engine);
    if (info.retrieval) { // nothing is ever retrieved here
      const rows = info.retrieval.slots * info.retrieval.hits;
      runtime.#hits = {
        retrieved: zeros("float32", [1, rows, info.width]),
        retrieved_scores: zeros("float32", [1, rows]),
        retrieved_valid: zeros("bool", [1, rows]),
      };
    }
    if (gpu) await runtime.#try();
    return runtime;
  }

  // A call of each size: what the GPU refuses, it refuses when it is to compute; and it compiles what it computes with.
  async #try() {
    try {
      for (const count of [TRIED, 1]) await this.feed(new Array(count).fill(0), this.info.dialsWith({ max_loops: 1 }));
    } catch (error) {
      await this.close();
      throw this.engine.refused(error);
    }
    this.reset();
  }

  close() {
    return this.engine.close();
  }

  reset() {
    this.#calls.reset();
    this.position = 0;
  }

  // All that is kept between calls, in this memory, but for the position: name -> array. Of what is appended only what is filled.
  async tensors() {
    const kept = { ...(await this.#calls.tensors(this.position)) };
    for (const [name, array] of Object.entries(this.#hits)) kept[name] = array;
    return kept;
  }

  // Types and shapes of what `tensors` gives at a position.
  forms(position) {
    const hits = Object.entries(this.#hits).map(([name, { type, dims }]) => [name, { type, dims }]);
    return Object.fromEntries([...this.#calls.forms(position), ...hits]);
  }

  // Go on from what `tensors` gave at a position.
  restore(position, tensors) {
    this.#calls.restore(position, tensors);
    for (const [name, { data }] of Object.entries(this.#hits)) data.set(tensors[name].data);
    this.position = position;
  }

  // Continue the text: logits of every token, or of the last one, and the loops of each.
  async feed(tokens, dials, all = false) {
    const { info } = this, logits = [], depth = [];
    if (info.longest !== null && this.position + tokens.length > info.longest) {
      throw new Error(`${this.position + tokens.length} tokens are more than the ${info.longest} that the package takes; shorten the text`);
    }
    const told = Object.fromEntries(Object.entries(dials).map(([name, value]) => [name, scalar(name, value)]));
    const prefix = info.text.prefix && !this.position ? tokens.length : 0;
    let done = 0;
    for (const [chunk, n] of planCalls(this.position, tokens.length, info.chunks, info.segment, prefix)) {
      const head = all || done + n === tokens.length;
      const ids = zeros("int64", [1, chunk]);
      tokens.slice(done, done + n).forEach((token, i) => { ids.data[i] = BigInt(token); });
      const inputs = { tokens: ids, ...this.#hits, ...starts(info.noise, this.noiseSeed, this.position, chunk, info.width) };
      const found = await this.#calls.run(chunk, inputs, this.#context(chunk, n, prefix), told, this.position, n, head);
      for (let i = 0; i < n; i++) depth.push(Number(found.depth.data[i]));
      if (head) {
        const size = info.text.vocab_size;
        for (let i = all ? 0 : n - 1; i < n; i++) logits.push(found.logits.data.slice(i * size, (i + 1) * size));
      }
      done += n;
      this.position += n;
      if (this.#calls.segment && this.position % info.segment === 0) await this.#calls.memorize();
    }
    return { logits, depth };
  }

  // What a call is told about where it stands.
  #context(chunk, n, prefix) {
    const { rotary_dims: dims, rope_theta: theta, further_thetas: further } = this.info.text, found = {};
    for (const [ending, base] of dims ? [["", theta], ...Object.entries(further).map(([name, base]) => [`_${name}`, base])] : []) {
      const cos = zeros("float32", [1, chunk, dims / 2]), sin = zeros("float32", [1, chunk, dims / 2]);
      for (let row = 0; row < chunk; row++) {
        for (let pair = 0; pair < dims / 2; pair++) {
          const angle = (this.position + row) * base ** ((-2 * pair) / dims);
          cos.data[(row * dims) / 2 + pair] = Math.cos(angle);
          sin.data[(row * dims) / 2 + pair] = Math.sin(angle);
        }
      }
      found[`cos${ending}`] = cos;
      found[`sin${ending}`] = sin;
    }
    if (this.#calls.slots !== null) {
      found.slots = { type: "int64", dims: [this.#calls.slots], data: BigInt64Array.from({ length: this.#calls.slots }, (_, i) => BigInt(i)) };
    }
    if (this.info.text.prefix) found.prefix = whole(prefix);
    return { ...found, position: whole(this.position), n_valid: whole(n) };
  }
}
