// The figures as they lie in the file, and what follows from them at any step.

const FREE = -2;
const CACHED = -1;

// Base64 of deflated JSON, from a script element that no browser runs.
async function unpack(id) {
  const text = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

// A frame is the pool after a step's schedule; the last one may be the end of the trace.
class Model {
  constructor(doc) {
    this.doc = doc;
    this.numSteps = doc.frames.step.length;
    this.numFrames = this.numSteps + (doc.frames.has_end ? 1 : 0);
    this.light = doc.header.level === "light";
    this.pool = {};
    for (const [name, values] of Object.entries(doc.pool)) {
      this.pool[name] = Array.isArray(values) ? Int32Array.from(values) : values;
    }
    this.numBlocks = doc.pool.num_blocks;
    this.blockSize = doc.engine.block_size || 1;
    this.lives = new Map(doc.requests.map((life) => [life.request, life]));
    this.order = new Map(doc.requests.map((life, place) => [life.request, place]));
    this.#spread();
    this.#keyframes();
    this.firstOf = new Map();
    doc.frames.step.forEach((step, frame) => this.firstOf.set(step, frame));
  }

  // "As in the frame before" and "one each" written out; equal lists stay one list.
  #spread() {
    let last = [];
    const ones = new Map();
    this.scheduled = this.doc.frames.requests.map((given) => (last = given === 0 ? last : given));
    this.tokens = this.doc.frames.num_tokens.map((given, frame) => {
      if (given !== 0) return given;
      const size = this.scheduled[frame].length;
      if (!ones.has(size)) ones.set(size, new Array(size).fill(1));
      return ones.get(size);
    });
    this.admitted = new Map();
    for (const [frame, request, computed] of this.doc.frames.admitted) {
      if (!this.admitted.has(request)) this.admitted.set(request, []);
      this.admitted.get(request).push([frame, computed]);
    }
  }

  // The state of a block is the number of its last change: one array for the whole pool, and a
  // copy of it every so often, so that any frame is a few changes away.
  #keyframes() {
    this.every = Math.max(16, Math.ceil(this.numFrames / 64));
    this.keys = [];
    const now = new Int32Array(this.numBlocks).fill(-1);
    for (let frame = 0; frame < this.numFrames; frame++) {
      this.applyFrame(now, frame);
      if (frame % this.every === 0) this.keys.push(now.slice());
    }
    this.now = new Int32Array(this.numBlocks).fill(-1);
    this.at = -1;
  }

  span(frame) {
    const { starts, block } = this.pool;
    const end = frame + 1 < starts.length ? starts[frame + 1] : block.length;
    return [starts[frame], end];
  }

  applyFrame(state, frame) {
    const [from, to] = this.span(frame);
    const block = this.pool.block;
    for (let i = from; i < to; i++) state[block[i]] = i;
  }

  seek(frame) {
    if (!this.numFrames) return this.now;
    const key = Math.floor(frame / this.every);
    if (frame < this.at || key * this.every > this.at) {
      this.now.set(this.keys[key]);
      this.at = key * this.every;
    }
    while (this.at < frame) this.applyFrame(this.now, ++this.at);
    return this.now;
  }

  // Of one block at the frame that was sought last.
  block(id) {
    const i = this.now[id];
    const p = this.pool;
    if (i < 0) return { id, owner: FREE, count: 0, ref: 0, hash: -1, since: 0, cached: 0 };
    return { id, owner: p.owner[i], count: p.count[i], ref: p.ref[i], hash: p.hash[i],
      since: p.since[i], cached: p.cached[i] };
  }

  changed(frame) {
    const [from, to] = this.span(frame);
    return this.pool.block.subarray(from, to);
  }

  counts() {
    const made = { held: 0, shared: 0, cached: 0, free: 0 };
    for (let id = 1; id < this.numBlocks; id++) {
      const i = this.now[id];
      const owner = i < 0 ? FREE : this.pool.owner[i];
      if (owner === FREE) made.free++;
      else if (owner === CACHED) made.cached++;
      else {
        made.held++;
        if (this.pool.count[i] > 1) made.shared++;
      }
    }
    return made;
  }

  // A request's rows, one for each group, as they are at a frame.
  table(request, frame) {
    const rows = [];
    for (const [when, , group, first, blocks] of this.doc.tables[request] || []) {
      if (when > frame) break;
      while (rows.length <= group) rows.push([]);
      rows[group].length = Math.min(first, rows[group].length);
      for (const block of blocks) rows[group].push(block);
    }
    return rows;
  }

  // Request -> rows of all that hold something at a frame.
  tables(frame) {
    if (this.tablesOf === frame) return this.tablesThen;
    const made = new Map();
    for (const request of Object.keys(this.doc.tables)) {
      const changes = this.doc.tables[request];
      if (changes[0][0] > frame) continue;
      const rows = this.table(request, frame);
      if (rows.some((row) => row.length)) made.set(Number(request), rows);
    }
    this.tablesOf = frame;
    this.tablesThen = made;
    return made;
  }

  ownersOf(id, frame) {
    const found = [];
    for (const [request, rows] of this.tables(frame)) {
      rows.forEach((row, group) => {
        const place = row.indexOf(id);
        if (place >= 0) found.push({ request, group, place });
      });
    }
    return found;
  }

  // Tokens of a request whose KV is planned by the end of a frame.
  computed(request, frame) {
    const known = this.admitted.get(request);
    if (!known) return 0;
    let begun = null;
    for (const one of known) if (one[0] <= frame) begun = one;
    if (!begun) return 0;
    let total = begun[1];
    const last = Math.min(frame, this.numSteps - 1);
    for (let at = begun[0] + 1; at <= last; at++) {
      const place = this.scheduled[at].indexOf(request);
      if (place >= 0) total += this.tokens[at][place];
    }
    return total;
  }

  name(request) {
    if (request === CACHED) return "free, cached";
    if (request === FREE) return "free";
    const known = this.doc.names[request];
    return known === undefined ? `#${request}` : known;
  }

  short(request) {
    const life = this.lives.get(request);
    return life ? life.short : this.name(request);
  }

  stepName(frame) {
    return frame < this.numSteps ? `step ${this.doc.frames.step[frame]}` : "the end";
  }
}

