// A package's methods on onnxruntime-web, in WebAssembly or on the GPU.

import { Gpu, Memory } from "./place.js";
import { operators } from "./operators.js";

// What onnxruntime-web 1.30.0 does not compute on the GPU though it is most of a model's work: experts in floats, and a loop over
// experts. Experts in integers are there, but for no more than a workgroup of the GPU holds. Gathered experts need none of these.
const NOT_ON_GPU = ["com.microsoft.MoE", "Loop"], FUSED = "com.microsoft.QMoE";
const AVOIDED = "export with --experts gathered";
const READ_HERE = ["logits"]; // floats that are looked at, not only passed on

// The engine does not compute all of a package on the GPU; it does in WebAssembly.
export class NotOnGpu extends Error {}

// Throws `NotOnGpu` where there is no GPU to be had.
export async function findGpu() {
  if (!globalThis.navigator?.gpu) throw new NotOnGpu("this browser has no WebGPU");
  if (!(await navigator.gpu.requestAdapter())) throw new NotOnGpu("the browser's WebGPU finds no GPU here");
}

export class Engine {
  #ort;
  #files = new Map(); // file -> session
  #graphs;
  #fused = false; // whether experts are one operator
  #given = []; // tensors of the GPU that `release` takes back

  constructor(ort, graphs) {
    this.#ort = ort;
    this.#graphs = graphs;
  }

  // All graphs that the methods are in, each with its weights once. `ort`: the module; `gpu`: compute on the GPU.
  static async open(pack, ort, methods, chunks, gpu = false) {
    const { graphs, weights } = pack.manifest.lowering;
    const engine = new Engine(ort, graphs), files = new Map(); // file -> a method that is in it
    for (const method of methods) {
      for (const chunk of chunks) if (graphs[`${method}_${chunk}`]) files.set(graphs[`${method}_${chunk}`], `${method}_${chunk}`);
      if (![...files.values()].some((name) => name.startsWith(`${method}_`))) throw new NotOnGpu(`the package: holds no ${method}; export it again`);
    }
    const models = new Map();
    for (const file of files.keys()) {
      const model = await pack.read(file), used = gpu ? operators(model) : new Set();
      for (const name of NOT_ON_GPU) if (used.has(name)) throw new NotOnGpu(`WebGPU has no ${name}; ${AVOIDED}`);
      if (used.has(FUSED)) engine.#fused = true;
      models.set(file, model);
    }
    const data = await pack.read(weights);
    for (const [file, name] of files) {
      const options = { executionProviders: ["wasm"], externalData: [{ path: weights, data }], logSeverityLevel: 3 };
      if (gpu) {
        options.executionProviders = ["webgpu"];
        options.preferredOutputLocation = {};
        for (const { name: output, dtype } of pack.manifest.methods[name].outputs) {
          options.preferredOutputLocation[output] = dtype === "float32" && !READ_HERE.includes(output) ? "gpu-buffer" : "cpu";
        }
      }
      try {
        engine.#files.set(file, await ort.InferenceSession.create(models.get(file), options));
      } catch (error) {
        await engine.close();
        const reason = error.message ?? String(error);
        if (gpu) throw new NotOnGpu(`${file}: WebGPU cannot load it (${reason})`);
        const fix = reason.includes("accuracy_level") ? "; export with --accuracy-level 0" : "";
        throw new Error(`${file}: onnxruntime-web cannot load it (${reason})${fix}`);
      }
    }
    engine.place = gpu ? new Gpu(await ort.env.webgpu.device) : new Memory();
    return engine;
  }

  #session(method, chunk) {
    const session = this.#files.get(this.#graphs[`${method}_${chunk}`]);
    if (session) return session;
    throw new Error(`the package: holds no ${method} for ${chunk} rows`);
  }

  takes(method, chunk) {
    return this.#session(method, chunk).inputNames;
  }

  async run(method, chunk, feeds) {
    const session = this.#session(method, chunk), given = {}, found = {};
    for (const name of session.inputNames) {
      const array = feeds[name];
      if (!array) throw new Error(`${method}: nobody gives ${name}`);
      given[name] = array.buffer
        ? this.#ort.Tensor.fromGpuBuffer(array.buffer, { dataType: array.type, dims: array.dims })
        : new this.#ort.Tensor(array.type, array.data, array.dims);
    }
    this.place.flush();
    for (const [name, tensor] of Object.entries(await session.run(given))) {
      const { type, dims } = tensor, here = tensor.location !== "gpu-buffer";
      found[name] = here ? { type, dims, data: tensor.data } : { type, dims, buffer: tensor.gpuBuffer };
      if (!here) this.#given.push(tensor);
    }
    return found;
  }

  // What was given out on the GPU is no longer looked at.
  release() {
    this.place.flush();
    for (const tensor of this.#given.splice(0)) tensor.dispose();
  }

  // What to say of a call that the GPU refused: the reason alone, since the engine names the file and line that found it.
  refused(error) {
    const reason = String(error.message ?? error).split("Status Message: ").at(-1).trim().split("\n")[0];
    return new NotOnGpu(`WebGPU cannot run it (${reason})${this.#fused ? `; ${AVOIDED}` : ""}`);
  }

  async close() {
    for (const session of this.#files.values()) await session.release();
    this.#files.clear();
  }
}
