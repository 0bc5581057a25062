// The requests: a life line each, and the table of one of them at the slider's step.

class Requests {
  constructor(app, body) {
    this.app = app;
    this.model = app.model;
    this.chosen = this.model.doc.requests.length ? this.model.doc.requests[0].request : -1;
    this.shown = this.model.doc.requests;
    this.search = el("input", { type: "search", id: "request-search", placeholder: "part of a name",
      oninput: () => this.filter(), "aria-label": "Search requests by name" });
    this.sort = el("select", { id: "request-sort", "aria-label": "Order of the requests", onchange: () => this.filter() },
      [["request", "as they came"], ["num_preemptions", "most preempted"], ["num_hit_tokens", "most hit"],
        ["max_context", "longest"], ["wait", "waited longest"]].map(([value, text]) => el("option", { value, text })));
    this.list = new LongList(26, (place) => this.line(place), "Requests", 12);
    this.detail = el("div", { id: "request-detail" });
    const key = el("div.key", {}, ["waiting", "prefill", "decode", "preempted"].map((what) => {
      const mark = el("i", { class: what });
      if (what === "prefill") mark.style.background = "var(--forward)";
      if (what === "decode") mark.style.background = "var(--sched)";
      return el("span", {}, mark, what);
    }));
    body.replaceChildren(
      el("div.filters", {}, el("label", { text: "name" }, this.search), el("label", { text: "order" }, this.sort)),
      el("div.box.req", {},
        el("div.head", {}, el("span.name", { text: "request" }), ...[["prompt", ""], ["hit", ".less"], ["out", ""], ["pre", ".less"]]
          .map(([text, less]) => el(`span.c${less}`, { text })), el("span.e", { text: "end" }), el("span", { text: "life, by steps" })),
        this.list.node, key),
      this.detail);
    this.list.node.addEventListener("keydown", (event) => this.onKey(event));
    this.filter();
  }

  filter() {
    const words = this.search.value.toLowerCase();
    const by = this.sort.value;
    const value = (life) => (by === "wait" ? life.first_scheduled_ns - life.arrived_ns : life[by]);
    this.shown = this.model.doc.requests.filter((life) => life.name.toLowerCase().includes(words));
    if (by !== "request") this.shown = [...this.shown].sort((a, b) => value(b) - value(a));
    this.list.show(this.shown.length);
  }

  line(place) {
    const life = this.shown[place];
    const { model, app } = this;
    const frames = Math.max(1, model.numFrames);
    const spans = model.doc.frames.spans[life.request] || [];
    const bars = spans.map(([what, first, last]) => el("i", { class: model.doc.spans[what], style: {
      left: `${(100 * first) / frames}%`, width: `${(100 * (last - first + 1)) / frames}%` } }));
    bars.push(el("b", { style: { left: `${(100 * (app.frame + 0.5)) / frames}%` } }));
    return el("div.line", { class: `line${life.request === this.chosen ? " on" : ""}`, "data-request": life.request,
      onclick: () => this.choose(life.request), title: life.name },
    el("span.name", {}, swatch(life.request), el("span.ell", { text: life.short })),
    el("span.c", { text: life.num_prompt_tokens }),
    el("span.c.less", { text: life.num_hit_tokens + life.num_resume_hit_tokens || "–" }),
    el("span.c", { text: life.num_output_tokens }),
    el("span.c.less", { text: life.num_preemptions || "–" }),
    el("span.e", { text: life.reason || "–" }),
    el("span.life", {}, bars));
  }

  onKey(event) {
    const place = this.shown.findIndex((life) => life.request === this.chosen);
    const next = event.key === "ArrowDown" ? place + 1 : event.key === "ArrowUp" ? place - 1 : -1;
    if (next < 0 || next >= this.shown.length) return;
    event.preventDefault();
    event.stopPropagation();
    this.choose(this.shown[next].request);
    this.list.reveal(next);
  }

  choose(request) {
    this.chosen = request;
    this.draw();
    say(`Request ${this.model.name(request)}`);
  }

  reveal(request) {
    if (!this.model.lives.has(request)) return;
    this.search.value = "";
    this.filter();
    this.choose(request);
    this.list.reveal(this.shown.findIndex((life) => life.request === request));
  }

  draw() {
    this.list.draw();
    const life = this.model.lives.get(this.chosen);
    if (!life) return this.detail.replaceChildren(el("p.quiet", { text: "No request in this trace." }));
    this.detail.replaceChildren(el("div.cols", {}, this.tableBox(life), this.factsBox(life)));
  }

