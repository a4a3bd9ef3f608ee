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
    const parts = [["offsets", byOffset, relative, 2 * columns - 1],
                   ["pixels", byPixel, absolute, columns]];
    await Promise.all(parts.map(([name, values, {tops}, width]) => {
      const one = part(values, head, rows * width);
      const customdata = weights(one, tops[layer][head] ?? 0, width);
      return Plotly.restyle(name, {z: [byRows(one, width)], customdata: [customdata]}, [0]);
    }));
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

const percent = weight => `${(100 * weight).toFixed(weight < 0.01 ? 2 : 1)}%`;
const say = text => { element("said").textContent = text; };

const explorers = {
  async image(roots, top, pixel) {
    const y = Math.floor(pixel / columns), x = pixel % columns;
    const frame = {"shapes[0].x0": x - 0.5, "shapes[0].x1": x + 0.5,
                   "shapes[0].y0": y - 0.5, "shapes[0].y1": y + 0.5};
    const map = {z: [byRows(roots, columns)], customdata: [weights(roots, top, columns)]};
    await Promise.all([
      Plotly.relayout("original", frame), Plotly.update("attention", map, frame, [0]),
    ]);
    say(`The pixel with the most attention gets ${percent(top)} of it.`);
  },

  async audio(roots, top, sample) {
    const at = sample / data.rate, line = {"shapes[0].x0": at, "shapes[0].x1": at};
    const y = Array.from(roots, r => weightOf(r, top));
    await Promise.all([
      Plotly.relayout("original", line), Plotly.update("attention", {y: [y]}, line, [0]),
    ]);
    const [what, get] = cellSize > 1 ? [`${cellSize} samples`, "get"] : ["sample", "gets"];
    say(`The ${what} with the most attention ${get} ${percent(top)} of it.`);
  },

  // The bytes before the predicted one in blocks, each the darker the more it is attended.
  async text(roots, top, predicted) {
    const tokens = bytesOf(data.tokens), width = columns <= 160 ? columns : 128;
    const near = roots.length - 1, first = Math.max(0, predicted - near);
    const start = first - first % width;
    const end = Math.min(length, predicted + 3 * width - predicted % width);
    const places = new Set(data.places);
    const blocks = [];
    for (let t = start; t < end; t++) {
      if (t % width === 0) blocks.push(document.createElement("div"));
      const span = document.createElement("span");
      span.textContent = letter(tokens[t]);
      span.dataset.byte = t;
      if (t >= first && t < predicted) {
        const root = roots[predicted - 1 - t];
        span.dataset.root = root;
        span.title = `byte ${t}: ${percent(weightOf(root, top))}`;
        if (root) span.style.background = `rgba(0, 114, 178, ${(0.85 * root / 255).toFixed(3)})`;
      }
      if (t > predicted) span.className = "later";
      if (places.has(t)) span.classList.add("place");
      if (t === predicted) span.classList.add("predicted");
      blocks.at(-1).append(span);
    }
    element("text").replaceChildren(...blocks);
    element("text").className = width > 80 ? "wide" : "";
    const most = weightOf(Math.max(...roots.slice(0, near)), top);
    const earlier = weightOf(roots[near], top);
    say(`The byte with the most attention gets ${percent(most)} of it; the start and all bytes `
        + `before those shown get ${percent(earlier)} together.`);
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
  element("previous").disabled = chosen.place === 0;
  element("next").disabled = chosen.place === data.places.length - 1;
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

// Calls back where a chart is clicked or tapped, in the units of its axes. Plotly lies above the
// page while a mouse's button is down, so that a click would not arrive; and knows no taps.
function onTap(chart, then) {
  let down = null;
  chart.addEventListener("pointerdown", event => { down = event.button === 0 ? event : null; });
  addEventListener("pointercancel", () => { down = null; });  // the finger scrolls the page
  addEventListener("pointerup", ({clientX, clientY}) => {
    if (down && Math.hypot(clientX - down.clientX, clientY - down.clientY) < 10) {
      const {left, top} = chart.getBoundingClientRect(), {xaxis, yaxis} = chart._fullLayout;
      then(xaxis.p2d(clientX - left - xaxis._offset), yaxis.p2d(clientY - top - yaxis._offset));
    }
    down = null;
  });
}

const within = (n, count) => Math.min(Math.max(Math.round(n), 0), count - 1);

function listen() {
  for (const name of Object.keys(chosen)) {
    element(name).onchange = event => choose({[name]: Number(event.target.value)});
  }
  element("previous").onclick = () => choose({place: chosen.place - 1});
  element("next").onclick = () => choose({place: chosen.place + 1});
  for (const chart of element("numbers").querySelectorAll(".chart")) {
    onTap(chart, (x, y) => {
      const far = data.layers.map(layer => Math.abs(layer - y));
      const layer = far.indexOf(Math.min(...far));
      choose({layer, head: within(x, data.heads[layer].length)});
    });
  }
  if (data.modality === "image") {
    const choosePixel = (x, y) => choose({
      place: nearest(p => Math.hypot(Math.floor(p / columns) - y, p % columns - x)),
    });
    for (const name of ["original", "attention"]) onTap(element(name), choosePixel);
  } else if (data.modality === "audio") {
    const chooseTime = x => choose({place: nearest(p => Math.abs(p / data.rate - x))});
    for (const name of ["original", "attention"]) onTap(element(name), chooseTime);
  } else {
    element("text").onclick = ({clientX, clientY}) => {
      const far = [...element("text").querySelectorAll(".place")].map(span => {
        const {left, right, top, bottom} = span.getBoundingClientRect();
        return [Math.hypot((left + right) / 2 - clientX, (top + bottom) / 2 - clientY), span];
      });
      const [, span] = far.reduce((best, one) => one[0] < best[0] ? one : best);
      choose({place: data.places.indexOf(Number(span.dataset.byte))});
    };
  }
}

async function start() {
  const touched = matchMedia("(pointer: coarse)").matches;
  for (const [name, {data: traces, layout}] of Object.entries(figures)) {
    if (touched) layout.dragmode = false;  // a finger scrolls the page
    await Plotly.newPlot(name, traces, layout, {responsive: true, displayModeBar: false});
  }
  fill(element("layer"), data.layers);
  fill(element("place"), data.places.map(nameOf));
  listen();
  await choose({layer: 0, head: 0, place: nearest(fromMiddle)});
}

start();
