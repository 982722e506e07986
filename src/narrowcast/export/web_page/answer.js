// What a model's output means, how it is shown, and how far two models agree about it.

const LEADERS = 5;

// The numbers that matter of one output: the whole, the last position of a text, or the mean over its real positions.
export function vector({ data, dims }, show, mask) {
  const width = dims[dims.length - 1];
  if (show.pool === "none") return data;
  const rows = Array.from({ length: data.length / width }, (_, i) => data.slice(i * width, (i + 1) * width));
  const real = rows.filter((_, i) => !mask || Number(mask[i]));
  if (show.pool === "last") return real[real.length - 1];
  return Array.from({ length: width }, (_, j) => real.reduce((sum, row) => sum + row[j], 0) / real.length);
}

// Probabilities: the numbers themselves where they are some already, their softmax otherwise.
export function shares(values) {
  const sum = values.reduce((a, b) => a + b, 0);
  if (values.every((v) => v >= 0) && Math.abs(sum - 1) < 1e-3) return values;
  const top = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = values.map((v) => Math.exp(v - top));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((p) => p / total);
}

export function leaders(values) {
  const order = values.map((_, i) => i).sort((a, b) => values[b] - values[a] || a - b);
  return order.slice(0, LEADERS);
}

export function cosine(a, b) {
  let ab = 0, aa = 0, bb = 0;
  for (let i = 0; i < a.length; i++) { ab += a[i] * b[i]; aa += a[i] * a[i]; bb += b[i] * b[i]; }
  return aa && bb ? ab / Math.sqrt(aa * bb) : Number(aa === bb);
}

export const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

const visible = (name) => (name.trim() ? name : JSON.stringify(name)); // a space is a class, too

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function bar(name, text, share) {
  const item = element("li");
  const track = element("div", "track");
  track.setAttribute("aria-hidden", "true");
  const fill = element("div", "fill");
  fill.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  track.append(fill);
  item.append(element("span", "name", name), element("span", "share", text), track);
  return item;
}

function classes(values, show) {
  const share = shares(values);
  const list = element("ol", "bars");
  for (const i of leaders(share)) {
    const item = bar(visible(show.labels[i] ?? `class ${i}`), percent(share[i]), share[i]);
    item.dataset.class = i;
    list.append(item);
  }
  return list;
}

function likeness([a, b]) {
  const value = cosine(a, b);
  const said = element("p", "big", value.toFixed(3));
  said.dataset.value = value;
  return said;
}

function values(numbers) {
  const list = element("ol", "bars");
  const largest = Math.max(...numbers.slice(0, 10).map(Math.abs), 1e-30);
  numbers.slice(0, 10).forEach((v, i) => list.append(bar(`value ${i}`, v.toPrecision(5), Math.abs(v) / largest)));
  if (numbers.length > 10) list.append(element("li", "quiet", `and ${numbers.length - 10} more`));
  return list;
}

// One block per model; `found` maps its name to a list of vectors, one per run.
export function render(place, models, found, show) {
  place.replaceChildren();
  for (const model of models.filter((m) => found[m.name])) {
    const block = element("div", model.name === "float32" ? "float" : "quantized");
    block.id = `answer-${model.name}`;
    block.append(element("h3", "", models.length > 1 ? model.label : heading(show)));
    const rows = found[model.name];
    block.append(show.kind === "classes" ? classes(rows[0], show) : show.kind === "likeness" ? likeness(rows) : values(rows[0]));
    place.append(block);
  }
}

const heading = (show) => ({ classes: "Most likely", likeness: "Likeness of the texts (cosine)", values: "Values" })[show.kind];

// Whether the two say the same of one input, and by how much their numbers differ.
export function agreement(quantized, float, show) {
  const near = Math.min(...quantized.map((row, i) => cosine(row, float[i])));
  if (show.kind === "likeness") {
    const apart = Math.abs(cosine(...quantized) - cosine(...float));
    return { same: apart < 0.05, near, text: `likeness differs by ${apart.toFixed(3)}` };
  }
  if (show.kind === "values") return { same: near > 0.99, near, text: `cosine of the outputs ${near.toFixed(4)}` };
  const same = leaders(quantized[0])[0] === leaders(float[0])[0];
  return { same, near, text: `${same ? "same first class" : "another first class"}, cosine of the outputs ${near.toFixed(4)}` };
}
