// Holds the browser's random numbers, sampler and plan of calls against what stands in the JSON of stdin; prints what differs.

import { readFileSync } from "node:fs";
import { planCalls } from "../../web_demo/host/calls.js";
import { noise, SplitMix64 } from "../../web_demo/host/random.js";
import { Sampler } from "../../web_demo/host/sampler.js";

const { golden, plans } = JSON.parse(readFileSync(0)), wrong = [];
const hold = (what, got, expected) => JSON.stringify(got) === JSON.stringify(expected) || wrong.push([what, got, expected]);

for (const { seed, words } of golden.words) {
  const stream = new SplitMix64(seed);
  hold(`words of ${seed}`, words.map(() => stream.next().toString(16).padStart(16, "0")), words);
}
for (const { seed, numbers } of golden.uniform) {
  const stream = new SplitMix64(seed);
  hold(`numbers of ${seed}`, numbers.map(() => stream.uniform()), numbers);
}
for (const { seed, position, numbers } of golden.noise) {
  hold(`noise of ${seed} at ${position}`, Array.from(noise(seed, position, numbers.length)), numbers);
}
for (const { name, logits, options, unused, tokens } of golden.tokens) {
  const made = logits.list ?? noise(...logits.noise).map((value) => value * logits.times);
  const sampler = new Sampler(options);
  hold(name, tokens.map(() => sampler.pick(Float32Array.from(made), unused)), tokens);
}
for (const { asked, calls } of plans) hold(`calls of ${asked}`, planCalls(...asked), calls);
console.log(JSON.stringify({ wrong, held: golden.tokens.length + plans.length }));
