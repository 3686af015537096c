// From tokens to text as early as it is certain: TextStream of runtimes/text/generate.py in JavaScript.

const BROKEN = "\ufffd"; // stands for bytes that are no character, or not yet
const PATIENCE = 64; // tokens without one whole character after which there is none

export const BEGINNING = { context: [], open: [] }; // a tail: the tokens that became text last, and those that begin a character

export class TextStream {
  stopped = false; // at a stop text, of which nothing is given out
  #decode;
  #stop;
  #ids;
  #shown; // of `ids`, those that became text
  #depth = 0;
  #held = []; // spans that may yet belong to a stop text

  // `tail`: of the stream that this one goes on from.
  constructor(decode, stop = [], tail = BEGINNING) {
    this.#decode = decode;
    this.#stop = stop;
    this.#ids = [...tail.context, ...tail.open];
    this.#shown = tail.context.length;
  }

  get tail() {
    return { context: this.#ids.slice(0, this.#shown), open: this.#ids.slice(this.#shown) };
  }

  // Take tokens whose text is not wanted, such as a prompt's.
  skip(tokens) {
    let first = tokens.length - 1;
    while (first > 0 && !this.#isWhole(tokens[first])) first--;
    if (tokens.length && this.#isWhole(tokens[first])) [this.#ids, this.#shown] = [[], 0];
    for (const token of tokens.slice(Math.max(0, first))) {
      this.#ids.push(token);
      if (!this.#isOpen(this.#fresh())) this.#advance();
    }
  }

  // Take a token; gives what can be shown now, as [{text, depth}].
  push(token, depth) {
    this.#ids.push(token);
    this.#depth = Math.max(this.#depth, depth);
    const text = this.#fresh();
    return this.#isOpen(text) ? [] : this.#release(text);
  }

  // What was held back. `whole`: the text ends here; otherwise what was begun is left to the stream that goes on from `tail`.
  finish(whole = true) {
    const text = whole && !this.stopped ? this.#fresh() : "";
    const spans = text ? this.#release(text) : [];
    return this.stopped ? spans : [...spans, ...this.#held.splice(0)];
  }

  #isWhole(token) {
    const text = this.#decode([token]);
    return text && !text.includes(BROKEN);
  }

  #isOpen(text) {
    return (!text || text.endsWith(BROKEN)) && this.#ids.length - this.#shown < PATIENCE;
  }

  #fresh() {
    const known = this.#shown ? this.#decode(this.#ids.slice(0, this.#shown)) : "";
    const text = this.#ids.length ? this.#decode(this.#ids) : "";
    if (text.startsWith(known)) return text.slice(known.length);
    return this.#decode(this.#ids.slice(this.#shown));
  }

  #advance() {
    this.#ids = this.#ids.slice(this.#shown);
    this.#shown = this.#ids.length;
  }

  // Move `text` into what is held, and out of it what no stop text can claim any more.
  #release(text) {
    this.#advance();
    this.#held.push({ text, depth: this.#depth });
    this.#depth = 0;
    const held = this.#held.map((span) => span.text).join("");
    const found = this.#stop.map((stop) => held.indexOf(stop)).filter((at) => at >= 0);
    if (found.length) {
      this.stopped = true;
      return this.#take(Math.min(...found));
    }
    let longest = 0;
    for (const stop of this.#stop) {
      for (let n = 1; n < stop.length; n++) if (held.endsWith(stop.slice(0, n))) longest = Math.max(longest, n);
    }
    return this.#take(held.length - longest);
  }

  #take(count) {
    const taken = [];
    while (count > 0) {
      const { text, depth } = this.#held.shift();
      if (text.length > count) this.#held.unshift({ text: text.slice(count), depth });
      taken.push({ text: text.slice(0, count), depth });
      count -= text.length;
    }
    return taken;
  }
}
