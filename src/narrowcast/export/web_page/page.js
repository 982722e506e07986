// The page: opens the models in the worker, asks for an input, shows the answers, and times them side by side.
import { agreement, render, vector } from "./answer.js";
import { blocks, rates, together, write, written } from "./writing.js";

const MAKERS = { picture: "./picture.js", text: "./text.js", numbers: "./numbers.js", continuation: "./writing.js" };
const ASK_FIRST = 30e6; // bytes: a larger float32 model is downloaded only when the user says so

const at = (id) => document.getElementById(id);
const state = (name) => { document.body.dataset.state = name; };
const megabytes = (bytes) => (bytes < 1e6 ? `${(bytes / 1e3).toFixed(0)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(2) : ms.toFixed(1)} ms`;

function failed(message) {
  at("failure").textContent = message;
  at("failure").hidden = !message;
  if (message) state("failed");
}

// Why the worker's scripts do not start: browsers say nothing of files that are missing or sent as something else.
const SCRIPTS = ["worker.js", "half.js", "runtime/ort.wasm.min.mjs", "runtime/ort-wasm-simd-threaded.mjs"];

async function whyNot() {
  for (const script of SCRIPTS) {
    const response = await fetch(script);
    const type = response.headers.get("content-type");
    if (!response.ok) return `${script}: the server answered ${response.status}; copy the page again`;
    if (!/javascript|ecmascript/.test(type ?? "")) return `the server sends ${script} as ${type ?? "nothing"}, and browsers run only text/javascript; tell it so of .js and .mjs files`;
  }
  return "its script does not start";
}

// Questions to the worker, each with the promise of its answer.
function ask(worker) {
  const waiting = new Map();
  worker.onmessage = ({ data: { id, share, result, error } }) => {
    const entry = waiting.get(id);
    if (share !== undefined) return entry.progress?.(share);
    waiting.delete(id);
    if (error === undefined) entry.resolve(result);
    else entry.reject(new Error(error));
  };
  worker.onerror = async (event) => failed(`The model cannot run here: ${event.message || await whyNot()}`);
  let count = 0;
  return (task, argument, progress) => new Promise((resolve, reject) => {
    waiting.set(++count, { resolve, reject, progress });
    worker.postMessage({ id: count, task, argument });
  });
}

class Page {
  constructor(facts) {
    this.facts = facts;
    this.ask = ask(new Worker("worker.js", { type: "module" }));
    this.open = [];
    this.tried = 0;
    this.agreed = 0;
    this.turn = 0;
  }

  async start() {
    const { facts } = this;
    document.title = facts.title;
    at("title").textContent = facts.title;
    at("notes").replaceChildren(...facts.notes.map((note) => Object.assign(document.createElement("li"), { textContent: note })));
    at("models").replaceChildren(...facts.models.map((model) => this.row(model)));
    at("measure").addEventListener("click", () => this.measure());
    at("load-float").addEventListener("click", () => this.openFloat());
    await this.openModel(facts.models[0]);
    this.writes = facts.show.kind === "continuation";
    const { make } = await import(MAKERS[this.writes ? "continuation" : facts.ask.kind]);
    this.input = await make(at("input"), facts.ask, () => this.answer(), failed);
    if (this.writes) this.prepareWriting();
    state("ready");
    const float = facts.models[1];
    if (float && float.bytes <= ASK_FIRST) await this.openModel(float);
    else if (float) {
      at("load-float").hidden = false;
      at("load-float").textContent = `Compare with ${float.label} (${megabytes(float.bytes)})`;
    }
    this.input.begin();
  }

  row(model) {
    const row = document.createElement("tr");
    row.id = `row-${model.name}`;
    row.innerHTML = `<th scope="row"></th><td>${megabytes(model.bytes)}</td><td>–</td><td>–</td>`;
    row.firstChild.textContent = model.label;
    return row;
  }

  async openModel(model) {
    at("status").textContent = `Opening ${model.label}, ${megabytes(model.bytes)}…`;
    document.body.dataset.loading = "";
    const { version, threads } = await this.ask("open", model, (share) => { at("progress").value = share; });
    delete document.body.dataset.loading;
    this.open.push(model);
    at("status").textContent = "Ready.";
    at("machine").textContent = `ONNX Runtime Web ${version}, WebAssembly, ${threads === 1 ? "1 thread" : `${threads} threads`}.`;
  }

  async openFloat() {
    at("load-float").hidden = true;
    try {
      await this.openModel(this.facts.models[1]);
      await this.answer();
    } catch (error) {
      failed(error.message);
    }
  }

  // The answers of all open models to the present input; a newer input overtakes an older one.
  async answer() {
    const turn = ++this.turn;
    failed("");
    const runs = this.input.read();
    if (!runs) return;
    if (this.writes) {
      await this.write(runs);
      return;
    }
    const { show, ask: { mask } } = this.facts;
    try {
      const found = {};
      for (const { name } of this.open) {
        found[name] = [];
        for (const feeds of runs) {
          const given = await this.ask("run", { name, feeds, output: show.output });
          found[name].push(vector(given, show, mask && feeds[mask.name].data));
        }
      }
      if (turn !== this.turn) return;
      this.feeds = runs[0];
      render(at("answer"), this.open, found, show);
      if (found.float32) this.compare(found);
      at("measure").disabled = false;
      state("answered");
      if (this.timed !== this.open.length) await this.measure();
    } catch (error) {
      failed(`The model refuses this input: ${error.message}`);
    }
  }

  prepareWriting() {
    at("answer-heading").textContent = "Continuation";
    at("column-speed").textContent = "tokens per second";
    at("column-count").textContent = "tokens";
    at("measure").hidden = true;
    this.input.stop.addEventListener("click", () => { this.stopped = true; });
  }

  // Every open model writes the text on, in turns.
  async write({ ids, count, temperature }) {
    const { facts: { ask, show }, input: { vocabulary } } = this;
    this.stopped = false;
    this.input.busy(true);
    state("writing");
    at("status").textContent = "Writing…";
    const shown = blocks(at("answer"), this.open, vocabulary.decode(ids));
    try {
      const texts = await write({
        models: this.open.map((model) => model.name), ids, vocabulary, ask, count, temperature, seed: ++this.turn,
        run: (name, feeds, row) => this.ask("run", { name, feeds, output: show.output, row: show.pool === "last" ? row : 0 }),
        grown: (text) => { shown.get(text.name).behind.textContent = written(text, vocabulary); },
        stopped: () => this.stopped,
      });
      this.wrote(texts, shown);
    } catch (error) {
      failed(`The model cannot go on: ${error.message}`);
    } finally {
      this.input.busy(false);
      at("status").textContent = "Ready.";
    }
  }

  wrote(texts, shown) {
    const speeds = rates(texts);
    for (const text of texts) {
      shown.get(text.name).why.textContent = text.why ? ` [${text.why}]` : "";
      const cells = at(`row-${text.name}`).children;
      cells[2].textContent = speeds[text.name].rate.toFixed(1);
      cells[3].textContent = speeds[text.name].tokens;
      at(`row-${text.name}`).dataset.ms = 1000 / speeds[text.name].rate;
    }
    if (texts.length > 1) {
      const [first, second] = texts.map((text) => text.new);
      const same = together(first, second);
      const whole = Math.max(first.length, second.length);
      at("agreement").textContent = same === whole ? `Both wrote the same ${whole} tokens.` : `The first ${same} of ${whole} tokens are the same; from there on each goes on from its own text.`;
      at("agreement").dataset.same = same;
      this.verdict(Object.fromEntries(texts.map(({ name }) => [name, { median: 1 / speeds[name].rate }])));
    }
    this.timed = texts.length;
    state("timed");
  }

  compare(found) {
    const { same, text } = agreement(found.quantized, found.float32, this.facts.show);
    this.tried += 1;
    this.agreed += same;
    at("agreement").textContent = `This input: ${text}. Of the inputs tried so far, the two agree on ${this.agreed} of ${this.tried}.`;
    at("agreement").dataset.same = same;
  }

  async measure() {
    const names = this.open.map((model) => model.name);
    at("measure").disabled = true;
    at("status").textContent = "Measuring…";
    const { runs, warmup, show } = this.facts;
    const times = await this.ask("time", { names, feeds: this.feeds, output: show.output, runs, warmup });
    for (const name of names) {
      const cells = at(`row-${name}`).children;
      cells[2].textContent = milliseconds(times[name].median);
      cells[3].textContent = times[name].runs;
      at(`row-${name}`).dataset.ms = times[name].median;
    }
    if (times.float32) this.verdict(times);
    this.timed = names.length;
    at("measure").disabled = false;
    at("status").textContent = "Ready.";
    state("timed");
  }

  verdict({ quantized, float32 }) {
    const [small, large] = this.facts.models;
    const ratio = float32.median / quantized.median;
    const speed = ratio >= 1 ? `${ratio.toFixed(2)} times as fast as` : `and takes ${(1 / ratio).toFixed(2)} times as long as`;
    at("verdict").textContent = `${small.label}: ${((100 * small.bytes) / large.bytes).toFixed(0)} % of the size, ${speed} ${large.label} on this device.`;
  }
}

try {
  const response = await fetch("page.json");
  if (!response.ok) throw new Error(`page.json: the server answered ${response.status}`);
  await new Page(await response.json()).start();
} catch (error) {
  failed(error.message);
  at("status").textContent = "";
}
