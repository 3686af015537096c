// The sampler of every runtime: the same seed and the same logits give the same token. runtimes/text/sampling.py in JavaScript.

import { SplitMix64 } from "./random.js";

export class Sampler {
  #random;

  constructor({ temperature = 0.8, top_k = 0, top_p = 1, seed = 0 } = {}) {
    Object.assign(this, { temperature, top_k, top_p });
    this.#random = new SplitMix64(seed);
  }

  // One random number per token, whatever the options. `unused`: ranges [first, end) that are never drawn.
  pick(logits, unused = []) {
    const draw = this.#random.uniform();
    for (const [first, end] of unused) logits.fill(-Infinity, first, end);
    let best = 0;
    for (let i = 0; i < logits.length; i++) {
      if (Number.isNaN(logits[i])) throw new Error("the model gave logits that are not numbers; its weights are damaged");
      if (logits[i] > logits[best]) best = i;
    }
    if (!Number.isFinite(logits[best])) throw new Error("the model gave logits that are not numbers; its weights are damaged");
    if (this.temperature === 0) return best;
    const weights = probabilities(logits, logits[best], this);
    let total = 0;
    const sums = weights.map((weight) => (total += weight));
    const until = draw * total;
    for (let i = 0; i < sums.length; i++) if (sums[i] > until || sums[i] === total) return i;
  }
}

function normalize(weights) {
  let total = 0;
  for (const weight of weights) total += weight;
  return weights.map((weight) => weight / total);
}

function probabilities(logits, top, { temperature, top_k: k, top_p: p }) {
  const scaled = Float64Array.from(logits, (logit) => (logit - top) / temperature);
  const order = k || p < 1 ? Array.from(scaled.keys()).sort((a, b) => scaled[b] - scaled[a] || a - b) : [];
  if (k) for (const i of order.slice(k)) scaled[i] = -Infinity;
  let weights = normalize(scaled.map(Math.exp));
  if (p < 1) {
    let through = 0;
    const left = [];
    order.forEach((i, rank) => {
      if (rank && through >= p) left.push(i);
      through += weights[i];
    });
    for (const i of left) weights[i] = 0;
    weights = normalize(weights);
  }
  return weights;
}
