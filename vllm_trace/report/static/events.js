// Every raw event, by the numbers of `show events`, filtered and a page at a time.

const DECISIONS = new Set(["request.arrived", "request.finished", "request.preempted", "request.freed", "slots.allocated",
  "slots.refused", "blocks.taken", "block.evicted", "blocks.touched", "blocks.cached", "blocks.freed", "prefix.reset",
  "engine.configured"]);
// What has nothing to do with blocks, in the few words beside the pool.
const ASIDE = ["at_ns", "arrival_unix", "sampling", "block_hashes", "priority", "salted", "num_kept", "settings", "groups", "new_hashes"];
const LISTS = ["requests", "new", "resumed", "preempted", "finished", "kept"];

class EventStore extends Events {
  constructor(model, index) {
    super(index);
    this.model = model;
  }

  // A line as `show events` prints it: names for numbers, long lists cut.
  brief(place, most = 12, without = []) {
    const fields = this.fields(place);
    for (const key of without) delete fields[key];
    for (const key of ["request", ...LISTS]) {
      if (key in fields && fields[key] !== null) fields[key] = this.named(fields[key]);
    }
    if (fields.request === fields.request_id) delete fields.request_id;
    return Object.entries(fields).filter(([, value]) => !isEmpty(value)).map(([key, value]) => `${key}=${short(value, most)}`).join(" ");
  }

  named(value) {
    return Array.isArray(value) ? value.map((one) => this.named(one)) : typeof value === "number" ? this.model.name(value) : value;
  }

  // What was decided between the schedule of a step and the one before it.
  async ofFrame(frame) {
    const { frames } = this.model.doc;
    const before = frame > 0 ? frames.event[frame - 1] : -1;
    const until = frame < this.model.numSteps ? frames.event[frame] : Infinity;
    const places = [];
    for (let place = Math.max(0, this.after(before)); place < this.count && this.number(place) < until; place++) {
      if (DECISIONS.has(this.kind(place).name)) places.push(place);
      if (places.length >= 400) break;
    }
    for (const page of new Set(places.map((place) => Math.floor(place / this.index.page)))) await this.load(page);
    return places.map((place) => ({ number: this.number(place), text: `${this.kind(place).name} ${this.brief(place, 6, ASIDE)}` }));
  }

  // The first place with a greater number.
  after(number) {
    let low = 0;
    let high = this.count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.number(middle) > number) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  // As `show events`: kinds or their beginnings, a request by number or name, steps, a block.
  async select(wanted, isStale) {
    const { index, model } = this;
    const starts = wanted.kind.split(",").map((word) => word.trim()).filter(Boolean);
    const kinds = index.kinds.map(({ name }) => !starts.length || starts.some((start) => name.startsWith(start)));
    const requests = wanted.request === "" ? null : this.requestsCalled(wanted.request);
    const [first, last] = stepsOf(wanted.step);
    const found = [];
    for (let place = 0; place < this.count; place++) {
      if (!kinds[index.kind[place]]) continue;
      const step = index.step[place];
      if (step < first || step > last) continue;
      if (requests && !this.speaksOf(place, requests)) continue;
      found.push(place);
    }
    if (wanted.block === "") return found;
    const block = Number(wanted.block);
    const made = [];
    for (const place of found) {
      if (!this.isLoaded(place)) {
        await this.load(Math.floor(place / index.page));
        if (isStale()) return made;
      }
      if (mentions(this.kind(place).name, this.fields(place), block)) made.push(place);
    }
    return made;
  }

  requestsCalled(text) {
    const names = Object.entries(this.model.doc.names);
    if (/^\d+$/.test(text) && text in this.model.doc.names) return new Set([Number(text)]);
    const exact = names.filter(([, name]) => name === text);
    return new Set((exact.length ? exact : names.filter(([, name]) => name.includes(text))).map(([number]) => Number(number)));
  }

  speaksOf(place, requests) {
    if (requests.has(this.index.request[place])) return true;
    const kind = this.kind(place).name;
    if (kind !== "step.scheduled" && kind !== "slots.mapped") return false;
    const frame = this.model.firstOf.get(this.index.step[place]);
    return frame !== undefined && this.model.scheduled[frame].some((request) => requests.has(request));
  }
}

const isEmpty = (value) => value === null || (Array.isArray(value) && !value.length)
  || (typeof value === "object" && !Array.isArray(value) && !Object.keys(value).length);

function short(value, most) {
  if (Array.isArray(value)) {
    const words = value.slice(0, most + 1).map((one) => short(one, most));
    return value.length > most ? `[${words.slice(0, most - 2).join(", ")}, … ${value.length} in all]` : `[${words.join(", ")}]`;
  }
  if (value !== null && typeof value === "object") {
    return `{${Object.entries(value).map(([key, one]) => `${key}: ${short(one, most)}`).join(", ")}}`;
  }
  return String(value);
}

function stepsOf(text) {
  const match = /^\s*(\d*)\s*(-?)\s*(\d*)\s*$/.exec(text);
  if (!match || (!match[1] && !match[3])) return [-Infinity, Infinity];
  const first = Number(match[1] || 0);
  return [first, match[3] ? Number(match[3]) : match[2] ? Infinity : first];
}

function mentions(kind, fields, block) {
  if (kind === "block.evicted") return fields.block === block;
  if (kind.startsWith("blocks.")) return fields.blocks.includes(block);
  if (kind === "slots.allocated") return [...fields.blocks, ...fields.hit_blocks].some((row) => row.includes(block));
  if (kind === "prefix.looked_up") return fields.blocks.some((row) => row.includes(block));
  return false;
}

