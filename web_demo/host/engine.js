// A package's methods on onnxruntime-web. Arrays are {type, dims, data}, as its tensors have them.

export const MAKE = {
  float32: Float32Array, float16: Uint16Array, int64: BigInt64Array, int32: Int32Array, int8: Int8Array, uint8: Uint8Array, bool: Uint8Array,
};

export const zeros = (type, dims) => ({ type, dims, data: new MAKE[type](dims.reduce((a, b) => a * b, 1)) });

// The bytes of an array, without a copy.
export const bytesOf = ({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);

export class Engine {
  #ort;
  #files = new Map(); // file -> session
  #graphs;

  constructor(ort, graphs) {
    this.#ort = ort;
    this.#graphs = graphs;
  }

  // All graphs that the methods of the package's own loop are in. `ort`: the module.
  static async open(pack, ort, methods, chunks) {
    const { graphs, weights } = pack.manifest.lowering;
    const engine = new Engine(ort, graphs);
    const data = await pack.read(weights);
    for (const file of new Set(methods.flatMap((method) => chunks.map((chunk) => graphs[`${method}_${chunk}`])))) {
      if (file === undefined) continue;
      const options = { executionProviders: ["wasm"], externalData: [{ path: weights, data }], logSeverityLevel: 3 };
      try {
        engine.#files.set(file, await ort.InferenceSession.create(await pack.read(file), options));
      } catch (error) {
        const reason = error.message ?? String(error);
        const fix = reason.includes("accuracy_level") ? "; export with --accuracy-level 0" : "";
        throw new Error(`${file}: onnxruntime-web cannot load it (${reason})${fix}`);
      }
    }
    return engine;
  }

  async run(method, chunk, feeds) {
    const session = this.#files.get(this.#graphs[`${method}_${chunk}`]);
    if (!session) throw new Error(`the package: holds no ${method} for ${chunk} rows`);
    const given = {};
    for (const name of session.inputNames) {
      const array = feeds[name];
      if (!array) throw new Error(`${method}: nobody gives ${name}`);
      given[name] = array instanceof this.#ort.Tensor ? array : new this.#ort.Tensor(array.type, array.data, array.dims);
    }
    return session.run(given);
  }

  async close() {
    for (const session of this.#files.values()) await session.release();
    this.#files.clear();
  }
}
