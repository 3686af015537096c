// A model's chat template: a conversation to the text that the model was trained to continue. rmse_edge/chat.py in JavaScript.

const OWN = "chat_template.jinja", CONFIG = "tokenizer_config.json";

export class ChatTemplate {
  #template;
  #special; // what the template may name, such as bos_token

  // `jinja`: the module @huggingface/jinja. Null where the package has no template.
  static async open(pack, jinja) {
    const config = pack.has(CONFIG) ? await pack.json(CONFIG) : {};
    let source = pack.has(OWN) ? await pack.text(OWN) : config.chat_template;
    if (Array.isArray(source)) source = source.find((one) => one?.name === "default")?.template;
    if (source === undefined || source === null) return null;
    const found = new ChatTemplate();
    try {
      found.#template = new jinja.Template(source);
    } catch (error) {
      throw new Error(`the package: not a chat template (${error.message})`);
    }
    const named = Object.entries(config).filter(([name]) => name.endsWith("_token"));
    found.#special = Object.fromEntries(named.map(([name, value]) => [name, value?.content ?? value]).filter(([, value]) => typeof value === "string"));
    return found;
  }

  // The text of a conversation, [{role, content}].
  render(messages, add_generation_prompt = true) {
    try {
      return this.#template.render({ messages, tools: null, documents: null, add_generation_prompt, ...this.#special });
    } catch (error) {
      throw new Error(`the chat template refuses the conversation (${error.message})`);
    }
  }

  // What follows an answer in a conversation that goes on, to stop at; null where the template does not say.
  endOfTurn(tokenizer) {
    const question = { role: "user", content: "question" };
    let text;
    try {
      text = this.render([question, { role: "assistant", content: "answer" }, question]);
    } catch {
      return null;
    }
    const end = text.slice(text.lastIndexOf("answer") + "answer".length).split("question")[0];
    return tokenizer.leadingToken(end.trimStart()) ?? (end.trimEnd() || null);
  }
}