class EventsView {
  constructor(app, body) {
    this.app = app;
    this.store = app.events;
    this.places = [];
    this.chosen = -1;
    this.asked = 0;
    const input = (id, label, hint, more = "") => (this[id] = el(`input${more}`, { type: "search", id: `event-${id}`, placeholder: hint,
      "aria-label": label, onchange: () => this.apply() }));
    const kinds = el("datalist", { id: "kinds" }, ["blocks", "slots", "request", "step", "prefix", "attention",
      ...this.store.index.kinds.map(({ name }) => name)].map((value) => el("option", { value })));
    input("kind", "Kinds of events, or their beginnings", "blocks,slots.refused").setAttribute("list", "kinds");
    input("request", "Request by name or number", "name or number");
    input("step", "Step, or first-last", "5 or 5-9", ".short");
    input("block", "Block", "id", ".short");
    input("n", "Event number", "number", ".short");
    this.head = el("p.quiet", { id: "event-count", "aria-live": "polite" });
    this.list = new LongList(25, (place) => this.line(place), "Events", 20);
    this.list.node.addEventListener("keydown", (event) => this.onKey(event));
    this.detail = el("div", { id: "event-detail" });
    body.replaceChildren(el("div.filters", {},
      el("label", { text: "kind" }, this.kind), el("label", { text: "request" }, this.request), el("label", { text: "step" }, this.step),
      el("label", { text: "block" }, this.block), el("label", { text: "go to event" }, this.n),
      el("button", { type: "button", text: "All events", onclick: () => app.go("#events") })), kinds,
    this.head, this.list.node, this.detail);
  }

  draw() {
    this.list.draw();
  }

  apply() {
    const given = new URLSearchParams();
    for (const name of ["kind", "request", "step", "block", "n"]) if (this[name].value.trim()) given.set(name, this[name].value.trim());
    this.app.go(`#events${given.size ? `?${given}` : ""}`);
  }

  async open(given) {
    const asked = ++this.asked;
    const wanted = {};
    for (const name of ["kind", "request", "step", "block", "n"]) {
      wanted[name] = given.get(name) || "";
      this[name].value = wanted[name];
    }
    if (/^\d+$/.test(wanted.request) && wanted.request in this.app.model.doc.names) this.request.value = this.app.model.name(Number(wanted.request));
    this.head.textContent = "looking …";
    const places = await this.store.select(wanted, () => asked !== this.asked);
    if (asked !== this.asked) return;
    this.places = places;
    const all = places.length === this.store.count;
    this.head.textContent = all ? many(this.store.count, "event") : `${places.length.toLocaleString("en")} of ${many(this.store.count, "event")}`;
    this.list.show(places.length);
    this.list.node.scrollTop = 0;
    this.chosen = -1;
    this.detail.replaceChildren();
    if (wanted.n) this.find(Number(wanted.n));
    else this.list.draw();
  }

  find(number) {
    const at = this.store.place(number);
    const line = at < 0 ? -1 : this.places.indexOf(at);
    if (line < 0) this.head.textContent += `; event ${number} is not among them`;
    else this.choose(line);
  }

  line(line) {
    const place = this.places[line];
    const { store } = this;
    const rest = el("span.rest");
    const page = Math.floor(place / store.index.page);
    if (store.isLoaded(place)) rest.textContent = store.brief(place);
    else store.load(page).then(() => this.redraw());
    return el(`div.line${line === this.chosen ? ".on" : ""}`, { onclick: () => this.choose(line), "data-event": store.number(place) },
      el("span.n", { text: store.number(place) }), el("span.s", { text: store.index.step[place], title: "step" }),
      el("span.k", { text: store.kind(place).name }), rest);
  }

  redraw() {
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => { this.waits = false; this.list.draw(); });
  }

  onKey(event) {
    const to = event.key === "ArrowDown" ? this.chosen + 1 : event.key === "ArrowUp" ? this.chosen - 1 : -1;
    if (to < 0 || to >= this.places.length) return;
    event.preventDefault();
    event.stopPropagation();
    this.choose(to);
  }

  async choose(line) {
    this.chosen = line;
    this.list.reveal(line);
    const place = this.places[line];
    const { store, app } = this;
    await store.load(Math.floor(place / store.index.page));
    if (this.chosen !== line) return;
    const fields = store.fields(place);
    const step = store.index.step[place];
    const frame = app.model.firstOf.get(step);
    const shown = Object.entries(fields).map(([key, value]) => [el("dt", { text: key }),
      el("dd.num", { text: typeof value === "object" && value !== null ? JSON.stringify(value) : String(value) })]).flat();
    const request = store.index.request[place];
    this.detail.replaceChildren(el("div.box", {}, el("h3", { text: `Event ${store.number(place)}: ${store.kind(place).name}` }),
      el("dl.facts", { id: "event-fields" }, shown),
      el("p.row", {},
        frame === undefined ? null : el("button", { type: "button", text: `Show the pool at step ${step}`, onclick: () => { app.setFrame(frame); app.go("#pool"); } }),
        app.model.lives.has(request) ? el("button", { type: "button", text: `Request ${app.model.short(request)}`, onclick: () => app.go(`#requests?request=${request}`) }) : null)));
  }
}
