// A tokenizer.json as the hosts use it: rmse_edge/text.py in JavaScript, on @huggingface/tokenizers.

const parts = (component, members) => (component ? (component[members] ?? [component]) : []);

export class Tokenizer {
  #fast;
  #inner = null; // for text in the middle of another; null: the same one
  #added;
  #ids;

  // `tokenizers`: the module; `spec`: the JSON.
  constructor(tokenizers, spec) {
    this.#fast = new tokenizers.Tokenizer(spec, {});
    const added = (spec.added_tokens ?? []).map((token) => token.content).sort((a, b) => b.length - a.length);
    this.#ids = new Map((spec.added_tokens ?? []).map((token) => [token.content, token.id]));
    this.#added = added.length ? new RegExp(added.map((name) => name.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&")).join("|")) : null;
    const changed = structuredClone(spec);
    for (const part of parts(changed.pre_tokenizer, "pretokenizers")) {
      if (part.type === "Metaspace") part.prepend_scheme = "never";
      else if (part.type === "ByteLevel") part.add_prefix_space = false;
    }
    const all = parts(changed.normalizer, "normalizers"), kept = all.filter((part) => part.type !== "Prepend");
    if (kept.length < all.length) changed.normalizer = { type: "Sequence", normalizers: kept };
    if (JSON.stringify(changed) !== JSON.stringify(spec)) this.#inner = new tokenizers.Tokenizer(changed, {});
  }

  // Token ids of a text. `special`: with the tokens that the tokenizer puts around one, unless the text begins with such a one.
  encode(text, special = true) {
    const ids = this.#encode(this.#fast, text, special);
    if (!special || ids.length < 2 || ids[0] !== ids[1]) return ids;
    const named = this.leadingToken(text);
    if (named === null || this.#ids.get(named) !== ids[0]) return ids;
    return this.#fast.encode("").ids[0] === ids[0] ? ids.slice(1) : ids; // otherwise the text itself has it twice
  }

  // Of text that goes on from an earlier one: without what belongs to a text's beginning.
  encodeMore(text) {
    if (!this.#inner) return this.#encode(this.#fast, text, false);
    // After a token of the tokenizer's own (</s>) a piece of text begins as everywhere else.
    const cut = this.#added?.exec(text)?.index ?? text.length;
    const rest = cut < text.length ? this.#encode(this.#fast, text.slice(cut), false) : [];
    return [...(cut ? this.#encode(this.#inner, text.slice(0, cut), false) : []), ...rest];
  }

  decode = (ids) => this.#fast.decode(ids, { skip_special_tokens: false });

  // The token of the tokenizer's own that a text begins with, or null.
  leadingToken(text) {
    const found = this.#added?.exec(text);
    return found?.index === 0 ? found[0] : null;
  }

  #encode(fast, text, special) {
    const ids = Array.from(fast.encode(text, { add_special_tokens: special }).ids);
    if (!ids.some((id) => id === undefined)) return ids;
    const unknown = [...text].find((character) => Array.from(fast.encode(character).ids).includes(undefined));
    throw new Error(`the tokenizer has no token for ${JSON.stringify(unknown)}`);
  }
}
