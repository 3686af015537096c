// Bytes that are read piece by piece: of a file that was picked, or of an address, by range requests.

const PIECE = 4 << 20;

export class FileBytes {
  constructor(file) {
    this.file = file;
    this.size = file.size;
  }

  async read(start, end) {
    return new Uint8Array(await this.file.slice(start, end).arrayBuffer());
  }
}

export class UrlBytes {
  #whole = null; // of a server that knows no ranges

  constructor(url, size) {
    this.url = url;
    this.size = size;
  }

  static async open(url) {
    const answer = await fetch(url, { headers: { range: "bytes=0-0" } });
    if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
    if (answer.status === 206) {
      await answer.arrayBuffer();
      const size = Number(answer.headers.get("content-range")?.split("/")[1]);
      if (Number.isSafeInteger(size)) return new UrlBytes(url, size);
      throw new Error(`${url}: the server does not say how long it is`);
    }
    const whole = new Uint8Array(await answer.arrayBuffer());
    const found = new UrlBytes(url, whole.length);
    found.#whole = whole;
    return found;
  }

  async read(start, end) {
    if (this.#whole) return this.#whole.subarray(start, end);
    if (start >= end) return new Uint8Array();
    const answer = await fetch(this.url, { headers: { range: `bytes=${start}-${end - 1}` } });
    if (answer.status !== 206) throw new Error(`${this.url}: ${answer.status}, expected a part of it`);
    const found = new Uint8Array(await answer.arrayBuffer());
    if (found.length !== end - start) throw new Error(`${this.url}: cut short; load it again`);
    return found;
  }
}

// All of `size` bytes from `start` on, `told` how many of them are there as they come.
export async function readAll(bytes, start, size, told = () => {}) {
  const found = new Uint8Array(size);
  for (let done = 0; done < size; done += PIECE) {
    const end = Math.min(size, done + PIECE);
    found.set(await bytes.read(start + done, start + end), done);
    told(end);
  }
  return found;
}
