// The operators of an ONNX graph, the graphs inside it included: what of the file's protocol buffers names them.

const GRAPH = 7, NODE = 1, OPERATOR = 4, ATTRIBUTE = 5, DOMAIN = 7, INNER = [6, 11];

// [number, bytes] of the fields of a message that have a length.
function* fields(bytes) {
  const text = { at: 0 };
  const varint = () => {
    let value = 0, shift = 1;
    while (true) {
      const byte = bytes[text.at++];
      if (byte === undefined) throw new Error("a graph: cut short; export the package again");
      value += (byte & 127) * shift;
      if (byte < 128) return value;
      shift *= 128;
    }
  };
  while (text.at < bytes.length) {
    const key = varint(), kind = key % 8;
    if (kind === 2) {
      const size = varint();
      yield [(key - kind) / 8, bytes.subarray(text.at, text.at + size)];
      text.at += size;
    } else if (kind === 0) varint();
    else text.at += kind === 1 ? 8 : 4;
  }
}

const text = (bytes) => new TextDecoder().decode(bytes);

function* ofGraph(graph) {
  for (const [number, node] of fields(graph)) {
    if (number !== NODE) continue;
    let name = "", domain = "";
    for (const [part, value] of fields(node)) {
      if (part === OPERATOR) name = text(value);
      else if (part === DOMAIN) domain = text(value);
      else if (part === ATTRIBUTE) {
        for (const [inner, own] of fields(value)) if (INNER.includes(inner)) yield* ofGraph(own);
      }
    }
    yield domain ? `${domain}.${name}` : name;
  }
}

export function operators(model) {
  const found = new Set();
  for (const [number, graph] of fields(model)) {
    if (number === GRAPH) for (const name of ofGraph(graph)) found.add(name);
  }
  return found;
}
