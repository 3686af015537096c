// Where the arrays of a model lie between calls: in this memory, {type, dims, data}, or on the GPU, {type, dims, buffer}.

export const MAKE = {
  float32: Float32Array, float16: Uint16Array, int64: BigInt64Array, int32: Int32Array, int8: Int8Array, uint8: Uint8Array, bool: Uint8Array,
};
const count = (dims) => dims.reduce((a, b) => a * b, 1);

export const zeros = (type, dims) => ({ type, dims, data: new MAKE[type](count(dims)) });

// The bytes of an array in this memory, without a copy.
export const bytesOf = ({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);

export const sizeOf = ({ type, dims }) => MAKE[type].BYTES_PER_ELEMENT * count(dims);

export class Memory {
  zeros(type, dims) {
    return zeros(type, dims);
  }

  clear(array) {
    array.data.fill(array.type === "int64" ? 0n : 0);
  }

  // Copy `size` bytes from byte `start` of `source` to byte `at` of `target`.
  copy(target, at, source, start, size) {
    bytesOf(target).set(bytesOf(source).subarray(start, start + size), at);
  }

  // Row k of an array as one of its own. It holds until the array changes, or the next row of it is asked for.
  row({ type, dims, data }, k) {
    const size = data.length / dims[0];
    return { type, dims: dims.slice(1), data: data.subarray(k * size, (k + 1) * size) };
  }

  // A copy in this memory.
  async read({ type, dims, data }) {
    return { type, dims, data: data.slice() };
  }

  // What was asked for is done before what others ask for from now on.
  flush() {}
}

// Floats are on the GPU; whole numbers and flags, which the engine computes with in this memory, stay here.
export class Gpu extends Memory {
  #device;
  #commands = null; // copies that were not sent yet
  #rows = new WeakMap(); // array -> room for one row

  constructor(device) {
    super();
    this.#device = device;
  }

  zeros(type, dims) {
    if (type !== "float32") return super.zeros(type, dims);
    const { STORAGE, COPY_SRC, COPY_DST } = GPUBufferUsage, size = Math.ceil((4 * count(dims)) / 16) * 16;
    return { type, dims, buffer: this.#device.createBuffer({ size, usage: STORAGE | COPY_SRC | COPY_DST }) };
  }

  clear(array) {
    if (array.buffer) this.#encoder().clearBuffer(array.buffer);
    else super.clear(array);
  }

  copy(target, at, source, start, size) {
    if (!target.buffer) super.copy(target, at, source, start, size);
    else if (source.buffer) this.#encoder().copyBufferToBuffer(source.buffer, start, target.buffer, at, size);
    else this.#put(target, at, bytesOf(source).subarray(start, start + size));
  }

  // A graph takes whole buffers, so a row is copied into one.
  row(array, k) {
    if (!array.buffer) return super.row(array, k);
    const dims = array.dims.slice(1), row = this.#rows.get(array) ?? this.zeros(array.type, dims);
    this.#rows.set(array, row);
    this.copy(row, 0, array, k * sizeOf(row), sizeOf(row));
    return row;
  }

  async read(array) {
    if (!array.buffer) return super.read(array);
    const size = sizeOf(array);
    const room = this.#device.createBuffer({ size, usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST });
    this.#encoder().copyBufferToBuffer(array.buffer, 0, room, 0, size);
    this.flush();
    await room.mapAsync(GPUMapMode.READ);
    const data = new Float32Array(room.getMappedRange().slice(0));
    room.destroy();
    return { type: array.type, dims: array.dims, data };
  }

  flush() {
    if (this.#commands) this.#device.queue.submit([this.#commands.finish()]);
    this.#commands = null;
  }

  #put(array, at, bytes) {
    this.flush();
    this.#device.queue.writeBuffer(array.buffer, at, bytes);
  }

  #encoder() {
    return (this.#commands ??= this.#device.createCommandEncoder());
  }
}
