// SplitMix64, and noise made of it: the numbers of rmse_edge/loop/generator.py.

const MASK = (1n << 64n) - 1n, STEP = 0x9e3779b97f4a7c15n;

function mixed(z) {
  z = ((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n) & MASK;
  z = ((z ^ (z >> 27n)) * 0x94d049bb133111ebn) & MASK;
  return z ^ (z >> 31n);
}

const number = (seed, n) => mixed((seed + (n + 1n) * STEP) & MASK);

export class SplitMix64 {
  #state;

  constructor(seed) {
    this.#state = BigInt(seed) & MASK;
  }

  next() {
    this.#state = (this.#state + STEP) & MASK;
    return mixed(this.#state);
  }

  // From [0, 1).
  uniform() {
    return Number(this.next() >> 11n) * 2 ** -53;
  }
}

// `count` nearly normal numbers of a position: sums of twelve uniform ones of 16 bits.
export function noise(seed, position, count) {
  const own = number(number(BigInt(seed), 0n), BigInt(position)), found = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    let sum = 0;
    for (let k = 1n; k <= 3n; k++) {
      const word = mixed((own + (3n * BigInt(i) + k) * STEP) & MASK);
      for (let shift = 0n; shift < 64n; shift += 16n) sum += Number((word >> shift) & 0xffffn);
    }
    found[i] = (sum - 6 * 65535) / 65536;
  }
  return found;
}

// Rows for positions [first, first + rows), (1, rows, width), of every input that is filled with noise.
export function starts(deviations, seed, first, rows, width) {
  const found = {};
  Object.keys(deviations).sort().forEach((name, i) => {
    const own = i ? number(BigInt(seed), BigInt(i)) : BigInt(seed), deviation = Math.fround(deviations[name]);
    const data = new Float32Array(rows * width);
    for (let row = 0; row < rows; row++) data.set(noise(own, first + row, width).map((value) => value * deviation), row * width);
    found[name] = { type: "float32", dims: [1, rows, width], data };
  });
  return found;
}
