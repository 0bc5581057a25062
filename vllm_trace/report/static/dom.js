// Small things that every figure needs: elements, tooltip, colours, canvases, long lists.

const $ = (id) => document.getElementById(id);

// el("p.quiet", {text: …}, child, …); text only ever goes in as text.
function el(spec, given = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "text") node.textContent = value;
    else if (key === "style") for (const [name, css] of Object.entries(value)) node.style.setProperty(name, css);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

const many = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;

// As the terminal prints them: three significant digits with a unit.
function duration(ns) {
  for (const [unit, size] of [["s", 1e9], ["ms", 1e6], ["µs", 1e3]]) {
    if (ns >= size * 0.9995) {
      const value = ns / size;
      return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ${unit}`;
    }
  }
  return `${Math.round(ns)} ns`;
}

function link(text, hash) {
  return el("a", { href: hash, text });
}

const eventLink = (number) => link(`event ${number}`, `#events?n=${number}`);

function say(text) {
  $("say").textContent = text;
}

const tip = {
  show(x, y, title, rows) {
    const node = $("tip");
    node.replaceChildren(
      el("strong", { text: title }),
      el("dl", {}, rows.filter(Boolean).map(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]).flat()),
    );
    node.hidden = false;
    const box = node.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth ? Math.max(4, x - box.width - 12) : x + 14;
    const top = y + 16 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 16;
    node.style.left = `${left}px`;
    node.style.top = `${top}px`;
  },
  hide() {
    $("tip").hidden = true;
  },
};

// Okabe and Ito's colours, then some of Paul Tol's: told apart with any kind of colour vision, in
// this order. After twelve they come again with stripes, then with dots.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#332288",
  "#44aa99", "#882255", "#999933", "#ddcc77"];
const inkOn = (colour) => {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.2 ? "#10131a" : "#ffffff";
};
const INKS = COLOURS.map(inkOn);
const colourOf = (place) => COLOURS[place % COLOURS.length];
const patternOf = (place) => Math.floor(place / COLOURS.length) % 3;

const theme = {};
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "card", "ink", "quiet", "line", "faint", "accent", "free", "cached", "cached-ink", "shared",
    "null", "mark", "bad", "good", "sched", "exec", "forward", "sample", "post"]) {
    theme[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

// A context scaled to the screen's pixels, cleared, of the size that the page gives the canvas.
function paper(canvas, width, height) {
  const ratio = Math.min(2, devicePixelRatio || 1);
  const w = Math.round(width * ratio);
  const h = Math.round(height * ratio);
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
  }
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

function stripes(context, x, y, w, h, gap, colour, width = 1.5) {
  context.save();
  context.beginPath();
  context.rect(x, y, w, h);
  context.clip();
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.beginPath();
  for (let at = -h; at < w; at += gap) {
    context.moveTo(x + at, y + h);
    context.lineTo(x + at + h, y);
  }
  context.stroke();
  context.restore();
}

// A block or a swatch in a request's colour.
function fillOwner(context, x, y, w, h, place) {
  context.fillStyle = colourOf(place);
  context.fillRect(x, y, w, h);
  const pattern = patternOf(place);
  if (!pattern || Math.min(w, h) < 5) return;
  const ink = INKS[place % COLOURS.length];
  context.globalAlpha = 0.55;
  if (pattern === 1) stripes(context, x, y, w, h, Math.max(4, w / 4), ink);
  else {
    context.fillStyle = ink;
    const step = Math.max(4, Math.min(w, h) / 3);
    for (let dx = step / 2; dx < w; dx += step)
      for (let dy = step / 2; dy < h; dy += step) context.fillRect(x + dx - 1, y + dy - 1, 2, 2);
  }
  context.globalAlpha = 1;
}

function swatch(place) {
  const canvas = el("canvas.swatch", { "aria-hidden": "true" });
  fillOwner(paper(canvas, 13, 13), 0, 0, 13, 13, place);
  return canvas;
}

// Only the lines in sight exist.
class LongList {
  constructor(height, line, label, rows) {
    this.height = height;
    this.line = line;
    this.count = 0;
    this.inner = el("div.inner");
    this.node = el("div.list", { tabindex: "0", role: "list", "aria-label": label, style: { height: `${rows * height}px` } }, this.inner);
    this.node.addEventListener("scroll", () => this.draw());
    this.rows = rows;
  }

  show(count) {
    this.count = count;
    this.inner.style.height = `${count * this.height}px`;
    this.node.style.height = `${Math.max(2, Math.min(count, this.rows)) * this.height + 2}px`;
    this.draw();
  }

  draw() {
    const top = this.node.scrollTop;
    const first = Math.max(0, Math.floor(top / this.height) - 4);
    const last = Math.min(this.count, Math.ceil((top + this.node.clientHeight) / this.height) + 4);
    const made = [];
    for (let place = first; place < last; place++) {
      const node = this.line(place);
      node.style.top = `${place * this.height}px`;
      node.style.height = `${this.height}px`;
      node.setAttribute("role", "listitem");
      node.setAttribute("aria-posinset", place + 1);
      node.setAttribute("aria-setsize", this.count);
      made.push(node);
    }
    this.inner.replaceChildren(...made);
  }

  reveal(place) {
    const top = place * this.height;
    const box = this.node;
    if (top < box.scrollTop || top + this.height > box.scrollTop + box.clientHeight) {
      box.scrollTop = Math.max(0, top - box.clientHeight / 2);
    }
    this.draw();
  }
}
