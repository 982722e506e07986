// Numbers as the model's inputs: one field each where they are few, nested JSON lists otherwise.

const ARRAYS = {
  float16: Float32Array, float32: Float32Array, float64: Float64Array, int64: BigInt64Array, int32: Int32Array, int8: Int8Array,
  uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, uint32: Uint32Array, uint64: BigUint64Array, bool: Uint8Array,
};

function shapeOf(value) {
  const shape = [];
  for (let inner = value; Array.isArray(inner); inner = inner[0]) shape.push(inner.length);
  return shape;
}

// Nested lists -> a tensor of the shape that the model wants; the message says which part does not fit.
export function tensor(value, port) {
  const dims = shapeOf(value);
  const wanted = port.shape.map((side) => side ?? "any").join(" × ") || "one number";
  if (dims.length !== port.shape.length || port.shape.some((side, i) => side !== null && side !== dims[i])) {
    throw new Error(`${port.name} has the shape ${dims.join(" × ") || "of one number"}; the model wants ${wanted}`);
  }
  const flat = dims.length ? value.flat(Infinity) : [value];
  if (flat.length !== dims.reduce((a, b) => a * b, 1)) throw new Error(`${port.name}: its lists have different lengths`);
  const bad = flat.find((x) => typeof x !== "number" && typeof x !== "boolean");
  if (bad !== undefined) throw new Error(`${port.name} holds ${JSON.stringify(bad)}, which is not a number`);
  const kind = ARRAYS[port.type];
  const big = kind === BigInt64Array || kind === BigUint64Array;
  if (big && flat.some((x) => !Number.isInteger(Number(x)))) throw new Error(`${port.name} takes whole numbers only`);
  return { type: port.type, dims, data: big ? kind.from(flat, BigInt) : kind.from(flat, Number) };
}

function fields(place, ask, changed) {
  const grid = document.createElement("div");
  grid.className = "fields";
  const first = ask.example[ask.ports[0].name].flat(Infinity);
  const inputs = first.map((value, i) => {
    const label = document.createElement("label");
    label.textContent = `x${i + 1}`;
    const input = Object.assign(document.createElement("input"), { type: "number", step: "any", value });
    input.addEventListener("input", changed);
    label.append(input);
    grid.append(label);
    return input;
  });
  place.append(grid);
  return () => {
    if (inputs.some((input) => input.value === "")) throw new Error("every field wants a number");
    let flat = inputs.map((input) => Number(input.value));
    for (const side of [...shapeOf(ask.example[ask.ports[0].name])].reverse().slice(0, -1)) {
      flat = Array.from({ length: flat.length / side }, (_, i) => flat.slice(i * side, (i + 1) * side));
    }
    return { [ask.ports[0].name]: flat };
  };
}

function box(place, ask, changed) {
  const label = document.createElement("label");
  label.textContent = `Inputs as JSON: ${ask.ports.map((p) => `${p.name} (${p.type}, ${p.shape.map((s) => s ?? "any").join(" × ")})`).join(", ")}`;
  const area = Object.assign(document.createElement("textarea"), { className: "code", rows: 12, id: "numbers", spellcheck: false });
  area.value = JSON.stringify(ask.example);
  area.addEventListener("input", changed);
  label.append(area);
  place.append(label);
  return () => JSON.parse(area.value);
}

export function make(place, ask, changed) {
  const wrong = Object.assign(document.createElement("p"), { className: "wrong" });
  wrong.setAttribute("role", "alert");
  let waiting;
  const soon = () => { clearTimeout(waiting); waiting = setTimeout(changed, 300); };
  const values = (ask.fields ? fields : box)(place, ask, soon);
  place.append(wrong);
  return {
    read() {
      try {
        const given = values();
        const missing = ask.ports.find((port) => !(port.name in given));
        if (missing) throw new Error(`the input ${missing.name} is missing`);
        const feeds = Object.fromEntries(ask.ports.map((port) => [port.name, tensor(given[port.name], port)]));
        wrong.textContent = "";
        return [feeds];
      } catch (error) {
        wrong.textContent = error.message;
        return null;
      }
    },
    begin: changed,
  };
}
