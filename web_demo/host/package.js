// A package: a folder of files behind an address, or an archive. No file is given out whose SHA-256 is not the listed one.

import { readAll, UrlBytes } from "./bytes.js";

const SUMS = "SHA256SUMS", MANIFEST = "manifest.json";
const FORMAT = "rmse-edge package", VERSION = 2;
const LARGEST_JSON = 16 << 20;
const AGAIN = "export the package again";
const text = (bytes) => new TextDecoder("utf-8", { fatal: true }).decode(bytes);

export class Package {
  #place; // name -> {bytes, start, size}
  #digests;

  constructor(place, digests, manifest) {
    this.#place = place;
    this.#digests = digests;
    this.manifest = manifest;
  }

  // A folder behind an address that ends in /.
  static fromFolder(url, progress) {
    return Package.#open(async (name) => {
      const bytes = await UrlBytes.open(new URL(name, url).href);
      return { bytes, start: 0, size: bytes.size };
    }, progress);
  }

  // A .rmse.zip, of a file or an address.
  static async fromArchive(bytes, progress) {
    const entries = await zipEntries(bytes);
    return Package.#open(async (name) => {
      const entry = entries.get(name);
      if (!entry) throw new Error(`the archive: holds no ${name}; ${AGAIN}`);
      const own = await bytes.read(entry.offset, entry.offset + 30), head = new DataView(own.buffer, own.byteOffset, own.length);
      if (head.byteLength < 30 || head.getUint32(0, true) !== 0x04034b50) throw new Error(`the archive: damaged at ${name}; copy it again`);
      const start = entry.offset + 30 + head.getUint16(26, true) + head.getUint16(28, true);
      return { bytes, start, size: entry.size };
    }, progress);
  }

  static async #open(place, progress = () => {}) {
    const sums = new Map();
    for (const line of text(await small(await place(SUMS), SUMS)).split("\n")) {
      const found = /^([0-9a-f]{64}) [ *](.+)$/.exec(line);
      if (found) sums.set(found[2], found[1]);
      else if (line) throw new Error(`${SUMS}: damaged; ${AGAIN}`);
    }
    const found = new Package(place, sums, null);
    found.progress = progress;
    found.manifest = JSON.parse(text(await found.read(MANIFEST, LARGEST_JSON)));
    const { format, format_version: version, target } = found.manifest;
    if (format !== FORMAT) throw new Error(`${MANIFEST}: not of a package`);
    if (version !== VERSION) throw new Error(`${MANIFEST}: format version ${version}, this page reads ${VERSION}; ${AGAIN}`);
    if (target !== "onnx") throw new Error(`the package is for ${target}, a browser runs those for onnx; export with --target onnx`);
    return found;
  }

  // A file as bytes, its hash checked.
  async read(name, most = Infinity) {
    const digest = this.#digests.get(name);
    if (!digest) throw new Error(`the package: holds no ${name}; ${AGAIN}`);
    const place = await this.#place(name);
    if (place.size > most) throw new Error(`${name}: larger than any such file; ${AGAIN}`);
    const found = await readAll(place.bytes, place.start, place.size, (done) => this.progress(name, done, place.size));
    if (!globalThis.crypto?.subtle) throw new Error("this page must be opened by https:// or on this machine: the browser hashes nothing elsewhere");
    const got = new Uint8Array(await crypto.subtle.digest("SHA-256", found));
    const hex = Array.from(got, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (hex !== digest) throw new Error(`${name}: its SHA-256 is not that in ${SUMS}; the file is damaged, copy it again`);
    return found;
  }

  async text(name) {
    return text(await this.read(name, 256 << 20));
  }

  async json(name) {
    return JSON.parse(await this.text(name));
  }

  has(name) {
    return this.#digests.has(name);
  }
}

async function small(place, name) {
  if (place.size > LARGEST_JSON) throw new Error(`${name}: larger than any such file; ${AGAIN}`);
  return readAll(place.bytes, place.start, place.size);
}

// name -> {offset of its local header, size} of a zip whose files are stored as they are.
async function zipEntries(bytes) {
  const tail = Math.min(bytes.size, 65557);
  const end = await bytes.read(bytes.size - tail, bytes.size);
  const view = new DataView(end.buffer, end.byteOffset, end.length);
  let at = end.length - 22;
  while (at >= 0 && view.getUint32(at, true) !== 0x06054b50) at--;
  if (at < 0) throw new Error("not a whole zip archive; copy it again, or make it with rmse-export --archive");
  const count = view.getUint16(at + 10, true), size = view.getUint32(at + 12, true), start = view.getUint32(at + 16, true);
  if (count === 0xffff || start === 0xffffffff) throw new Error("the archive: larger than 4 GiB, which a browser does not hold");
  if (start + size > bytes.size) throw new Error("the archive: cut short; copy it again");
  const list = await readAll(bytes, start, size), entries = new Map();
  const of = new DataView(list.buffer);
  for (let i = 0, where = 0; i < count; i++) {
    if (where + 46 > size || of.getUint32(where, true) !== 0x02014b50) throw new Error("the archive: damaged; copy it again");
    const flags = of.getUint16(where + 8, true), method = of.getUint16(where + 10, true);
    const stored = of.getUint32(where + 20, true), own = of.getUint32(where + 24, true);
    const [nameLength, extra, comment] = [28, 30, 32].map((place) => of.getUint16(where + place, true));
    const offset = of.getUint32(where + 42, true);
    const name = text(list.subarray(where + 46, where + 46 + nameLength));
    if (method !== 0 || flags & 1 || stored !== own) throw new Error(`the archive: ${name} is compressed or encrypted; make it with rmse-export --archive`);
    if (entries.has(name)) throw new Error(`the archive: has ${name} twice; copy it again`);
    if (offset + 30 + own > bytes.size) throw new Error(`the archive: cut short at ${name}; copy it again`);
    entries.set(name, { offset, size: own });
    where += 46 + nameLength + extra + comment;
  }
  return entries;
}
