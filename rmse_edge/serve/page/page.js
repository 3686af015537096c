// The page, wherever the model runs. A `source` brings the model:
//
//   describe()            -> {name, max_loops, rules, dials, chat, sessions}; throws `KeyNeeded` where a key is asked for
//   write(asked, signal)  -> async iterator of {spans: [{text, depth}], depth: [loops of each token]}
//   turn(dials)           changes dials of the text that is being written
//   key                   what was typed as a key

export class KeyNeeded extends Error {}

// How far a slider goes, of dials that are no number of loops. Zero, or one, is where a rule is off.
const RANGES = {
  exit_threshold: [0.01, 1, 0.01, "a token stops when the gate is this sure; 1: never"],
  exit_epsilon: [0, 0.5, 0.005, "it stops when its state changes by less; 0: never"],
  exit_entropy: [0, 3, 0.05, "it stops when its prediction has less entropy (nats); 0: never"],
  exit_cosine: [0, 0.1, 0.001, "it stops when its state turns by less; 0: never"],
  exit_kl: [0, 0.5, 0.005, "it stops when its prediction changes by less (nats); 0: never"],
  exit_entropy_change: [0, 0.5, 0.005, "it stops when its entropy changes by less (nats); 0: never"],
  exit_steady: [0, 8, 1, "it stops when its likeliest token is the same for so many loops; 0: never"],
  exit_gap: [0, 10, 0.1, "a block is filled in whole when its tokens lead by more (logits); 0: never"],
  route: [-0.75, 0.5, 0.05, "layers that a prompt runs: -0.5 as its routers say, less: fewer; 0.5: all, once"],
};
const SHOWN = 240; // tokens in the chart

const BODY = `
<header><h1 id="name">…</h1><span id="about"></span></header>
<main>
  <div>
    <label for="prompt" id="asks">Text to continue</label>
    <textarea id="prompt" rows="2" spellcheck="false" aria-describedby="keys">ROMEO:</textarea>
    <div class="row">
      <button id="write" type="button">Write</button>
      <button id="stop" type="button" disabled>Stop</button>
      <label id="talk" hidden><input id="chat" type="checkbox"> talk (chat template)</label>
      <label id="onwards" hidden><input id="further" type="checkbox"> go on behind the text</label>
      <label><input id="numbers" type="checkbox"> loops as numbers</label>
      <small id="keys">Ctrl+Enter writes, Esc stops</small>
    </div>
    <div class="row" id="keyed" hidden>
      <label>API key <input id="key" type="password" autocomplete="off"></label>
      <button id="unlock" type="button">Use it</button>
    </div>
    <p id="problem" role="alert"></p>
    <canvas id="chart" role="img" aria-label="loops of the latest tokens"></canvas>
    <p id="figures" role="status"></p>
    <h2 id="legend-title">Loops of a token</h2>
    <ul id="legend" aria-labelledby="legend-title"></ul>
    <div id="text" tabindex="0" role="region" aria-label="what was written"></div>
  </div>
  <form id="dials" aria-label="settings"></form>
</main>`;

