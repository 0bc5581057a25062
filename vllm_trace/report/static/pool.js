// The pool as a grid of blocks, and what happened to it in the step.

class PoolGrid {
  constructor(app, body) {
    this.app = app;
    this.model = app.model;
    this.canvas = el("canvas", { id: "grid", tabindex: "0", role: "img" });
    this.hold = el("div.hold", {}, this.canvas);
    this.head = el("p.quiet", { id: "pool-head" });
    this.counts = el("p", { id: "pool-counts" });
    this.owners = el("ul.owners", { id: "owners" });
    this.happened = el("ol.happened", { id: "happened" });
    this.key = el("div.key");
    const side = el("aside", {},
      el("div.box", {}, el("h3", { text: "Who holds blocks" }), this.counts, this.owners),
      el("div.box", {}, this.title = el("h3"), this.happened));
    const left = el("div", {}, el("div.box", {}, this.head, this.hold, this.key));
    this.history = new History(app);
    left.append(this.history.node);
    if (this.model.light) {
      left.replaceChildren(el("div.box", {}, el("p", { text:
        "This trace was recorded at level light: it says how many blocks were free in each step, and not which ones." }),
        this.counts));
      side.firstChild.remove();
    }
    body.replaceChildren(el("div.cols", {}, left, side));
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => this.leave());
    this.canvas.addEventListener("click", (event) => this.open(this.blockAt(event)));
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
    this.canvas.addEventListener("focus", () => this.focusBlock(this.cursor < 0 ? 0 : this.cursor));
    this.canvas.addEventListener("blur", () => { this.cursor = -1; tip.hide(); this.draw(); });
    this.cursor = -1;
    this.marked = -1;
    this.drawKey();
  }

  layout() {
    const width = Math.max(240, Math.floor(this.hold.clientWidth || 600));
    const blocks = Math.max(1, this.model.numBlocks);
    // A cell is one block, of a size that lets the whole pool be seen; of a huge pool, several.
    this.perCell = Math.ceil(blocks / 120000);
    const cells = Math.ceil(blocks / this.perCell);
    let size = 84;
    const rows = (s) => Math.ceil(cells / Math.max(1, Math.floor(width / s)));
    while (size > 4 && rows(size) * size > Math.max(260, Math.min(innerHeight * 0.5, 460))) size -= size > 24 ? 2 : 1;
    this.size = size;
    this.columns = Math.max(1, Math.floor(width / size));
    // Full tens or powers of two are easier to count along.
    for (const round of cells <= this.columns ? [] : [128, 100, 64, 50, 40, 32, 25, 20, 16, 10, 8]) {
      if (this.columns >= round && rows(width / round) * (width / round) <= 640) {
        this.columns = round;
        break;
      }
    }
    this.columns = Math.min(this.columns, cells);
    this.size = Math.min(84, Math.floor(width / this.columns));
    this.rows = Math.ceil(cells / this.columns);
    Object.assign(this.canvas.dataset, { columns: this.columns, cell: this.size });
  }

  draw() {
    const { model, app } = this;
    this.drawSide();
    if (model.light) return;
    model.seek(app.frame);
    this.layout();
    const { size, columns } = this;
    const context = paper(this.canvas, columns * size, this.rows * size);
    const gap = size > 7 ? Math.max(1, Math.round(size / 16)) : size > 4 ? 1 : 0;
    const cells = Math.ceil(model.numBlocks / this.perCell);
    for (let cell = 0; cell < cells; cell++) {
      const x = (cell % columns) * size;
      const y = Math.floor(cell / columns) * size;
      this.drawCell(context, this.shown(cell), x, y, size - gap);
    }
    if (this.perCell === 1 && size > 5) {
      context.strokeStyle = theme.mark;
      context.lineWidth = size > 20 ? 2.5 : 1.5;
      for (const id of app.frame > 0 ? model.changed(app.frame) : []) this.outline(context, id, gap);
    }
    if (this.cursor >= 0) {
      context.strokeStyle = theme.accent;
      context.lineWidth = 3;
      this.outline(context, this.cursor, gap);
    }
    this.hold.scrollLeft = 0;
    const counts = model.counts();
    this.canvas.setAttribute("aria-label", `The pool at ${model.stepName(app.frame)}: ${counts.held} blocks held, `
      + `${counts.cached} free but cached, ${counts.free} free. Arrow keys go from block to block.`);
    this.head.textContent = this.perCell === 1
      ? `${many(model.numBlocks, "block")} of ${many(model.blockSize, "token")}; block 0 is the null block, which nobody owns`
      : `${many(model.numBlocks, "block")}; a cell is ${this.perCell} of them and shows the first that is held`;
    this.history.draw();
  }

  outline(context, id, gap) {
    const cell = Math.floor(id / this.perCell);
    const x = (cell % this.columns) * this.size;
    const y = Math.floor(cell / this.columns) * this.size;
    const inset = context.lineWidth / 2;
    context.strokeRect(x + inset, y + inset, this.size - gap - 2 * inset, this.size - gap - 2 * inset);
  }

  // The block that stands for a cell.
  shown(cell) {
    const first = cell * this.perCell;
    for (let id = first; id < Math.min(first + this.perCell, this.model.numBlocks); id++) {
      if (this.model.block(id).owner >= 0) return id;
    }
    return first;
  }

  drawCell(context, id, x, y, s) {
    const one = this.model.block(id);
    const dim = this.marked >= 0 && !(one.owner === this.marked || (one.count > 1 && this.isMarked(id)));
    context.globalAlpha = dim ? 0.22 : 1;
    let ink = theme["cached-ink"];
    if (id === 0) {
      context.fillStyle = theme.free;
      context.fillRect(x, y, s, s);
      stripes(context, x, y, s, s, Math.max(4, s / 5), theme.null, 1);
    } else if (one.owner === FREE) {
      context.fillStyle = theme.free;
      context.fillRect(x, y, s, s);
      if (s > 6) {
        context.strokeStyle = theme.line;
        context.lineWidth = 1;
        context.strokeRect(x + 0.5, y + 0.5, s - 1, s - 1);
      }
    } else if (one.owner === CACHED) {
      context.fillStyle = theme.free;
      context.fillRect(x, y, s, s);
      const r = Math.max(1, s * 0.17);
      context.fillStyle = theme["cached-ink"];
      context.beginPath();
      context.arc(x + s / 2, y + s / 2, r, 0, 7);
      context.fill();
      if (s > 6) {
        context.strokeStyle = theme.cached;
        context.lineWidth = 1;
        context.strokeRect(x + 0.5, y + 0.5, s - 1, s - 1);
      }
    } else if (one.count > 1) {
      context.fillStyle = theme.shared;
      context.fillRect(x, y, s, s);
      ink = theme.paper;
    } else {
      fillOwner(context, x, y, s, s, one.owner);
      ink = INKS[one.owner % COLOURS.length];
    }
    if (s >= 26) this.label(context, id, one, x, y, s, ink);
    context.globalAlpha = dim ? 0.22 : 1;
    context.globalAlpha = 1;
  }

  label(context, id, one, x, y, s, ink) {
    if (one.owner === CACHED) ink = theme.quiet;
    const backed = one.owner >= 0 && one.count <= 1 && patternOf(one.owner) > 0;
    context.textBaseline = "top";
    context.textAlign = "left";
    context.font = `${Math.round(Math.min(14, s * 0.3))}px system-ui, sans-serif`;
    const text = (words, tx, ty, width) => {
      if (backed) {
        context.fillStyle = colourOf(one.owner);
        context.fillRect(tx - 1, ty - 1, Math.min(width, context.measureText(words).width) + 2, Math.min(15, s * 0.34));
      }
      context.fillStyle = ink;
      context.fillText(words, tx, ty, width);
    };
    text(id === 0 ? "null" : String(id), x + 4, y + 4, s - 8);
    if (s < 40 || one.owner < 0) return;
    context.font = `${s > 64 ? 600 : 500} ${Math.round(Math.min(15, s * 0.22))}px system-ui, sans-serif`;
    const words = one.count > 1 ? `×${one.count}` : this.model.short(one.owner);
    text(words.length > 8 ? `${words.slice(0, 7)}…` : words, x + 4, y + s - Math.min(20, s * 0.4), s - 8);
  }

  isMarked(id) {
    const rows = this.model.tables(this.app.frame).get(this.marked);
    return Boolean(rows) && rows.some((row) => row.includes(id));
  }

  drawKey() {
    const sample = (draw) => {
      const canvas = el("canvas", { "aria-hidden": "true" });
      draw(paper(canvas, 13, 13));
      return canvas;
    };
    const items = [
      ["held, in its request's colour", (c) => fillOwner(c, 0, 0, 13, 13, 0)],
      ["held by several", (c) => { c.fillStyle = theme.shared; c.fillRect(0, 0, 13, 13); }],
      ["free, but cached", (c) => { c.fillStyle = theme["cached-ink"]; c.beginPath(); c.arc(6.5, 6.5, 2.5, 0, 7); c.fill();
        c.strokeStyle = theme.cached; c.strokeRect(0.5, 0.5, 12, 12); }],
      ["free", (c) => { c.strokeStyle = theme.line; c.strokeRect(0.5, 0.5, 12, 12); }],
      ["changed by this step", (c) => { c.strokeStyle = theme.mark; c.lineWidth = 2; c.strokeRect(1, 1, 11, 11); }],
    ];
    this.key.replaceChildren(...items.map(([text, draw]) => el("span", {}, sample(draw), text)));
  }

  drawSide() {
    const { model, app } = this;
    const frame = app.frame;
    this.title.textContent = frame < model.numSteps ? `What led to step ${model.doc.frames.step[frame]}` : "After the last step";
    if (model.light) {
      const free = model.doc.steps.num_free_blocks[frame];
      this.counts.textContent = free === undefined ? "" : `${free} of ${model.numBlocks - 1} blocks are free at ${model.stepName(frame)}`;
    } else {
      model.seek(frame);
      const counts = model.counts();
      this.counts.textContent = `${counts.held} held`
        + (counts.shared ? ` (${counts.shared} by several)` : "")
        + `, ${counts.cached + counts.free} free (${counts.cached} of them cached)`;
      const held = [...model.tables(frame)].map(([request, rows]) => [request,
        rows.reduce((sum, row) => sum + row.filter((id) => id > 0).length, 0)]);
      held.sort((a, b) => b[1] - a[1] || a[0] - b[0]);
      this.owners.replaceChildren(...held.slice(0, 300).map(([request, blocks]) => el("li", {
        onmouseenter: () => this.mark(request), onmouseleave: () => this.mark(-1) },
        swatch(request),
        el("button.link.ell", { type: "button", title: model.name(request), text: model.short(request),
          onclick: () => app.go(`#requests?request=${request}`), onfocus: () => this.mark(request), onblur: () => this.mark(-1) }),
        el("span.num", { text: many(blocks, "block") }))));
      if (!held.length) this.owners.replaceChildren(el("li.quiet", { text: "nobody" }));
    }
    app.events.ofFrame(frame).then((told) => {
      if (app.frame !== frame) return;
      const some = told.slice(0, 14);
      this.happened.replaceChildren(...some.map(({ number, text }) => el("li", {}, link(String(number), `#events?n=${number}`), ` ${text}`)));
      if (!told.length) this.happened.replaceChildren(el("li.quiet", { text: "no decision about blocks" }));
      const rest = told.length - some.length;
      if (frame < model.numSteps) {
        const step = model.doc.frames.step[frame];
        this.happened.append(el("li", {}, link(rest > 0 ? `${rest} more, and all events of step ${step}` : `All events of step ${step}`,
          `#events?step=${step}`)));
      }
    });
  }

  mark(request) {
    this.marked = request;
    this.draw();
  }

  blockAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / this.size);
    const row = Math.floor((event.clientY - box.top) / this.size);
    const cell = row * this.columns + column;
    if (column < 0 || column >= this.columns || row < 0 || cell * this.perCell >= this.model.numBlocks) return -1;
    return this.shown(cell);
  }

  hover(event) {
    const id = this.blockAt(event);
    if (id < 0) return this.leave();
    this.tell(id, event.clientX, event.clientY);
  }

  leave() {
    tip.hide();
  }

  tell(id, x, y) {
    const [title, rows] = this.describe(id);
    tip.show(x, y, title, rows);
  }

  describe(id) {
    const { model, app } = this;
    model.seek(app.frame);
    if (id === 0) return ["Block 0", [["owner", "nobody: the null block stands for what a sliding window has passed"]]];
    const one = model.block(id);
    const owners = model.ownersOf(id, app.frame);
    const told = owners.slice(0, 8).map((o) => `${model.short(o.request)} (place ${o.place}${o.group ? `, group ${o.group}` : ""})`);
    if (owners.length > 8) told.push(`… ${owners.length} in all`);
    const who = owners.length ? told.join(", ") : one.owner === CACHED ? "none: free, but cached" : "none: free";
    const event = (number) => {
      const place = app.events.place(number);
      return place < 0 ? `event ${number}` : `event ${number} (${app.events.kind(place).name})`;
    };
    return [`Block ${id}`, [
      [owners.length > 1 ? "owners" : "owner", who],
      ["references", String(one.ref)],
      ["hash", one.hash >= 0 ? model.doc.hashes[one.hash] : "none"],
      one.hash >= 0 && one.cached ? ["cached by", event(one.cached)] : null,
      ["since", one.since ? event(one.since) : "the beginning"],
    ]];
  }

  focusBlock(id) {
    this.cursor = Math.max(0, Math.min(this.model.numBlocks - 1, id));
    this.draw();
    const box = this.canvas.getBoundingClientRect();
    const cell = Math.floor(this.cursor / this.perCell);
    this.tell(this.cursor, box.left + (cell % this.columns + 0.5) * this.size, box.top + (Math.floor(cell / this.columns) + 0.5) * this.size);
    const [title, rows] = this.describe(this.cursor);
    say(`${title}: ${rows.filter(Boolean).map(([name, value]) => `${name} ${value}`).join("; ")}`);
  }

  onKey(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    if (event.key in moves && !event.shiftKey) {
      this.focusBlock(this.cursor + moves[event.key] * this.perCell);
    } else if (event.key === "Enter") {
      this.open(this.cursor);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  open(id) {
    if (id > 0) this.app.go(`#events?block=${id}`);
  }
}
