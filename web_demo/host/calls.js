// The calls of a model: how a text is cut into them, what one is, and what is kept between them. runtimes/host/calls.py in JavaScript.

import { bytesOf, zeros } from "./engine.js";

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

// Copy rows [from, to) of each matrix of `source` to row `at` of that of `target`; rows are the last dimension but one.
function copyRows(target, at, source, from, to) {
  if (from >= to) return;
  const [have, given] = [target.dims.at(-2), source.dims.at(-2)];
  const [into, out] = [bytesOf(target), bytesOf(source)];
  const row = into.length / target.dims.slice(0, -1).reduce((a, b) => a * b, 1);
  const count = into.length / (row * have);
  for (let i = 0; i < count; i++) {
    into.set(out.subarray((i * given + from) * row, (i * given + to) * row), (i * have + at) * row);
  }
}

export class Calls {
  static async open(info, engine) {
    const calls = new Calls();
    Object.assign(calls, { info, engine, slots: info.slots(0), state: {}, memory: {}, blank: {}, segment: null });
    for (const [name, state] of Object.entries(info.state)) {
      (state.kind === "written" ? calls.memory : calls.state)[name] = zeros(state.dtype, info.shape(state, calls.slots));
    }
    if (Object.keys(calls.memory).length) {
      calls.blank = await engine.run("blank", info.segment, {});
      calls.segment = zeros("float32", [1, info.segment, info.width]);
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
      const old = this.state[name], made = zeros(state.dtype, this.info.shape(state, slots));
      copyRows(made, 0, old, 0, Math.min(old.dims.at(-2), made.dims.at(-2)));
      this.state[name] = made;
    }
    this.slots = slots;
  }

  reset() {
    this.grow(0);
    for (const array of Object.values(this.state)) bytesOf(array).fill(0);
    for (const [name, array] of Object.entries(this.memory)) bytesOf(array).set(bytesOf(this.blank[name]));
    if (this.segment) bytesOf(this.segment).fill(0);
  }

  // One call with `n` valid rows: what head gives where it is asked for, depth and iterations.
  async run(chunk, inputs, context, dials, position, n, head) {
    const kept = { ...this.state, ...this.memory };
    const found = { ...(await this.engine.run("prelude", chunk, { ...inputs, ...context, ...kept })) };
    const looped = await this.engine.run("loop", chunk, { ...found, ...context, ...kept, ...dials });
    Object.assign(found, looped);
    if (this.info.methods.includes("coda")) Object.assign(found, await this.engine.run("coda", chunk, { ...found, ...context, ...kept }));
    if (head) Object.assign(found, await this.engine.run("head", chunk, found));
    if (this.info.methods.includes("commit")) Object.assign(found, await this.engine.run("commit", chunk, { ...found, ...context, ...kept }));
    this.update(found, position, n);
    if (this.segment) copyRows(this.segment, position % this.info.segment, looped.h, 0, n);
    return found;
  }

  // Take what a call gave for its `n` tokens into the state, as each tensor's kind says.
  update(found, position, n) {
    this.grow(position + n);
    for (const [name, array] of Object.entries(this.state)) {
      const { kind, source } = this.info.state[name], given = found[source];
      if (kind === "replace") {
        bytesOf(array).set(bytesOf(given));
        continue;
      }
      const size = array.dims.at(-2), first = Math.max(0, n - size);
      const start = (position + first) % size, until = Math.min(size, start + n - first);
      const middle = first + until - start; // the rest of the call begins at slot 0 again
      copyRows(array, start, given, first, middle);
      copyRows(array, 0, given, middle, n);
    }
  }

  // Teach the memory the segment that was just completed.
  async memorize() {
    const count = { type: "int64", dims: [1], data: BigInt64Array.of(BigInt(this.info.segment)) };
    const found = await this.engine.run("memorize", this.info.segment, { segment: this.segment, n_valid: count, ...this.memory });
    for (const [name, array] of Object.entries(this.memory)) bytesOf(array).set(bytesOf(found[`next_${name}`]));
  }
}
