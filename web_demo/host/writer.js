// A model, its tokenizer and its chat template: texts and conversations go on, with the depths of their tokens. What
// runtimes/text/writer.py, generate.py and conversation.py are in Python.

import { ChatTemplate } from "./chat.js";
import { Runtime } from "./runtime.js";
import { Sampler } from "./sampler.js";
import { BEGINNING, TextStream } from "./text.js";
import { Tokenizer } from "./tokenizer.js";

// Where a text stands that the runtime has read: `pending`, its last tokens, which were not fed yet; its tail; of a conversation
// the `messages`, and the texts that were read, with the tokens of each that were not fed ([[text, tokens], ...]); `by`, the
// dials and the seed that made the state, null where that is not known.
export class Standing {
  constructor({ pending = [], tail = BEGINNING, messages = null, read = [], by = null } = {}) {
    Object.assign(this, { pending, tail, messages, read, by });
  }
}

export class Writer {
  standing = null; // null: there is nothing to go on from

  constructor(runtime, tokenizer, template) {
    Object.assign(this, { runtime, tokenizer, template });
    this.end = template?.endOfTurn(tokenizer) ?? null; // an answer ends at what the template puts after one
  }

  // `parts`: the modules {ort, tokenizers, jinja}; `options`: of `Runtime.open`.
  static async open(pack, { ort, tokenizers, jinja }, options = {}) {
    if (!pack.manifest.text?.tokenizer) throw new Error("the package has no tokenizer.json, so nothing can be typed");
    const tokenizer = new Tokenizer(tokenizers, await pack.json(pack.manifest.text.tokenizer));
    const template = await ChatTemplate.open(pack, jinja);
    return new Writer(await Runtime.open(pack, ort, options), tokenizer, template);
  }

  // Pieces {spans, tokens, depth} of what follows. `asked`: `prompt`, with `further` behind the text that stands, or `messages`,
  // the last of them the user's; `dials`, which may be changed on the way, as may `stopped`; `max_tokens`, and what `Sampler` takes.
  async *write(asked) {
    const { runtime } = this, { info } = runtime, by = this.#by(asked);
    const said = asked.messages ? this.template.render(asked.messages) : null;
    const { prompt, told, tail } = said === null ? this.#ofText(asked) : this.#ofTurn(said, by);
    this.standing = null; // until something is there
    if (told === null) runtime.reset();
    runtime.noiseSeed = asked.seed ?? 0;
    const stop = said !== null && this.end ? [this.end] : [], stream = this.#stream(prompt, told, tail, stop);
    const sampler = new Sampler(asked), base = runtime.position, made = [];
    let fed = prompt, answer = "", whole = false;
    const piece = (spans, tokens = [], depth = []) => {
      answer += spans.map((span) => span.text).join("");
      return { spans, tokens, depth };
    };
    try {
      while (made.length < asked.max_tokens && !stream.stopped && !(made.length && asked.stopped)) {
        if (made.length && info.longest !== null && runtime.position >= info.longest) break;
        whole = false;
        const { logits, depth } = await runtime.feed(fed, asked.dials);
        whole = true;
        const token = sampler.pick(logits.at(-1), info.text.unused_token_ids), ended = info.text.eos_token_ids.includes(token);
        made.push(token);
        fed = [token];
        yield piece(ended ? [] : stream.push(token, depth.at(-1)), fed, depth.slice(-1));
        if (ended) break;
      }
    } finally {
      const open = stream.tail, rest = piece(stream.finish());
      const unfed = [...prompt, ...made].slice(runtime.position - base), before = made.length - unfed.length;
      if (whole) {
        this.standing = new Standing({ pending: unfed, tail: said === null ? open : stream.tail, by: by === this.#by(asked) ? by : "" });
      }
      if (whole && said !== null) {
        const text = (tokens) => said + this.#textOf(tokens, prompt, told, tail);
        this.standing.messages = [...asked.messages, { role: "assistant", content: answer }];
        this.standing.read = before >= 0 ? [[text(made), unfed], [text(made.slice(0, before)), []]] : [];
      }
      yield rest;
    }
  }

  #by({ dials, seed = 0 }) {
    return JSON.stringify([dials, Object.keys(this.runtime.info.noise).length ? seed : 0]);
  }

  #ofText({ prompt, further }) {
    if (!further) return { prompt: this.#begun(prompt), told: null, tail: BEGINNING };
    if (!this.standing) throw new Error("there is no text to go on with; write one, or open a session");
    const { pending, tail } = this.standing, tokens = [...pending, ...this.tokenizer.encodeMore(prompt)];
    if (tokens.length) return { prompt: tokens, told: pending.length, tail };
    throw new Error("nothing is left to read of the text; give at least one character");
  }

  // What a conversation has gained since the runtime read it. A template may rewrite what was said: then all is read anew, as
  // where other dials made the state.
  #ofTurn(said, by) {
    const anew = { prompt: this.tokenizer.encode(said, false), told: null, tail: BEGINNING };
    if (!this.standing || this.runtime.info.text.prefix || ![null, by].includes(this.standing.by)) return anew;
    const found = this.standing.read.find(([text]) => said.startsWith(text));
    if (!found) return anew;
    const [text, pending] = found, more = this.tokenizer.encodeMore(said.slice(text.length));
    return { prompt: [...pending, ...more], told: pending.length, tail: this.standing.tail };
  }

  #begun(prompt) {
    const ids = this.tokenizer.encode(prompt);
    if (ids.length) return ids;
    const begin = this.runtime.info.config.bos_token_id;
    if (begin === null || begin === undefined) throw new Error("the prompt is empty and the model has no begin-of-text token; give at least one character");
    return [begin];
  }

  #stream(prompt, told, tail, stop = []) {
    const stream = new TextStream(this.tokenizer.decode, stop, tail);
    stream.skip(prompt.slice(told ?? 0));
    return stream;
  }

  // The text of generated tokens, a stop text and the end token included.
  #textOf(tokens, prompt, told, tail) {
    const stream = this.#stream(prompt, told, tail);
    return [...tokens.flatMap((token) => stream.push(token, 1)), ...stream.finish()].map((span) => span.text).join("");
  }
}
