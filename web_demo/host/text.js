// From tokens to text as early as it is certain: runtimes/text/generate.py in JavaScript, without stop texts.

const BROKEN = "\ufffd"; // stands for bytes that are no character, or not yet
const PATIENCE = 64; // tokens without one whole character after which there is none

export class TextStream {
  #decode;
  #ids = [];
  #shown = 0; // of `ids`, those that became text
  #depth = 0;

  constructor(decode, prompt) {
    this.#decode = decode;
    let first = prompt.length - 1;
    while (first > 0 && !this.#isWhole(prompt[first])) first--;
    for (const token of prompt.slice(Math.max(0, first))) {
      this.#ids.push(token);
      if (!this.#isOpen(this.#fresh())) this.#advance();
    }
  }

  // What can be shown now: {text, depth}, or nothing.
  push(token, depth) {
    this.#ids.push(token);
    this.#depth = Math.max(this.#depth, depth);
    const text = this.#fresh();
    return this.#isOpen(text) ? [] : this.#release(text);
  }

  finish() {
    const text = this.#fresh();
    return text ? this.#release(text) : [];
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

  #release(text) {
    this.#advance();
    const span = { text, depth: this.#depth };
    this.#depth = 0;
    return [span];
  }
}
