// A picture as the model's input: chosen, dropped, pasted or one of the examples; resized as Pillow does it (triangle
// filter, rows then columns, each rounded to 8 bits), so that the model sees in the browser what it sees in Python.

// For every target position: the first source position and the weights from there on.
function weights(source, from, length, target) {
  const scale = length / target;
  const reach = Math.max(scale, 1);
  return Array.from({ length: target }, (_, i) => {
    const centre = from + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const last = Math.min(source, Math.trunc(centre + reach + 0.5));
    const row = [];
    for (let x = first; x < last; x++) row.push(Math.max(0, 1 - Math.abs((x - centre + 0.5) / reach)));
    const sum = row.reduce((a, b) => a + b, 0);
    return { first, row: row.map((w) => w / sum) };
  });
}

const even = (value) => (value % 1 === 0.5 ? 2 * Math.round(value / 2) : Math.round(value)); // as Python rounds
const byte = (value) => Math.max(0, Math.min(255, Math.floor(value + 0.5)));

// One axis of interleaved RGB: `lines` lines of `along` pixels; `at(line, position)` is a pixel's place.
function resample(pixels, taps, lines, placeIn, placeOut, out) {
  for (let line = 0; line < lines; line++) {
    taps.forEach(({ first, row }, i) => {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let k = 0; k < row.length; k++) sum += row[k] * pixels[placeIn(line, first + k) + c];
        out[placeOut(line, i) + c] = byte(sum);
      }
    });
  }
  return out;
}

export function resize(pixels, width, height, newWidth, newHeight) {
  if (width !== newWidth) {
    pixels = resample(pixels, weights(width, 0, width, newWidth), height,
      (y, x) => 3 * (y * width + x), (y, x) => 3 * (y * newWidth + x), new Uint8ClampedArray(3 * newWidth * height));
  }
  if (height !== newHeight) {
    pixels = resample(pixels, weights(height, 0, height, newHeight), newWidth,
      (x, y) => 3 * (y * newWidth + x), (x, y) => 3 * (y * newWidth + x), new Uint8ClampedArray(3 * newWidth * newHeight));
  }
  return pixels;
}

// The picture covers the model's rectangle, and what hangs over on both sides is cut off.
export function fit(pixels, width, height, wantedWidth, wantedHeight) {
  const scale = Math.max(wantedWidth / width, wantedHeight / height);
  const w = Math.max(wantedWidth, even(width * scale));
  const h = Math.max(wantedHeight, even(height * scale));
  const large = resize(pixels, width, height, w, h);
  const left = (w - wantedWidth) >> 1;
  const top = (h - wantedHeight) >> 1;
  const cut = new Uint8ClampedArray(3 * wantedWidth * wantedHeight);
  for (let y = 0; y < wantedHeight; y++) {
    const start = 3 * ((y + top) * w + left);
    cut.set(large.subarray(start, start + 3 * wantedWidth), 3 * y * wantedWidth);
  }
  return cut;
}

// RGB bytes -> the numbers that the model takes, in its order of axes.
export function numbers(rgb, ask) {
  const { channels, height, width, layout, divide, mean, std, type } = ask;
  const size = height * width;
  const f = Math.fround; // every step in float32, as torch has it
  const data = type === "uint8" ? new Uint8Array(channels * size) : new Float32Array(channels * size);
  for (let i = 0; i < size; i++) {
    const [r, g, b] = rgb.subarray(3 * i, 3 * i + 3);
    const pixel = channels === 1 ? [(r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16] : [r, g, b];
    for (let c = 0; c < channels; c++) {
      const value = f((f(pixel[c] / divide) - f(mean[c % mean.length] ?? 0))) / f(std[c % std.length] ?? 1);
      data[layout === "NCHW" ? c * size + i : i * channels + c] = value;
    }
  }
  const dims = layout === "NCHW" ? [1, channels, height, width] : [1, height, width, channels];
  return { [ask.input]: { type, data, dims } };
}

async function pixelsOf(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const rgb = new Uint8ClampedArray((data.length / 4) * 3);
  for (let i = 0, j = 0; i < data.length; i += 4) for (let c = 0; c < 3; c++) rgb[j++] = data[i + c];
  return { rgb, width: bitmap.width, height: bitmap.height };
}

function show(canvas, rgb, ask) {
  canvas.width = ask.width;
  canvas.height = ask.height;
  const image = new ImageData(ask.width, ask.height);
  for (let i = 0; i < ask.width * ask.height; i++) {
    image.data.set(rgb.subarray(3 * i, 3 * i + 3), 4 * i);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

export function make(place, ask, changed, failed) {
  place.innerHTML = `
    <div class="drop"><label class="choose">Choose a picture
      <input class="hidden-file" type="file" accept="image/*" id="picture"></label>
      <p class="quiet">or drop one here, or paste it</p></div>
    <div class="pictures" role="group" aria-label="Examples"></div>
    <figure hidden><canvas role="img" aria-label="The picture as the model sees it"></canvas>
      <figcaption>What the model sees: ${ask.width} × ${ask.height}</figcaption></figure>`;
  const [drop, examples, figure] = place.children;
  const canvas = figure.querySelector("canvas");
  let feeds = null;

  async function take(blob, button) {
    try {
      const { rgb, width, height } = await pixelsOf(blob);
      const seen = fit(rgb, width, height, ask.width, ask.height);
      show(canvas, seen, ask);
      figure.hidden = false;
      feeds = [numbers(seen, ask)];
      for (const other of examples.children) other.setAttribute("aria-pressed", String(other === button));
      changed();
    } catch (error) {
      failed(`This is not a picture that the browser can read: ${error.message}`);
    }
  }

  const takeFirst = (files) => files.length && take(files[0], null);
  drop.querySelector("input").addEventListener("change", (event) => takeFirst(event.target.files));
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    takeFirst(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => takeFirst(event.clipboardData.files));
  ask.examples.forEach((file, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.innerHTML = `<img alt="Example ${i + 1}">`;
    button.firstChild.src = file;
    button.addEventListener("click", async () => take(await (await fetch(file)).blob(), button));
    examples.append(button);
  });
  return { read: () => feeds, begin: () => examples.firstElementChild?.click() };
}
