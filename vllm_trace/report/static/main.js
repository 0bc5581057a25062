// The page: one step at a time, one figure at a time.

const FIGURES = ["pool", "requests", "timeline", "prefix", "kernels", "checks", "events"];
const MAKE = { pool: PoolGrid, requests: Requests, timeline: Timeline, prefix: Prefix, kernels: Kernels, checks: Checks, events: EventsView };

class App {
  constructor(doc) {
    this.model = new Model(doc);
    this.events = new EventStore(this.model, doc.events);
    this.frame = 0;
    this.figures = {};
    this.tab = "pool";
    this.playing = 0;
    this.slider = $("slider");
    this.slider.max = String(Math.max(0, this.model.numFrames - 1));
    $("transport").hidden = this.model.numFrames === 0;
    this.wire();
    this.setTheme(localTheme());
    this.route();
  }

  wire() {
    this.slider.addEventListener("input", () => this.setFrame(Number(this.slider.value)));
    $("play").addEventListener("click", () => this.play(!this.playing));
    $("back").addEventListener("click", () => this.setFrame(this.frame - 1));
    $("forth").addEventListener("click", () => this.setFrame(this.frame + 1));
    $("strip").addEventListener("click", (event) => {
      const box = $("strip").getBoundingClientRect();
      this.setFrame(Math.floor(((event.clientX - box.left) / box.width) * this.model.numFrames));
    });
    $("strip").addEventListener("mousemove", (event) => this.tellStrip(event));
    $("strip").addEventListener("mouseleave", () => tip.hide());
    for (const button of document.querySelectorAll("[role=tab]")) {
      button.addEventListener("click", () => this.go(`#${button.dataset.tab}`));
      button.addEventListener("keydown", (event) => this.onTabKey(event));
    }
    $("theme").addEventListener("click", () => this.setTheme({ auto: "light", light: "dark", dark: "auto" }[this.theme]));
    $("help").addEventListener("click", () => $("keys").showModal());
    addEventListener("hashchange", () => this.route());
    addEventListener("keydown", (event) => this.onKey(event));
    addEventListener("resize", () => this.redraw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.setTheme(this.theme));
    addEventListener("beforeprint", () => this.print(true));
    addEventListener("afterprint", () => this.print(false));
    const count = this.model.doc.invariants.invariants.filter((one) => one.status === "violated").length;
    if (count) $("tab-checks").append(el("span.count", { text: ` ${count}`, "aria-label": `${count} violated` }));
  }

  // Figures ------------------------------------------------------------------------------

  go(hash) {
    if (location.hash === hash) this.route();
    else location.hash = hash;
  }

  // #requests?request=3, #events?n=812: every figure and every event has an address.
  route() {
    const [name, query] = location.hash.slice(1).split("?");
    const given = new URLSearchParams(query || "");
    this.open(FIGURES.includes(name) ? name : "pool");
    const step = given.get("at");
    if (step !== null && this.model.firstOf.has(Number(step))) this.setFrame(this.model.firstOf.get(Number(step)));
    if (name === "events") this.figures.events.open(given);
    if (name === "requests" && given.has("request")) this.figures.requests.reveal(Number(given.get("request")));
    if (name && name !== "pool") tip.hide();
  }

  figure(name) {
    if (!this.figures[name]) this.figures[name] = new MAKE[name](this, $(`${name}-body`));
    return this.figures[name];
  }

  open(name) {
    this.tab = name;
    for (const each of FIGURES) {
      const on = each === name;
      $(`tab-${each}`).setAttribute("aria-selected", String(on));
      $(`tab-${each}`).tabIndex = on ? 0 : -1;
      $(`panel-${each}`).hidden = !on;
    }
    this.figure(name);
    this.redraw();
  }

  onTabKey(event) {
    const at = FIGURES.indexOf(this.tab);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: FIGURES.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const name = FIGURES[(to + FIGURES.length) % FIGURES.length];
    this.go(`#${name}`);
    $(`tab-${name}`).focus();
  }

  // Steps --------------------------------------------------------------------------------

  setFrame(frame) {
    const to = Math.max(0, Math.min(this.model.numFrames - 1, frame));
    if (to !== this.frame) {
      this.frame = to;
      this.redraw();
    }
  }

  play(on) {
    $("play").textContent = on ? "❚❚" : "▶";
    $("play").setAttribute("aria-label", on ? "Pause" : "Play");
    $("play").setAttribute("aria-pressed", String(on));
    $("where").setAttribute("aria-live", on ? "off" : "polite");
    cancelAnimationFrame(this.playing);
    this.playing = 0;
    if (!on || !this.model.numFrames) return;
    if (this.frame >= this.model.numFrames - 1) this.setFrame(0);
    let last = performance.now();
    const tick = (now) => {
      const every = 1000 / Number($("speed").value);
      const steps = Math.floor((now - last) / every);
      if (steps > 0) {
        last += steps * every;
        this.setFrame(this.frame + Math.min(steps, 8));
      }
      if (this.frame >= this.model.numFrames - 1) return this.play(false);
      this.playing = requestAnimationFrame(tick);
    };
    this.playing = requestAnimationFrame(tick);
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
    const at = event.target;
    if (at.matches && at.matches("input:not([type=range]), select, textarea")) return;
    const far = event.shiftKey ? 10 : 1;
    if (event.key === " " && !(at.matches && at.matches("button, summary, a"))) this.play(!this.playing);
    else if (event.key === "ArrowLeft") this.setFrame(this.frame - far);
    else if (event.key === "ArrowRight") this.setFrame(this.frame + far);
    else if (event.key === "Home" && at === document.body) this.setFrame(0);
    else if (event.key === "End" && at === document.body) this.setFrame(this.model.numFrames - 1);
    else if (event.key === "?") $("keys").showModal();
    else if (/^[1-7]$/.test(event.key)) this.go(`#${FIGURES[Number(event.key) - 1]}`);
    else return;
    event.preventDefault();
  }

