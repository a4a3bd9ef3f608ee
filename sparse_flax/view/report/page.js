"use strict";
// Draws the charts of the report and, for the chosen layer, head and place, what the head attends to.

const read = id => JSON.parse(document.getElementById(id).textContent);
const data = read("data"), figures = read("figures");
const element = id => document.getElementById(id);
const {rows, columns, seq_len: length, cell_size: cellSize} = data.layout;
const chosen = {layer: 0, head: 0, place: 0};
const unpacked = new Map();
let drawing = 0;  // counts the calls of draw(), of which only the last may write

const bytesOf = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));

// The bytes of one layer, [H, ...].
async function unpack(packed, layer) {
  const text = packed[layer];
  if (!unpacked.has(text)) {
    const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
    unpacked.set(text, new Uint8Array(await new Response(stream).arrayBuffer()));
  }
  return unpacked.get(text);
}

// Part n of equally long parts.
const part = (values, n, size) => values.slice(n * size, (n + 1) * size);
const weightOf = (root, top) => top * (root / 255) ** 2;
const byRows = (values, width) =>
  Array.from({length: values.length / width}, (_, y) => Array.from(part(values, y, width)));

async function draw() {
  const mine = ++drawing;
  const {layer, head, place} = chosen;
  const {cells, packed, tops} = data.maps;
  const {relative, absolute} = data.averages;
  const [maps, byOffset, byPixel] = await Promise.all([
    unpack(packed, layer),
    unpack(relative.packed, layer),
    absolute && unpack(absolute.packed, layer),
  ]);
  if (mine !== drawing) return;
  const roots = part(maps, head * data.places.length + place, cells);
  await explorers[data.modality](roots, tops[layer][head][place] ?? 0, data.places[place]);
  if (absolute) {
    const parts = [[byOffset, relative, 2 * columns - 1], [byPixel, absolute, columns]];
    const shown = parts.map(([values, {tops}, width]) => {
      const one = part(values, head, rows * width);
      return [byRows(one, width), weights(one, tops[layer][head] ?? 0, width)];
    });
    const [z, customdata] = [0, 1].map(n => shown.map(pair => pair[n]));
    await Plotly.restyle("offsets", {z, customdata}, [0, 1]);
  } else {
    const values = new Float32Array(byOffset.buffer);
    const one = part(values, head, values.length / data.heads[layer].length);
    // A logarithm has no place for zero. Two decades at least: noise is not to look like a pattern.
    const y = Array.from(one, w => w > 0 ? w : null);
    const seen = y.filter(w => w).map(Math.log10), top = Math.max(...seen, -9) + 0.3;
    const range = [Math.min(top - 2, Math.min(...seen) - 0.2), top];
    await Plotly.update("offsets", {y: [y]}, {"yaxis.range": range}, [0]);
  }
  document.body.dataset.drawn = [data.layers[layer], head, data.places[place]].join(" ");
}

const weights = (roots, top, width) => byRows(Array.from(roots, r => weightOf(r, top)), width);

