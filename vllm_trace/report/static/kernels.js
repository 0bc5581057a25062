// Which attention backend and kernel ran, in which variant, and how long.

class Kernels {
  constructor(app, body) {
    this.app = app;
    this.model = app.model;
    const doc = this.model.doc;
    const parts = [];
    if (doc.kernels.length) {
      const total = doc.kernels.reduce((sum, one) => sum + one.total_ns, 0) || 1;
      const heads = ["attention kernel", "variant", "steps", "calls", "total", "a call", "share", "clock"];
      parts.push(el("div.box", {}, el("div.wide", {}, el("table", { id: "kernel-table" },
        el("thead", {}, el("tr", {}, heads.map((text, i) => el(i > 1 && i < 7 ? "th.r" : "th", { text })))),
        el("tbody", {}, doc.kernels.map((one) => el("tr", {},
          el("td", {}, el("code", { text: one.kernel })), el("td", { text: one.variant || "–" }),
          el("td.r", { text: one.num_steps }), el("td.r", { text: one.num_calls }), el("td.r", { text: duration(one.total_ns) }),
          el("td.r", { text: duration(one.total_ns / Math.max(1, one.num_calls)) }),
          el("td.r", { text: `${((100 * one.total_ns) / total).toFixed(1)} %` }), el("td", { text: one.clock })))))),
      el("p", {}, link("Their events", "#events?kind=attention"))));
      this.canvas = el("canvas", { id: "kernel-chart", role: "img", "aria-label": "Attention time of each step by variant; a click goes to the step" });
      this.key = el("div.key", {}, doc.frames.variants.map(([kernel, variant], place) => el("span", {}, swatch(place), `${kernel} ${variant}`)));
      this.numbers = el("div", { id: "numbers" });
      parts.push(el("div.box", {}, el("h3", { text: "Attention time of each step" }), this.canvas, this.key, this.numbers));
      this.canvas.addEventListener("click", (event) => {
        const frame = this.frameAt(event);
        if (frame >= 0) app.setFrame(frame);
      });
      this.canvas.addEventListener("mousemove", (event) => this.hover(event));
      this.canvas.addEventListener("mouseleave", () => tip.hide());
      if (doc.frames.layers.length) parts.push(this.layers(doc.frames.layers));
    } else parts.push(el("div.box", {}, el("p", { text: "No attention call was recorded." })));
    if (doc.backends.length) parts.push(el("div.box", {}, el("h3", { text: "Why this backend" }), doc.backends.map((one) => this.backend(one))));
    if (doc.groups.length) parts.push(this.groups(doc.groups));
    body.replaceChildren(...parts);
  }

  backend(one) {
    const rejected = one.candidates.filter(([name]) => name !== one.backend);
    return el("div", {}, el("p", {}, el("b", { text: one.backend }), ` (${one.impl}) for ${many(one.layers.length, "layer")}`),
      rejected.length ? el("table", {}, el("tbody", {}, rejected.map(([name, reason]) => el("tr", {}, el("td", { text: name }),
        el("td", { text: reason || "came after it" })))))
        : el("p.quiet", { text: "There was no other candidate." }),
      el("p.quiet", { text: Object.entries(one.settings).map(([key, value]) => `${key} ${value}`).join(" · ") }));
  }

  groups(groups) {
    return el("div.box", {}, el("h3", { text: "KV-cache groups" }), el("div.wide", {}, el("table", {},
      el("thead", {}, el("tr", {}, ["group", "kind", "layers", "tokens a block", "window", "bytes a page"].map((text) => el("th", { text })))),
      el("tbody", {}, groups.map((one, place) => el("tr", {}, [place, one.kind, one.num_layers, one.block_size, one.sliding_window || "none",
        one.page_size_bytes].map((value) => el("td", { text: value }))))))));
  }

  layers(rows) {
    const most = Math.max(...rows.map(([, , ns]) => ns)) || 1;
    return el("div.box", {}, el("h3", { text: "By layer" }), el("div.wide", {}, el("table", {}, el("tbody", {}, rows.slice(0, 200).map(([layer, calls, ns]) =>
      el("tr", {}, el("td", { text: `layer ${layer}` }), el("td.r", { text: many(calls, "call") }), el("td.r", { text: duration(ns) }),
        el("td", { style: { width: "50%" } }, el("span.layer", {}, el("i", { style: { width: `${(100 * ns) / most}%` } })))))))));
  }

  frameAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const frame = Math.floor(((event.clientX - box.left) / this.width) * this.model.numSteps);
    return frame >= 0 && frame < this.model.numSteps ? frame : -1;
  }

  hover(event) {
    const frame = this.frameAt(event);
    const one = frame >= 0 ? this.model.doc.frames.kernels[frame] : null;
    if (!one) return tip.hide();
    const [kernel, variant] = this.model.doc.frames.variants[one[1]];
    tip.show(event.clientX, event.clientY, this.model.stepName(frame), [["kernel", kernel], ["variant", variant || "–"],
      ["time", `${duration(one[3])} in ${many(one[2], "call")}`], ["told by", `event ${one[0]}`]]);
  }

  draw() {
    if (!this.canvas) return;
    const { frames } = this.model.doc;
    this.width = Math.max(240, this.canvas.parentNode.clientWidth - 32);
    const height = 120;
    const context = paper(this.canvas, this.width, height);
    const values = frames.kernels;
    // One slow first step must not flatten all others: the scale ends at what 99 of 100 stay under.
    const sorted = values.filter(Boolean).map((one) => one[3]).sort((a, b) => a - b);
    const most = (sorted[Math.floor(sorted.length * 0.99)] || 1) * 1.15;
    const columns = Math.min(values.length, Math.floor(this.width));
    const w = this.width / Math.max(1, columns);
    for (let column = 0; column < columns; column++) {
      const first = Math.floor((column * values.length) / columns);
      const last = Math.max(first + 1, Math.floor(((column + 1) * values.length) / columns));
      let best = null;
      for (let frame = first; frame < last; frame++) if (values[frame] && (!best || values[frame][3] > best[3])) best = values[frame];
      if (!best) continue;
      const h = Math.min(1, best[3] / most) * (height - 16);
      fillOwner(context, column * w, height - h, Math.max(1, w - (w > 4 ? 1 : 0)), h, best[1]);
      if (best[3] > most) {
        context.fillStyle = theme.bad;
        context.fillRect(column * w, 12, Math.max(2, w - 1), 3);
      }
    }
    context.fillStyle = theme.quiet;
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "top";
    context.fillText(`up to ${duration(most)}`, 2, 0);
    const x = ((this.app.frame + 0.5) / Math.max(1, values.length)) * this.width;
    context.fillStyle = theme.mark;
    context.fillRect(x - 1, 0, 2, height);
    const numbers = frames.numbers[this.app.frame];
    const one = values[this.app.frame];
    this.numbers.replaceChildren(
      el("h3", { text: `The numbers that the variant was chosen from, at ${this.model.stepName(this.app.frame)}` }),
      numbers ? el("p", {}, el("code", { text: Object.entries(numbers).map(([key, value]) => `${key}=${value}`).join("  ") })) : el("p.quiet", { text: "not recorded" }),
      one ? el("p", {}, `${duration(one[3])} in ${many(one[2], "call")}, `, eventLink(one[0])) : null);
  }
}