export async function start(source) {
  document.body.innerHTML = BODY;
  const at = (id) => document.getElementById(id);
  const form = at("dials"), text = at("text"), chart = at("chart");
  let model, writing = null, talk = [], depths = [], began = 0, lastDepth = 0;

  // ------------------------------------------------------------------------------------------------- settings

  function addNumber(name, label, value, least, most, step) {
    const made = document.createElement("label");
    made.className = "dial";
    const input = Object.assign(document.createElement("input"), { type: "number", id: name, min: least, max: most, step, value });
    made.append(label, input);
    form.append(made);
  }

  function addSlider(name, least, most, step, value, help) {
    const made = document.createElement("label"), head = document.createElement("span");
    const input = Object.assign(document.createElement("input"), { type: "range", id: name, min: least, max: most, step });
    const shown = Object.assign(document.createElement("output"), { value });
    const hint = Object.assign(document.createElement("small"), { textContent: help });
    input.value = value;
    input.dataset.dial = name;
    made.className = "dial";
    head.append(name.replaceAll("_", " "), shown);
    made.append(head, input, hint);
    input.addEventListener("input", () => {
      shown.value = input.value;
      const other = { max_loops: "min_loops", min_loops: "max_loops" }[name];
      const wrong = other && at("min_loops").valueAsNumber > at("max_loops").valueAsNumber;
      if (wrong) {
        at(other).value = input.value;
        at(other).parentElement.querySelector("output").value = input.value;
      }
      turned(wrong ? [name, other] : [name]);
    });
    form.append(made);
  }

  const dials = (names) => Object.fromEntries(names.map((name) => [name, at(name).valueAsNumber]));
  const allDials = () => dials([...form.querySelectorAll("[data-dial]")].map((input) => input.dataset.dial));

  // A slider moves faster than it can be told of: what it says last counts.
  let untold = new Set(), telling = false;
  async function turned(names) {
    for (const name of names) untold.add(name);
    if (telling || writing === null) return;
    telling = true;
    while (untold.size && writing !== null) {
      const next = dials([...untold]);
      untold = new Set();
      try {
        await source.turn(next);
      } catch (error) {
        if (writing !== null) problem(error);
      }
    }
    telling = false;
  }

  // ------------------------------------------------------------------------------------------------- what is shown

  const problem = (error) => { at("problem").textContent = error ? String(error.message ?? error) : ""; };
  const share = (depth) => (depth - 1) / Math.max(1, model.max_loops - 1);

  function add(span) {
    const made = Object.assign(document.createElement("span"), { className: "token", textContent: span.text });
    made.style.setProperty("--share", share(span.depth));
    made.title = span.depth === 1 ? "1 loop" : `${span.depth} loops`;
    if (span.depth !== lastDepth) made.dataset.run = span.depth; // the number stands before each run of one depth
    lastDepth = span.depth;
    const below = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
    text.append(made);
    if (below) text.scrollTop = text.scrollHeight;
  }

  function say(words) {
    text.append(Object.assign(document.createElement("span"), { className: "said", textContent: words }));
    lastDepth = 0;
  }

  let drawn = false;
  function refresh() {
    if (drawn) return;
    drawn = true;
    requestAnimationFrame(() => {
      drawn = false;
      draw();
      figures();
    });
  }

  function figures() {
    const count = depths.length;
    if (!count) return;
    const mean = depths.reduce((sum, depth) => sum + depth, 0) / count;
    const seconds = (performance.now() - began) / 1000;
    at("figures").textContent = `${count} tokens, ${mean.toFixed(2)} of ${model.max_loops} loops on average, ` +
      `${Math.round(100 * (1 - mean / model.max_loops))} % of the loops saved, ${(count / seconds).toFixed(1)} tokens/s`;
    chart.setAttribute("aria-label", `loops of the latest ${Math.min(count, SHOWN)} tokens, ${mean.toFixed(2)} on average`);
  }

  function draw() {
    const scale = devicePixelRatio, width = chart.clientWidth * scale, height = chart.clientHeight * scale;
    Object.assign(chart, { width, height });
    const paper = chart.getContext("2d"), style = getComputedStyle(document.documentElement);
    const shown = depths.slice(-SHOWN), step = width / SHOWN, left = 28 * scale, unit = (height - 8 * scale) / model.max_loops;
    paper.font = `${11 * scale}px system-ui`;
    paper.fillStyle = getComputedStyle(document.body).color;
    paper.textBaseline = "middle";
    for (const loops of new Set([1, Math.ceil(model.max_loops / 2), model.max_loops])) {
      const y = height - loops * unit;
      paper.globalAlpha = 0.25;
      paper.fillRect(left, y, width, scale);
      paper.globalAlpha = 1;
      paper.fillText(loops, 4 * scale, Math.min(y, height - 7 * scale));
    }
    paper.fillStyle = style.getPropertyValue("--bar");
    shown.forEach((depth, i) => {
      paper.fillRect(left + (i * (width - left)) / SHOWN, height - depth * unit, Math.max(1, step * 0.8), depth * unit);
    });
  }

  // ------------------------------------------------------------------------------------------------- writing

  async function write() {
    if (writing !== null || !model) return;
    const prompt = at("prompt").value, chat = at("chat").checked;
    const asked = { ...allDials(), temperature: at("temperature").valueAsNumber, max_tokens: at("max_tokens").valueAsNumber };
    if (at("seed").value !== "") asked.seed = at("seed").valueAsNumber;
    problem();
    untold = new Set();
    depths = [];
    began = performance.now();
    if (chat) {
      talk.push({ role: "user", content: prompt });
      say(`${text.childNodes.length ? "\n\n" : ""}${prompt}\n\n`);
      asked.messages = talk;
    } else {
      asked.further = model.sessions && at("further").checked || undefined;
      if (!asked.further) text.replaceChildren();
      say(prompt);
      asked.prompt = prompt;
    }
    writing = new AbortController();
    at("write").disabled = true;
    at("stop").disabled = false;
    let answer = "";
    try {
      for await (const piece of source.write(asked, writing.signal)) {
        for (const span of piece.spans) {
          add(span);
          answer += span.text;
        }
        depths.push(...piece.depth);
        refresh();
      }
    } catch (error) {
      if (error instanceof KeyNeeded) at("keyed").hidden = false;
      if (error.name !== "AbortError") problem(error);
    }
    if (chat) talk = answer ? [...talk, { role: "assistant", content: answer }] : talk.slice(0, -1);
    writing = null;
    at("write").disabled = false;
    at("stop").disabled = true;
    document.body.dataset.written = Number(document.body.dataset.written ?? 0) + 1;
    draw();
    figures();
  }

  const stop = () => writing?.abort();
  at("write").addEventListener("click", write);
  at("stop").addEventListener("click", stop);
  function setTalk(on) {
    at("chat").checked = on;
    at("asks").textContent = on ? "Say something" : "Text to continue";
    at("onwards").hidden = on || !model?.sessions;
    talk = [];
    text.replaceChildren();
  }
  at("chat").addEventListener("change", () => setTalk(at("chat").checked));

  // Show what a session brings: the messages of a conversation, or the last characters of a text that goes on.
  function resume({ messages, text: last }) {
    setTalk(messages !== null);
    at("further").checked = messages === null;
    if (messages === null) return say(`… ${last}`);
    talk = messages;
    say(messages.map((message) => message.content).join("\n\n"));
  }
  at("numbers").addEventListener("change", () => text.classList.toggle("numbers", at("numbers").checked));
  form.addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      write();
    } else if (event.key === "Escape") stop();
  });
  addEventListener("resize", () => model && draw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => model && draw());

  async function open() {
    try {
      model = await source.describe();
    } catch (error) {
      if (error instanceof KeyNeeded) at("keyed").hidden = false;
      return problem(error);
    }
    at("keyed").hidden = true;
    problem();
    at("name").textContent = model.name;
    document.title = `${model.name} · rmse-edge`;
    at("about").textContent = model.about ?? `${(model.parameters / 1e6).toFixed(1)} M parameters, ${model.quant}, ${model.runtime}`;
    at("talk").hidden = !model.chat;
    setTalk(at("chat").checked && model.chat);
    form.replaceChildren(Object.assign(document.createElement("h2"), { textContent: "Dials, which act at once" }));
    addSlider("max_loops", 1, model.max_loops, 1, model.dials.max_loops, "loops of a token at most");
    addSlider("min_loops", 1, model.max_loops, 1, model.dials.min_loops, "loops before it may stop");
    for (const [name, [least, most, step, help]] of Object.entries(RANGES)) {
      if (model.rules.includes(name)) addSlider(name, least, most, step, model.dials[name], help);
    }
    form.append(Object.assign(document.createElement("h2"), { textContent: "The next text" }));
    addNumber("temperature", "temperature (0: the likeliest token)", 0.8, 0, 5, 0.1);
    addNumber("max_tokens", "tokens at most", 240, 1, model.max_tokens, 1);
    addNumber("seed", "seed (empty: another each time)", "", 0, Number.MAX_SAFE_INTEGER, 1);
    at("legend").replaceChildren(...Array.from({ length: model.max_loops }, (_, i) => {
      const item = document.createElement("li");
      const sample = Object.assign(document.createElement("span"), { className: "sample", textContent: i + 1 });
      sample.style.setProperty("--share", share(i + 1));
      item.append(sample);
      return item;
    }));
    draw();
    document.body.dataset.ready = "";
  }
  at("unlock").addEventListener("click", () => {
    source.key = at("key").value;
    open();
  });
  await open();
  return { open, problem, resume, writing: () => writing !== null }; // for a source that loads other models, and sessions
}