const explorers = {
  async image(roots, top, pixel) {
    const y = Math.floor(pixel / columns), x = pixel % columns;
    const z = byRows(roots, columns), customdata = weights(roots, top, columns);
    const frame = {};
    for (const n of [0, 1]) {
      Object.assign(frame, {[`shapes[${n}].x0`]: x - 0.5, [`shapes[${n}].x1`]: x + 0.5});
      Object.assign(frame, {[`shapes[${n}].y0`]: y - 0.5, [`shapes[${n}].y1`]: y + 0.5});
    }
    await Plotly.update("explorer", {z: [z], customdata: [customdata]}, frame, [1]);
    element("said").textContent = `largest weight on a pixel: ${top.toFixed(3)}`;
  },

  async audio(roots, top, sample) {
    const at = sample / data.rate;
    const y = Array.from(roots, r => weightOf(r, top));
    await Plotly.update("explorer", {y: [y]}, {"shapes[0].x0": at, "shapes[0].x1": at}, [1]);
    const what = cellSize > 1 ? `${cellSize} samples` : "a sample";
    element("said").textContent = `largest weight on ${what}: ${top.toFixed(3)}`;
  },

  // The bytes before the predicted one in lines of a block, each the darker the more it is attended.
  async text(roots, top, predicted) {
    const tokens = bytesOf(data.tokens), width = columns <= 160 ? columns : 128;
    const near = roots.length - 1, first = Math.max(0, predicted - near);
    const start = first - first % width;
    const end = Math.min(length, predicted + 3 * width - predicted % width);
    const places = new Map(data.places.map((place, n) => [place, n]));
    const lines = document.createDocumentFragment();
    for (let t = start; t < end; t++) {
      const span = document.createElement("span");
      span.textContent = letter(tokens[t]);
      span.dataset.byte = t;
      if (t >= first && t < predicted) {
        const root = roots[predicted - 1 - t];
        span.dataset.root = root;
        span.title = `byte ${t}: weight ${weightOf(root, top).toFixed(4)}`;
        if (root) span.style.background = `rgba(0, 114, 178, ${(0.85 * root / 255).toFixed(3)})`;
      }
      if (t > predicted) span.className = "later";
      if (places.has(t)) {
        span.classList.add("place");
        span.onclick = () => choose({place: places.get(t)});
      }
      if (t === predicted) span.classList.add("predicted");
      lines.append(span);
      if ((t + 1) % width === 0) lines.append("\n");
    }
    element("explorer").replaceChildren(lines);
    element("explorer").style.fontSize = width > 80 ? "12px" : "15px";
    const earlier = weightOf(roots[near], top);
    element("said").textContent =
      `largest weight on a byte: ${weightOf(Math.max(...roots.slice(0, near)), top).toFixed(3)}; `
      + `on the start and all before what is shown: ${earlier.toFixed(3)}`;
  },
};

const letter = byte => byte === 32 ? "␣" : byte > 32 && byte < 127 ? String.fromCharCode(byte) : "·";

function nameOf(place) {
  if (data.modality === "image") return `row ${Math.floor(place / columns)}, column ${place % columns}`;
  return data.modality === "text" ? `byte ${place}` : `${(place / data.rate).toFixed(4)} s`;
}

function fill(select, names) {
  select.replaceChildren(...names.map((name, n) => new Option(name, n)));
}

function choose(choice) {
  Object.assign(chosen, choice);
  if ("layer" in choice) fill(element("head"), data.heads[chosen.layer]);
  for (const [name, value] of Object.entries(chosen)) element(name).value = value;
  return draw();
}

// The place nearest to a click.
function nearest(distance) {
  const far = data.places.map(distance);
  return far.indexOf(Math.min(...far));
}

// Of pictures from a pixel a little below the middle, which has much to attend to.
function fromMiddle(place) {
  if (data.modality !== "image") return Math.abs(place - 0.7 * length);
  return Math.hypot(Math.floor(place / columns) - 0.65 * rows, place % columns - columns / 2);
}

function listen() {
  for (const name of Object.keys(chosen)) {
    element(name).onchange = event => choose({[name]: Number(event.target.value)});
  }
  element("numbers").on("plotly_click", ({points: [{x: head, y}]}) => {
    const far = data.layers.map(layer => Math.abs(layer - y));
    choose({layer: far.indexOf(Math.min(...far)), head});
  });
  if (data.modality === "image") {
    element("explorer").on("plotly_click", ({points: [{x, y}]}) => choose({
      place: nearest(p => Math.hypot(Math.floor(p / columns) - y, p % columns - x)),
    }));
  } else if (data.modality === "audio") {
    element("explorer").on("plotly_click", ({points: [{x}]}) =>
      choose({place: nearest(p => Math.abs(p / data.rate - x))}));
  }
}

async function start() {
  for (const [name, {data: traces, layout}] of Object.entries(figures)) {
    const displayModeBar = layout.dragmode === false ? false : "hover";
    const modeBarButtonsToRemove = ["select2d", "lasso2d", "sendDataToCloud"];
    const options = {responsive: true, displaylogo: false, displayModeBar, modeBarButtonsToRemove};
    await Plotly.newPlot(name, traces, layout, options);
  }
  element("legend").textContent = data.modality === "image"
    ? "White is the most attended; the shade is the root of the weight."
    : data.modality === "text" ? "The shade is the root of the weight; underlined bytes can be clicked."
    : "Dots mark the samples that can be clicked.";
  fill(element("layer"), data.layers);
  fill(element("place"), data.places.map(nameOf));
  listen();
  await choose({layer: 0, head: 0, place: nearest(fromMiddle)});
}

start();
