// A session as a file: everything a text has left behind, so that it goes on later, here or in rmse-run. The format is that of
// runtimes/host/session.py: one safetensors file, whose header has a SHA-256 over all of it.

import { MAKE, sizeOf, bytesOf } from "./place.js";
import { Standing } from "./writer.js";

const FORMAT = "rmse-edge session", VERSION = "3", NEW = "start a new session";
const TYPES = { float32: "F32", float16: "F16", int8: "I8", int64: "I64", bool: "BOOL" };
const LARGEST_HEADER = 100 << 20;
const ascii = (value) => JSON.stringify(value).replace(/[\u007f-\uffff]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);

// The bytes of a file for what the writer stands at.
export async function saveSession({ runtime, standing }) {
  if (!standing || !runtime.position) throw new Error("there is no text to save; write one first");
  const { pending, tail, messages, read } = standing, tensors = await runtime.tensors();
  const header = {
    format: FORMAT, version: VERSION, model: runtime.info.fingerprint, name: runtime.info.name, position: String(runtime.position),
    pending: pending.join(" "), context: tail.context.join(" "), open: tail.open.join(" "), chat: messages ? ascii({ messages, read }) : "",
  };
  header.sha256 = await digest(tensors, header);
  // The widest types first, so that each begins at a multiple of its size.
  const width = ([, { type }]) => MAKE[type].BYTES_PER_ELEMENT;
  const order = Object.entries(tensors).sort((a, b) => width(b) - width(a) || (a[0] < b[0] ? -1 : 1)), table = { __metadata__: header };
  let size = 0;
  for (const [name, array] of order) {
    table[name] = { dtype: TYPES[array.type], shape: array.dims, data_offsets: [size, (size += sizeOf(array))] };
  }
  let text = ascii(table);
  text += " ".repeat((8 - (text.length % 8)) % 8);
  const length = new DataView(new ArrayBuffer(8));
  length.setBigUint64(0, BigInt(text.length), true);
  return joined([new Uint8Array(length.buffer), new TextEncoder().encode(text), ...order.map(([, array]) => bytesOf(array))]);
}

// Put the session of a file into the writer, in place of its text. Where it does not fit, nothing is changed.
export async function restoreSession(writer, bytes) {
  const { runtime } = writer, { info } = runtime, { header, tensors } = opened(bytes);
  if (header.format !== FORMAT) throw new Error("not a session file; save one with this page, or rmse-run --save-session");
  if (header.version !== VERSION) throw new Error(`the session: version ${header.version}, this page reads ${VERSION}; ${NEW}`);
  if (!info.fingerprint || header.model !== info.fingerprint) throw new Error(`a session of another model (${header.name}), not of ${info.name}; ${NEW}`);
  const position = Number(field(header, "position", /^[0-9]{1,15}$/));
  if (info.longest !== null && position > info.longest) throw new Error(`position: got ${position}, and ${info.name} takes ${info.longest} tokens at most; ${NEW}`);
  const [pending, context, open] = ["pending", "context", "open"].map((name) => {
    const ids = field(header, name, /^([0-9]{1,9}( [0-9]{1,9})*)?$/).split(" ").filter(Boolean).map(Number);
    const beyond = ids.find((id) => id >= info.text.vocab_size);
    if (beyond !== undefined) throw new Error(`${name}: got token ${beyond}, expected some below ${info.text.vocab_size}; ${NEW}`);
    return ids;
  });
  const known = runtime.forms(position), form = (array) => (array ? `[${array.dims}] ${array.type}` : "none");
  for (const name of Object.keys({ ...known, ...tensors }).sort()) {
    const [got, expected] = [form(tensors[name]), form(known[name])];
    if (got !== expected) throw new Error(`its tensors are not those of ${info.name} (${name}: got ${got}, expected ${expected}); ${NEW}`);
  }
  if (header.sha256 !== (await digest(tensors, header))) throw new Error(`the session: its SHA-256 does not fit; the file is damaged, ${NEW}`);
  for (const [name, { type, data }] of Object.entries(tensors)) {
    const wrong = { float32: (x) => !Number.isFinite(x), float16: (x) => (x & 0x7c00) === 0x7c00, bool: (x) => x > 1 }[type];
    if (wrong && data.some(wrong)) throw new Error(`${name}: holds numbers that are none; ${NEW}`);
  }
  const { messages = null, read = [] } = header.chat ? conversation(header.chat) : {};
  runtime.restore(position, tensors);
  writer.standing = new Standing({ pending, tail: { context, open }, messages, read });
}

function field(header, name, form) {
  const value = header[name] ?? "";
  if (form.test(value)) return value;
  throw new Error(`${name}: got ${JSON.stringify(value.slice(0, 60))}, which is no number of tokens; ${NEW}`);
}

function conversation(text) {
  const isText = (value) => typeof value === "string", isToken = (value) => Number.isSafeInteger(value) && value >= 0;
  const damaged = new Error(`the session: its conversation is damaged; ${NEW}`);
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw damaged;
  }
  const messages = Array.isArray(found?.messages) && found.messages.every((one) => one && isText(one.role) && isText(one.content));
  const read = Array.isArray(found?.read) && found.read.every((one) => isText(one?.[0]) && Array.isArray(one[1]) && one[1].every(isToken));
  if (!messages || !read) throw damaged;
  return found;
}

// The header's metadata and the tensors of a safetensors file.
function opened(bytes) {
  const damaged = (what) => new Error(`the session: damaged (${what}); ${NEW}`);
  if (bytes.length < 8) throw damaged("cut short");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length), size = Number(view.getBigUint64(0, true));
  if (size > LARGEST_HEADER || 8 + size > bytes.length) throw damaged("cut short, or no session");
  let table;
  try {
    table = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, 8 + size)));
  } catch {
    throw damaged("its header");
  }
  const { __metadata__: header = {}, ...parts } = table, tensors = {};
  if (Object.values(header).some((value) => typeof value !== "string")) throw damaged("its header");
  for (const [name, part] of Object.entries(parts)) {
    const type = Object.keys(TYPES).find((one) => TYPES[one] === part?.dtype), [start, end] = part?.data_offsets ?? [];
    const dims = Array.isArray(part?.shape) ? part.shape : [-1];
    const whole = type && [start, end, ...dims].every((one) => Number.isSafeInteger(one) && one >= 0);
    if (!whole || end - start !== sizeOf({ type, dims }) || 8 + size + end > bytes.length) throw damaged(name);
    const data = new MAKE[type](bytes.slice(8 + size + start, 8 + size + end).buffer);
    tensors[name] = { type, dims, data };
  }
  return { header, tensors };
}

// SHA-256 over the header without its own hash and all tensors; runtimes/host/session.py says what is hashed in which order.
async function digest(tensors, header) {
  const utf8 = (text) => new TextEncoder().encode(text), end = utf8("\n"), pieces = [];
  for (const name of Object.keys(header).filter((name) => name !== "sha256").sort()) {
    const value = utf8(header[name]);
    pieces.push(utf8(`${name} ${value.length}\n`), value, end);
  }
  for (const name of Object.keys(tensors).sort()) {
    const { type, dims } = tensors[name];
    pieces.push(utf8(`${name} ${type} ${dims.join("x")}\n`), bytesOf(tensors[name]), end);
  }
  const found = new Uint8Array(await crypto.subtle.digest("SHA-256", joined(pieces)));
  return Array.from(found, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function joined(pieces) {
  const whole = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}
