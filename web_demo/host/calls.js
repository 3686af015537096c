// The calls of a model: how a text is cut into them, what one is, and what is kept between them. runtimes/host/calls.py in JavaScript.

import { MAKE, sizeOf, zeros } from "./place.js";

const SINGLE_CALLS = 6; // up to this many rows, single calls beat a padded large one

// [rows of the call, tokens in it] for `count` tokens from `position` on; none crosses a multiple of `segment`.
export function planCalls(position, count, chunks, segment, prefix = 0) {
  const calls = [], largest = chunks.at(-1);
  while (count > 0) {
    const n = segment === null ? Math.min(count, largest) : Math.min(count, largest, segment - (position % segment));
    if (n <= SINGLE_CALLS && chunks[0] === 1 && (calls.length || prefix < 2)) {
      for (let i = 0; i < n; i++) calls.push([1, 1]);
    } else calls.push([chunks.find((chunk) => chunk >= n), n]);
    position += n;
    count -= n;
  }
  return calls;
}

export class Calls {
  #stacks = {}; // what the iterations of a loop give, one row each

  static async open(info, engine) {
    const calls = new Calls();
    const { place } = engine;
    Object.assign(calls, { info, engine, place, slots: info.slots(0), state: {}, memory: {}, blank: {}, segment: null });
    for (const [name, state] of Object.entries(info.state)) {
      (state.kind === "written" ? calls.memory : calls.state)[name] = place.zeros(state.dtype, info.shape(state, calls.slots));
    }
    if (Object.keys(calls.memory).length) {
      for (const [name, array] of Object.entries(await engine.run("blank", info.segment, {}))) {
        calls.blank[name] = place.zeros(array.type, array.dims);
        place.copy(calls.blank[name], 0, array, 0, sizeOf(array));
      }
      engine.release();
      calls.segment = place.zeros("float32", [1, info.segment, info.width]);
    }
    calls.reset();
    return calls;
  }

  // Give the appended state the slots that a text of so many positions has.
  grow(positions) {
    const slots = this.info.slots(positions);
    if (this.slots === null || slots === this.slots) return;
    for (const [name, state] of Object.entries(this.info.state)) {
      if (state.kind !== "append") continue;
      const old = this.state[name], made = this.place.zeros(state.dtype, this.info.shape(state, slots));
      this.#copyRows(made, 0, old, 0, Math.min(old.dims.at(-2), made.dims.at(-2)));
      this.state[name] = made;
    }
    this.slots = slots;
  }

  reset() {
    this.grow(0);
    for (const array of Object.values(this.state)) this.place.clear(array);
    for (const [name, array] of Object.entries(this.memory)) this.#set(array, this.blank[name]);
    if (this.segment) this.place.clear(this.segment);
  }

