// The whole pool over the whole trace: blocks down, steps across.

class History {
  constructor(app) {
    this.app = app;
    this.model = app.model;
    this.canvas = el("canvas", { id: "history", "aria-label": "The pool over all steps; a click goes there", role: "img" });
    this.head = el("h3", { text: "The pool over time" });
    this.note = el("span.quiet");
    this.node = el("div.box", {}, this.head, this.canvas, el("p.quiet", {}, this.note));
    this.canvas.addEventListener("click", (event) => {
      const at = this.at(event);
      if (at) app.setFrame(at.frame);
    });
    this.canvas.addEventListener("mousemove", (event) => {
      const at = this.at(event);
      if (!at) return tip.hide();
      const owner = this.ownerAt(at.frame, at.block);
      tip.show(event.clientX, event.clientY, `Block ${at.block} at ${this.model.stepName(at.frame)}`, [["owner", owner]]);
    });
    this.canvas.addEventListener("mouseleave", () => tip.hide());
    this.made = "";
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const frame = Math.floor(((event.clientX - box.left) / this.width) * this.model.numFrames);
    const block = 1 + Math.floor(((event.clientY - box.top) / this.height) * (this.model.numBlocks - 1));
    if (frame < 0 || frame >= this.model.numFrames || block < 1 || block >= this.model.numBlocks) return null;
    return { frame, block };
  }

  ownerAt(frame, block) {
    const { model, app } = this;
    model.seek(frame);
    const one = model.block(block);
    model.seek(app.frame);
    return one.count > 1 ? `${model.name(one.owner)} and ${one.count - 1} more` : model.name(one.owner);
  }

  draw() {
    const { model } = this;
    this.node.hidden = model.numFrames < 2 || model.numBlocks < 2;
    if (this.node.hidden) return;
    this.width = Math.max(200, this.node.clientWidth - 32);
    const blocks = model.numBlocks - 1;
    this.height = Math.min(380, Math.max(70, blocks * (blocks <= 24 ? 15 : blocks <= 70 ? 5 : 2)));
    const key = `${this.width} ${this.height} ${theme.paper}`;
    if (key !== this.made) {
      this.made = key;
      this.image = this.paint();
    }
    const context = paper(this.canvas, this.width, this.height);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, 0, 0, this.width, this.height);
    const x = ((this.app.frame + 0.5) / model.numFrames) * this.width;
    context.fillStyle = theme.paper;
    context.fillRect(x - 2, 0, 4, this.height);
    context.fillStyle = theme.mark;
    context.fillRect(x - 1, 0, 2, this.height);
    const perRow = blocks / this.image.height;
    this.note.textContent = `blocks 1 to ${blocks} downwards${perRow > 1 ? ` (a row is up to ${Math.ceil(perRow)} blocks)` : ""}, `
      + `steps ${model.doc.frames.step[0]} to ${model.doc.frames.step[model.numSteps - 1]} across`;
  }

  // One pixel for a block and a step, or for several of each where there are more than pixels.
  paint() {
    const { model } = this;
    const ratio = Math.min(2, devicePixelRatio || 1);
    const columns = Math.min(model.numFrames, Math.round(this.width * ratio));
    const blocks = model.numBlocks - 1;
    const rows = Math.min(blocks, Math.round(this.height * ratio));
    const canvas = document.createElement("canvas");
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    const pixels = new Uint32Array(image.data.buffer);
    const colours = COLOURS.map(pixelOf);
    const [free, cached, shared] = [theme.free, theme.cached, theme.shared].map(pixelOf);
    const { owner, count } = model.pool;
    const state = new Int32Array(model.numBlocks).fill(-1);
    let done = -1;
    for (let column = 0; column < columns; column++) {
      const frame = Math.floor((column * model.numFrames) / columns);
      while (done < frame) model.applyFrame(state, ++done);
      for (let row = 0; row < rows; row++) {
        const first = 1 + Math.floor((row * blocks) / rows);
        const last = Math.max(first + 1, 1 + Math.floor(((row + 1) * blocks) / rows));
        let colour = free;
        for (let id = first; id < last; id++) {
          const i = state[id];
          if (i < 0 || owner[i] === FREE) continue;
          if (owner[i] === CACHED) {
            colour = cached;
            continue;
          }
          colour = count[i] > 1 ? shared : colours[owner[i] % colours.length];
          break;
        }
        pixels[row * columns + column] = colour;
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }
}

// "#rrggbb" as a little-endian pixel.
function pixelOf(colour) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
}