  // Drawing ------------------------------------------------------------------------------

  redraw() {
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => {
      this.waits = false;
      this.draw();
    });
  }

  draw() {
    this.slider.value = String(this.frame);
    this.drawWhere();
    this.drawStrip();
    const figure = this.figures[this.tab];
    if (figure) figure.draw();
  }

  drawWhere() {
    const { model, frame } = this;
    const steps = model.doc.steps;
    if (frame < model.numSteps) {
      $("where").replaceChildren(el("b", { text: `Step ${model.doc.frames.step[frame]}` }),
        ` of ${model.doc.frames.step[model.numSteps - 1]} · ${steps.num_running[frame]} running, ${steps.num_waiting[frame]} waiting`);
    } else if (model.numFrames) $("where").replaceChildren(el("b", { text: "The end" }), " · after the last step");
    this.slider.setAttribute("aria-valuetext", $("where").textContent);
  }

  // Used blocks over all steps behind the slider, with the preemptions.
  drawStrip() {
    const { model } = this;
    const width = $("strip").parentNode.clientWidth;
    if (!width || !model.numFrames) return;
    const height = 30;
    const context = paper($("strip"), width, height);
    const total = Math.max(1, model.numBlocks - 1);
    const free = model.doc.steps.num_free_blocks;
    const columns = Math.min(model.numFrames, Math.floor(width));
    const w = width / columns;
    context.fillStyle = theme.exec;
    for (let column = 0; column < columns; column++) {
      const frame = Math.floor((column * model.numFrames) / columns);
      if (frame >= model.numSteps) continue;
      const h = ((total - free[frame]) / total) * (height - 7);
      const left = Math.floor(column * w);
      context.fillRect(left, height - h, Math.floor((column + 1) * w) - left, h);
    }
    context.fillStyle = theme.bad;
    model.doc.frames.preempted.forEach((list, frame) => {
      if (!list.length) return;
      const x = ((frame + 0.5) / model.numFrames) * width;
      context.beginPath();
      context.moveTo(x - 4, 0);
      context.lineTo(x + 4, 0);
      context.lineTo(x, 6);
      context.fill();
    });
    const x = ((this.frame + 0.5) / model.numFrames) * width;
    context.fillStyle = theme.mark;
    context.fillRect(x - 1, 0, 2, height);
  }

  tellStrip(event) {
    const { model } = this;
    const box = $("strip").getBoundingClientRect();
    const frame = Math.max(0, Math.min(model.numFrames - 1, Math.floor(((event.clientX - box.left) / box.width) * model.numFrames)));
    if (frame >= model.numSteps) return tip.show(event.clientX, event.clientY, "The end", []);
    const lost = model.doc.frames.preempted[frame].map(([, request]) => model.short(request));
    tip.show(event.clientX, event.clientY, `Step ${model.doc.frames.step[frame]}`, [
      ["free", `${model.doc.steps.num_free_blocks[frame]} of ${Math.max(0, model.numBlocks - 1)} blocks`],
      lost.length ? ["preempted", lost.join(", ")] : null,
    ]);
  }

  setTheme(name) {
    this.theme = name;
    const dark = name === "dark" || (name === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.classList.toggle("dark", dark);
    $("theme").textContent = `Theme: ${name}`;
    $("theme").setAttribute("aria-label", `Colour theme: ${name === "auto" ? "automatic" : name}`);
    try {
      localStorage.setItem("vllm-trace-theme", name);
    } catch {
      // A browser that keeps nothing for files: the choice is for this page only.
    }
    this.recolour();
  }

  recolour() {
    readTheme();
    if (this.figures.pool) this.figures.pool.drawKey();
    this.redraw();
  }

  // On paper: light, and every figure under the other.
  print(on) {
    for (const one of document.querySelectorAll(".findings details")) {
      if (on) one.dataset.was = one.open ? "open" : "";
      one.open = on || one.dataset.was === "open";
    }
    if (on) {
      this.play(false);
      document.documentElement.classList.remove("dark");
      readTheme();
      for (const name of FIGURES) {
        $(`panel-${name}`).hidden = false;
        this.figure(name);
        if (name === "events" && !this.figures.events.asked) this.figures.events.open(new URLSearchParams());
        this.figures[name].draw();
      }
      this.draw();
    } else {
      this.setTheme(this.theme);
      this.open(this.tab);
    }
  }
}

function localTheme() {
  try {
    const known = localStorage.getItem("vllm-trace-theme");
    return ["auto", "light", "dark"].includes(known) ? known : "auto";
  } catch {
    return "auto";
  }
}

unpack("data").then((doc) => {
  readTheme();
  const app = new App(doc);
  requestAnimationFrame(() => requestAnimationFrame(() => {
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  }));
  return app;
}).catch((error) => {
  document.documentElement.dataset.failed = String(error);
  $("panels").prepend(el("p.problems", { role: "alert", text: `The figures could not be unpacked: ${error.message}. `
    + "They need a browser of 2023 or later." }));
  throw error;
});