  #kept() {
    return Object.entries({ ...this.state, ...this.memory, ...(this.segment ? { segment: this.segment } : {}) });
  }

  #filled(name, dims, position) {
    return this.info.state[name]?.kind === "append" ? [...dims.slice(0, -2), position, dims.at(-1)] : dims;
  }

  // [name, {type, dims}] of what is kept at a position.
  forms(position) {
    return this.#kept().map(([name, { type, dims }]) => [name, { type, dims: this.#filled(name, dims, position) }]);
  }

  // A copy of it in this memory.
  async tensors(position) {
    const found = {};
    for (const [name, array] of this.#kept()) {
      const dims = this.#filled(name, array.dims, position), whole = await this.place.read(array);
      found[name] = dims === array.dims ? whole : zeros(array.type, dims);
      if (dims !== array.dims) this.#copyRows(found[name], 0, whole, 0, position);
    }
    return found;
  }

  restore(position, tensors) {
    this.reset();
    this.grow(position);
    for (const [name, array] of this.#kept()) {
      if (this.#filled(name, array.dims, position) === array.dims) this.#set(array, tensors[name]);
      else this.#copyRows(array, 0, tensors[name], 0, position);
    }
  }

  #set(array, given) {
    this.place.copy(array, 0, given, 0, sizeOf(array));
  }

  // Copy rows [from, to) of each matrix of `source` to row `at` of that of `target`; rows are the last dimension but one.
  #copyRows(target, at, source, from, to) {
    if (from >= to) return;
    const [have, given] = [target.dims.at(-2), source.dims.at(-2)], row = target.dims.at(-1) * MAKE[target.type].BYTES_PER_ELEMENT;
    const count = sizeOf(target) / (row * have);
    for (let i = 0; i < count; i++) {
      this.place.copy(target, (i * have + at) * row, source, (i * given + from) * row, (to - from) * row);
    }
  }

  // One call with `n` valid rows: what head gives where it is asked for, depth and iterations.
  async run(chunk, inputs, context, dials, position, n, head) {
    const kept = { ...this.state, ...this.memory };
    const found = { ...(await this.engine.run("prelude", chunk, { ...inputs, ...context, ...kept })) };
    const looped = await this.#loop(chunk, { ...found, ...context, ...kept, ...dials });
    Object.assign(found, looped);
    if (this.info.methods.includes("coda")) Object.assign(found, await this.engine.run("coda", chunk, { ...found, ...context, ...kept }));
    if (head) Object.assign(found, await this.engine.run("head", chunk, found));
    if (this.info.methods.includes("commit")) Object.assign(found, await this.engine.run("commit", chunk, { ...found, ...context, ...kept }));
    this.update(found, position, n);
    if (this.segment) this.#copyRows(this.segment, position % this.info.segment, looped.h, 0, n);
    this.engine.release();
    return found;
  }

  // The loop: the graph's own, or the host's around `step`, which ends with the iteration that leaves no token active.
  async #loop(chunk, given) {
    if (!this.info.hostLoop) return this.engine.run("loop", chunk, given);
    const most = Number(given.max_loops.data[0]), carry = {}, stacks = (this.#stacks[chunk] ??= {});
    for (const [name, array] of Object.entries(await this.engine.run("begin", chunk, given))) {
      if (name.startsWith("first_")) carry[name.slice("first_".length)] = array;
    }
    carry.depth = zeros("int64", carry.active.dims);
    const taken = this.engine.takes("step", chunk), rows = taken.filter((name) => this.info.state[name]?.per_loop);
    let k = 0, running = carry.active.data.some(Boolean);
    for (; running && k < most; k++) {
      const own = Object.fromEntries(rows.map((name) => [name, this.place.row(given[name], k)]));
      const index = { type: "int64", dims: [], data: BigInt64Array.of(BigInt(k)) };
      for (const [name, array] of Object.entries(await this.engine.run("step", chunk, { ...given, ...own, ...carry, k: index }))) {
        if (name.startsWith("next_")) carry[name.slice("next_".length)] = array;
        else if (name === "any_active") running = Boolean(array.data[0]);
        else {
          stacks[name] ??= this.place.zeros(array.type, [this.info.max_loops, ...array.dims]);
          this.place.copy(stacks[name], k * sizeOf(array), array, 0, sizeOf(array));
        }
      }
    }
    return { h: carry.h, depth: carry.depth, iterations: { type: "int64", dims: [], data: BigInt64Array.of(BigInt(k)) }, ...stacks };
  }

  // Take what a call gave for its `n` tokens into the state, as each tensor's kind says.
  update(found, position, n) {
    this.grow(position + n);
    for (const [name, array] of Object.entries(this.state)) {
      const { kind, source } = this.info.state[name], given = found[source];
      if (kind === "replace") {
        this.#set(array, given);
        continue;
      }
      const size = array.dims.at(-2), first = Math.max(0, n - size);
      const start = (position + first) % size, until = Math.min(size, start + n - first);
      const middle = first + until - start; // the rest of the call begins at slot 0 again
      this.#copyRows(array, start, given, first, middle);
      this.#copyRows(array, 0, given, middle, n);
    }
  }

  // Teach the memory the segment that was just completed.
  async memorize() {
    const count = { type: "int64", dims: [1], data: BigInt64Array.of(BigInt(this.info.segment)) };
    const found = await this.engine.run("memorize", this.info.segment, { segment: this.segment, n_valid: count, ...this.memory });
    for (const [name, array] of Object.entries(this.memory)) this.#set(array, found[`next_${name}`]);
    this.engine.release();
  }
}
