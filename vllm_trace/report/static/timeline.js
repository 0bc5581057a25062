// The stages of every step by the clock, to zoom into.

const LANES = [["schedule", "sched", "schedule"], ["execute", "exec", "worker"], ["forward", "forward", "forward"],
  ["sample", "sample", "sample"], ["postprocess", "post", "post"]];

class Timeline {
  constructor(app, body) {
    this.app = app;
    this.model = app.model;
    const stages = this.model.doc.frames.stages;
    this.start = Infinity;
    this.end = 0;
    for (const rows of Object.values(stages)) {
      for (const one of rows) {
        if (!one) continue;
        this.start = Math.min(this.start, one[1]);
        this.end = Math.max(this.end, one[1] + one[2]);
      }
    }
    if (!(this.end > this.start)) {
      body.replaceChildren(el("p.quiet", { text: "This trace holds no times of steps." }));
      this.draw = () => {};
      return;
    }
    this.from = this.start;
    this.to = this.end;
    this.canvas = el("canvas", { id: "time", tabindex: "0", role: "img",
      "aria-label": "Stages of the steps by time. Plus and minus zoom, A and D move, Enter chooses the step in the middle." });
    this.span = el("span.quiet", { id: "time-span" });
    this.detail = el("div", { id: "step-detail" });
    const button = (text, label, act) => el("button", { type: "button", text, "aria-label": label, onclick: act });
    body.replaceChildren(el("div.box", {},
      el("div.row", {}, button("+", "Zoom in", () => this.zoom(0.5)), button("−", "Zoom out", () => this.zoom(2)),
        button("All", "Show the whole trace", () => this.show(this.start, this.end)),
        button("This step", "Zoom to the step of the slider", () => this.showStep()), this.span),
      el("div", { style: { height: ".6rem" } }), this.canvas,
      el("div.key", {}, LANES.map(([, colour, text]) => el("span", {}, el("i", { style: { background: `var(--${colour})` } }), text)))),
    this.detail);
    this.canvas.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    this.canvas.addEventListener("pointerdown", (event) => this.grab(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    this.canvas.addEventListener("pointerup", (event) => this.release(event));
    this.canvas.addEventListener("mouseleave", () => tip.hide());
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  show(from, to) {
    const least = 2000;
    const size = Math.max(least, Math.min(this.end - this.start, to - from));
    this.from = Math.max(this.start, Math.min(from, this.end - size));
    this.to = this.from + size;
    this.draw();
  }

  zoom(factor, centre = (this.from + this.to) / 2) {
    this.show(centre - (centre - this.from) * factor, centre + (this.to - centre) * factor);
  }

  showStep() {
    const [from, to] = this.bounds(Math.min(this.app.frame, this.model.numSteps - 1));
    if (to > from) this.show(from - (to - from) * 0.1, to + (to - from) * 0.1);
  }

  bounds(frame) {
    let from = Infinity;
    let to = 0;
    for (const rows of Object.values(this.model.doc.frames.stages)) {
      const one = rows[frame];
      if (!one) continue;
      from = Math.min(from, one[1]);
      to = Math.max(to, one[1] + one[2]);
    }
    return [from, to];
  }

  timeAt(x) {
    return this.from + ((x - this.left) / (this.width - this.left)) * (this.to - this.from);
  }

  xOf(time) {
    return this.left + ((time - this.from) / (this.to - this.from)) * (this.width - this.left);
  }

  onWheel(event) {
    event.preventDefault();
    const x = event.clientX - this.canvas.getBoundingClientRect().left;
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      const by = (event.deltaX / this.width) * (this.to - this.from);
      this.show(this.from + by, this.to + by);
    } else this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.timeAt(x));
  }

  grab(event) {
    this.held = { x: event.clientX, from: this.from, to: this.to, moved: false };
    this.canvas.setPointerCapture(event.pointerId);
  }

  move(event) {
    if (this.held) {
      const by = ((event.clientX - this.held.x) / (this.width - this.left)) * (this.held.to - this.held.from);
      if (Math.abs(event.clientX - this.held.x) > 3) this.held.moved = true;
      if (this.held.moved) this.show(this.held.from - by, this.held.to - by);
      return;
    }
    const found = this.find(event);
    if (!found) return tip.hide();
    const { frame, stage, one } = found;
    const doc = this.model.doc;
    tip.show(event.clientX, event.clientY, `${this.model.stepName(frame)}, ${stage}`, [
      ["took", duration(one[2])], ["began", `${duration(one[1] - this.start)} after the first step`],
      ["ran", `${many(this.model.scheduled[frame].length, "request")}, ${doc.steps.num_prefill_tokens[frame]} prefill and ${doc.steps.num_decode_tokens[frame]} decode tokens`],
      ["told by", `event ${one[0]}`],
    ]);
  }

  release(event) {
    const held = this.held;
    this.held = null;
    if (held && !held.moved) {
      const found = this.find(event) || this.nearest(event);
      if (found) this.app.setFrame(found.frame);
    }
  }

  // The stage under the pointer.
  find(event) {
    const box = this.canvas.getBoundingClientRect();
    const lane = LANES[Math.floor((event.clientY - box.top - this.top) / this.lane)];
    const time = this.timeAt(event.clientX - box.left);
    if (!lane || event.clientY - box.top < this.top) return null;
    const slack = ((this.to - this.from) / this.width) * 2;
    const rows = this.model.doc.frames.stages[lane[0]];
    let best = null;
    for (let frame = 0; frame < rows.length; frame++) {
      const one = rows[frame];
      if (!one || time < one[1] - slack || time > one[1] + one[2] + slack) continue;
      const away = Math.abs(time - (one[1] + one[2] / 2));
      if (!best || away < best.away) best = { frame, stage: lane[2], one, away };
    }
    return best;
  }

  nearest(event) {
    const time = this.timeAt(event.clientX - this.canvas.getBoundingClientRect().left);
    let best = null;
    this.model.doc.frames.stages.schedule.forEach((one, frame) => {
      if (one && (!best || Math.abs(one[1] - time) < best.away)) best = { frame, away: Math.abs(one[1] - time) };
    });
    return best;
  }

  onKey(event) {
    const size = this.to - this.from;
    if (event.key === "+" || event.key === "=") this.zoom(0.5);
    else if (event.key === "-") this.zoom(2);
    else if (event.key === "0") this.show(this.start, this.end);
    else if (event.key === "a") this.show(this.from - size / 4, this.to - size / 4);
    else if (event.key === "d") this.show(this.from + size / 4, this.to + size / 4);
    else if (event.key === "Enter") this.app.setFrame(this.middle());
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  middle() {
    const time = (this.from + this.to) / 2;
    let best = 0;
    this.model.doc.frames.stages.schedule.forEach((one, frame) => { if (one && one[1] <= time) best = frame; });
    return best;
  }

  draw() {
    const { model } = this;
    const doc = model.doc;
    this.width = Math.max(260, this.canvas.parentNode.clientWidth - 32);
    this.left = 66;
    this.top = 20;
    this.lane = 26;
    const tokensTop = this.top + LANES.length * this.lane + 12;
    const tokensHeight = 70;
    const queueTop = tokensTop + tokensHeight + 14;
    const queueHeight = 54;
    const height = queueTop + queueHeight + 4;
    const context = paper(this.canvas, this.width, height);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    this.axis(context, height);
    const [cursorFrom, cursorTo] = this.bounds(Math.min(this.app.frame, model.numSteps - 1));
    if (cursorTo > cursorFrom) {
      const x = this.xOf(cursorFrom);
      context.globalAlpha = 0.16;
      context.fillStyle = theme.mark;
      context.fillRect(Math.max(this.left, x), 0, Math.max(2, this.xOf(cursorTo) - Math.max(this.left, x)), height);
      context.globalAlpha = 1;
    }
    LANES.forEach(([stage, colour, text], place) => this.drawLane(context, stage, theme[colour], text, this.top + place * this.lane));
    this.drawTokens(context, tokensTop, tokensHeight);
    this.drawQueue(context, queueTop, queueHeight);
    this.span.textContent = `${duration(this.to - this.from)} of ${duration(this.end - this.start)}; scroll or + − to zoom, drag to move`;
    this.drawDetail(doc);
  }

  axis(context, height) {
    const size = this.to - this.from;
    const rough = size / Math.max(2, (this.width - this.left) / 110);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
    context.fillStyle = theme.quiet;
    context.strokeStyle = theme.faint;
    context.lineWidth = 1;
    context.textAlign = "center";
    for (let time = Math.ceil((this.from - this.start) / step) * step; time <= this.to - this.start; time += step) {
      const x = Math.round(this.xOf(time + this.start)) + 0.5;
      context.beginPath();
      context.moveTo(x, 16);
      context.lineTo(x, height);
      context.stroke();
      if (x > this.left + 16 && x < this.width - 24) context.fillText(time ? duration(time) : "0", x, 8);
    }
  }

  clip(context, y, h, draw) {
    context.save();
    context.beginPath();
    context.rect(this.left, y, this.width - this.left, h);
    context.clip();
    draw();
    context.restore();
  }

  drawLane(context, stage, colour, text, y) {
    context.fillStyle = theme.quiet;
    context.textAlign = "left";
    context.fillText(text, 0, y + this.lane / 2);
    const rows = this.model.doc.frames.stages[stage];
    this.clip(context, y, this.lane, () => {
      context.fillStyle = colour;
      let filled = -1;
      for (const one of rows) {
        if (!one || one[1] + one[2] < this.from || one[1] > this.to) continue;
        const x = this.xOf(one[1]);
        const right = this.xOf(one[1] + one[2]);
        // Where several steps fall on one pixel, one stroke stands for them.
        if (right <= filled) continue;
        context.fillRect(x, y + 3, Math.max(1, right - x), this.lane - 6);
        filled = Math.max(right, x + 0.5);
      }
      if ((this.to - this.from) / (this.width - this.left) < 4e4) this.labelSteps(context, stage, rows, y);
    });
  }

  labelSteps(context, stage, rows, y) {
    if (stage !== "forward" && stage !== "execute") return;
    context.fillStyle = stage === "forward" ? "#10131a" : theme.ink;
    rows.forEach((one, frame) => {
      if (!one || one[1] + one[2] < this.from || one[1] > this.to) return;
      const x = this.xOf(one[1]);
      if (this.xOf(one[1] + one[2]) - x > 70) {
        context.fillText(stage === "forward" ? duration(one[2]) : `step ${this.model.doc.frames.step[frame]}`, Math.max(x, this.left) + 4, y + this.lane / 2);
      }
    });
  }

  // Value of each step over the time from its schedule to the next one's.
  eachStep(draw) {
    const starts = this.model.doc.frames.stages.schedule;
    for (let frame = 0; frame < starts.length; frame++) {
      const one = starts[frame];
      const next = starts[frame + 1];
      const until = next ? next[1] : this.end;
      if (!one || until < this.from || one[1] > this.to) continue;
      draw(frame, this.xOf(one[1]), this.xOf(until));
    }
  }

  drawTokens(context, y, height) {
    const { num_prefill_tokens: prefill, num_decode_tokens: decode } = this.model.doc.steps;
    let most = 1;
    prefill.forEach((count, frame) => { most = Math.max(most, count + decode[frame]); });
    this.title(context, "tokens", `max ${most}`, y, height);
    this.clip(context, y, height, () => this.eachStep((frame, x, right) => {
      const w = Math.max(1, right - x - (right - x > 4 ? 1 : 0));
      const d = (decode[frame] / most) * height;
      const p = (prefill[frame] / most) * height;
      context.fillStyle = theme.sched;
      context.fillRect(x, y + height - d, w, d);
      context.fillStyle = theme.forward;
      context.fillRect(x, y + height - d - p, w, p);
    }));
  }

  drawQueue(context, y, height) {
    const { num_running: running, num_waiting: waiting } = this.model.doc.steps;
    let most = 1;
    running.forEach((count, frame) => { most = Math.max(most, count, waiting[frame]); });
    this.title(context, "queues", `max ${most}`, y, height);
    this.clip(context, y - 2, height + 4, () => {
      for (const [values, colour, dash] of [[running, theme.sample, []], [waiting, theme.bad, [4, 3]]]) {
        context.strokeStyle = colour;
        context.lineWidth = 1.8;
        context.setLineDash(dash);
        context.beginPath();
        this.eachStep((frame, x, right) => {
          const level = y + height - (values[frame] / most) * height;
          context.lineTo(x, level);
          context.lineTo(right, level);
        });
        context.stroke();
      }
      context.setLineDash([]);
    });
    context.textAlign = "right";
    context.fillStyle = theme.sample;
    context.fillText("running ―", this.width - 84, y - 6);
    context.fillStyle = theme.bad;
    context.fillText("waiting ┄", this.width - 4, y - 6);
  }

  title(context, text, more, y, height) {
    context.fillStyle = theme.quiet;
    context.textAlign = "left";
    context.fillText(text, 0, y + height / 2 - 7);
    context.fillText(more, 0, y + height / 2 + 8);
    context.strokeStyle = theme.line;
    context.lineWidth = 1;
    context.strokeRect(this.left + 0.5, y + 0.5, this.width - this.left - 1, height);
  }

  drawDetail(doc) {
    const frame = this.app.frame;
    if (frame >= this.model.numSteps) return this.detail.replaceChildren();
    const stages = LANES.map(([stage, , text]) => [text, doc.frames.stages[stage][frame]]).filter(([, one]) => one);
    const scheduled = this.model.scheduled[frame];
    const rows = el("div.box", {}, el("h3", { text: `Step ${doc.frames.step[frame]}` }),
      el("dl.facts", {},
        [["running, waiting", `${doc.steps.num_running[frame]}, ${doc.steps.num_waiting[frame]}`],
          ["free blocks", `${doc.steps.num_free_blocks[frame]}`],
          ["tokens", `${doc.steps.num_prefill_tokens[frame]} prefill, ${doc.steps.num_decode_tokens[frame]} decode`]]
          .map(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]).flat(),
        stages.map(([text, one]) => [el("dt", { text }), el("dd", {}, `${duration(one[2])} `, eventLink(one[0]))]).flat(),
        doc.frames.preempted[frame].map(([number, request, lost]) => [el("dt", { text: "preempted" }),
          el("dd", {}, `${this.model.short(request)}, which lost ${many(lost, "token")} `, eventLink(number))]).flat(),
        el("dt", { text: "scheduled" }),
        el("dd.chips", { id: "scheduled" }, scheduled.slice(0, 300).map((request, place) => el("button", { type: "button",
          title: this.model.name(request), text: `${this.model.short(request)} +${this.model.tokens[frame][place]}`,
          onclick: () => this.app.go(`#requests?request=${request}`) })))),
      el("p", {}, link(`All events of step ${doc.frames.step[frame]}`, `#events?step=${doc.frames.step[frame]}`)));
    this.detail.replaceChildren(rows);
  }
}