  tableBox(life) {
    const { model, app } = this;
    const box = el("div.box", { id: "table-box" }, el("h3", { text: `Logical → physical at ${model.stepName(app.frame)}: ${life.short}` }));
    if (model.light) {
      box.append(el("p.quiet", { text: "Block tables are not recorded at level light." }));
      return box;
    }
    model.seek(app.frame);
    const rows = model.table(life.request, app.frame);
    const computed = model.computed(life.request, app.frame);
    if (!rows.some((row) => row.length)) {
      box.append(el("p.quiet", { text: this.whyEmpty(life) }));
    }
    rows.forEach((row, group) => {
      if (!row.length) return;
      const size = model.doc.groups[group] ? model.doc.groups[group].block_size : model.blockSize;
      if (rows.length > 1) box.append(el("h3", { text: `Group ${group}: ${model.doc.groups[group].kind}` }));
      box.append(el("div.map", { "data-group": group }, row.slice(0, 2000).map((block, place) => this.entry(life, block, place, size, computed))));
      if (row.length > 2000) box.append(el("p.quiet", { text: `… ${row.length} blocks in all` }));
    });
    if (rows.some((row) => row.length)) {
      box.append(el("p.quiet", { text: `${many(computed, "token")} computed or planned by the end of this step. The bar is how full a block is; `
        + "a dark one stands in other tables too." }));
    }
    const tokens = model.doc.tokens;
    if (tokens) {
      box.append(el("h3", { text: "Token ids" }), el("pre", { text: `prompt ${(tokens.prompts[life.request] || []).join(" ")}\noutput `
        + `${(tokens.outputs[life.request] || []).join(" ")}` }));
    }
    return box;
  }

  whyEmpty(life) {
    const spans = this.model.doc.frames.spans[life.request] || [];
    const now = spans.find(([, first, last]) => first <= this.app.frame && this.app.frame <= last);
    if (now) return `It holds no block: it is ${this.model.doc.spans[now[0]]}.`;
    const began = spans.length ? spans[0][1] : Infinity;
    return this.app.frame < began ? "It holds no block: it has not arrived yet." : "It holds no block: it has ended.";
  }

  entry(life, block, place, size, computed) {
    const { model, app } = this;
    const filled = Math.max(0, Math.min(1, (computed - place * size) / size));
    const one = model.block(block);
    const isNull = block === 0;
    const bar = el("i", { style: { width: `${100 * filled}%`, background: one.count > 1 ? theme.shared : colourOf(life.request) } });
    const from = place * size;
    return el("button", { type: "button", class: isNull ? "null" : "", "data-place": place, "data-block": block,
      "aria-label": `logical block ${place} is physical block ${isNull ? "null" : block}${one.count > 1 ? `, in ${one.count} tables` : ""}`,
      title: isNull ? "the null block: the window has passed" : `tokens ${from} to ${from + size - 1}, slots ${block * size} to ${block * size + size - 1}`
        + (one.count > 1 ? `, in ${one.count} tables` : ""),
      onclick: () => (isNull ? null : app.go(`#events?block=${block}`)) },
    el("span", { text: `${place} →` }), el("b", { text: isNull ? "null" : block }), bar);
  }

  factsBox(life) {
    const { app, model } = this;
    const frame = (step) => (model.firstOf.has(step)
      ? el("button.link", { type: "button", text: `step ${step}`, onclick: () => app.setFrame(model.firstOf.get(step)) }) : `step ${step}`);
    const facts = [
      ["name", life.name],
      ["prompt", many(life.num_prompt_tokens, "token")],
      ["from the cache", life.num_hit_tokens + life.num_resume_hit_tokens
        ? `${many(life.num_hit_tokens, "token")}${life.num_resume_hit_tokens ? `, and ${life.num_resume_hit_tokens} when resumed` : ""}` : "nothing"],
      ["output", `${many(life.num_output_tokens, "token")}${life.reason ? `, ended by ${life.reason}` : ", not finished"}`],
      ["waited", life.first_scheduled_ns ? duration(life.first_scheduled_ns - life.arrived_ns) : "never scheduled"],
      ["ran", life.first_step ? el("span", {}, frame(life.first_step), " to ", frame(life.last_step), `, in ${many(life.num_steps, "step")}`) : "–"],
      ["prefill", many(life.num_chunks, "chunk")],
      ["preempted", life.num_preemptions ? many(life.num_preemptions, "time") : "never"],
      ["refused", life.num_refusals ? many(life.num_refusals, "time") : "never"],
      ["longest table", life.mapping || "none"],
      life.lora ? ["LoRA", life.lora] : null,
      life.salted ? ["cache salt", "yes: it shares with nobody of another salt"] : null,
    ].filter(Boolean);
    const box = el("aside.box", {}, el("h3", { text: "Its life" }),
      el("dl.facts", { id: "facts" }, facts.map(([name, value]) => [el("dt", { text: name }), el("dd", {}, value)]).flat()),
      el("p", {}, link("Its events", `#events?request=${life.request}`)));
    if (life.lookups.length) {
      box.append(el("h3", { text: "What the prefix cache had" }), el("ol.happened", {}, life.lookups.slice(-8).map(([number, expected, hit]) =>
        el("li", {}, link(String(number), `#events?n=${number}`), ` ${hit} of ${many(expected, "token")}`))));
    }
    return box;
  }
}