// The raw events: an index of all at once, their fields page by page.
class Events {
  constructor(index) {
    this.index = index;
    this.count = index.count;
    this.pages = new Map();
    this.contiguous = index.number.length <= 1;
  }

  number(place) {
    return this.contiguous ? (this.index.number[0] || 0) + place : this.index.number[place];
  }

  // Where an event stands; -1 when this report does not hold it.
  place(number) {
    if (this.contiguous) {
      const place = number - (this.index.number[0] || 0);
      return place >= 0 && place < this.count ? place : -1;
    }
    let low = 0;
    let high = this.count - 1;
    while (low <= high) {
      const middle = (low + high) >> 1;
      const found = this.index.number[middle];
      if (found === number) return middle;
      if (found < number) low = middle + 1;
      else high = middle - 1;
    }
    return -1;
  }

  kind(place) {
    return this.index.kinds[this.index.kind[place]];
  }

  isLoaded(place) {
    return Array.isArray(this.pages.get(Math.floor(place / this.index.page)));
  }

  async load(page) {
    const known = this.pages.get(page);
    if (known) return known;
    const coming = unpack(`events-${page}`).then((rows) => {
      this.pages.set(page, rows);
      document.getElementById(`events-${page}`).remove();
      return rows;
    });
    this.pages.set(page, coming);
    return coming;
  }

  // Field -> value of an event whose page is loaded.
  fields(place) {
    const rows = this.pages.get(Math.floor(place / this.index.page));
    const values = rows[place % this.index.page];
    const made = {};
    this.kind(place).fields.forEach((field, i) => (made[field] = values[i]));
    return made;
  }
}
