// Who shares which prefix, as a tree of runs of blocks.

class Prefix {
  constructor(app, body) {
    this.app = app;
    this.model = app.model;
    this.draw = () => {};
    const { nodes, block_size: blockSize } = this.model.doc.prefix;
    const total = this.model.doc.requests.length;
    this.total = total;
    if (!nodes.length) {
      body.replaceChildren(el("div.box", {}, el("p", { text: this.model.light
        ? "Prefix hits are not recorded at level light." : "No two requests have a full block of their prompts in common." }),
      el("p.quiet", { text: `A prefix is shared in whole blocks of ${blockSize} tokens.` })));
      return;
    }
    this.children = nodes.map(() => []);
    const roots = [];
    nodes.forEach((node, place) => (node.parent < 0 ? roots : this.children[node.parent]).push(place));
    const by = (a, b) => nodes[b].requests.length * nodes[b].num_blocks - nodes[a].requests.length * nodes[a].num_blocks;
    roots.sort(by);
    this.children.forEach((list) => list.sort(by));
    this.longest = Math.max(...nodes.map((node) => node.num_blocks));
    this.tree = el("ul.tree", { role: "tree", id: "tree", "aria-label": "Shared prefixes" });
    this.few = roots.length <= 3;
    this.fill(this.tree, roots, 1, 40);
    const sharing = new Set(roots.flatMap((place) => nodes[place].requests));
    body.replaceChildren(el("div.box", {},
      el("p.quiet", { text: `${sharing.size} of ${many(total, "request")} begin like another one. A line is a run of full blocks (${blockSize} tokens each) `
        + "that the same requests have in common; the bar is how many of all requests they are." }), this.tree));
    this.tree.addEventListener("keydown", (event) => this.onKey(event));
    const first = this.tree.querySelector("[role=treeitem]");
    if (first) first.tabIndex = 0;
  }

  fill(list, places, level, most) {
    for (const place of places.slice(0, most)) list.append(this.item(place, level));
    if (places.length > most) {
      const more = el("li", {}, el("button", { type: "button", text: `${places.length - most} more`, onclick: () => {
        more.remove();
        this.fill(list, places.slice(most), level, 200);
      } }));
      list.append(more);
    }
  }

  item(place, level) {
    const node = this.model.doc.prefix.nodes[place];
    const from = node.first * this.model.doc.prefix.block_size;
    const share = (100 * node.requests.length) / Math.max(1, this.total);
    const twist = el("span.twist", { text: "▸", "aria-hidden": "true" });
    const line = el("div.node", {}, twist,
      el("span.bar", {}, el("i", { style: { width: `${share}%` } }),
        el("span", { text: `${many(node.requests.length, "request")} · ${many(node.num_tokens, "token")}` })),
      el("span.quiet.more", {}, `${many(node.num_blocks, "block")} from token ${from}; `,
        `taken from the cache ${many(node.hits, "time")}`, node.evictions ? `, evicted ${many(node.evictions, "time")}` : "", "; ",
        eventLink(node.event)));
    const item = el("li", { role: "treeitem", tabindex: "-1", "aria-expanded": "false", "aria-level": level, "data-node": place,
      "aria-label": `${many(node.requests.length, "request")} share ${many(node.num_tokens, "token")} from token ${from}` }, line);
    const toggle = () => this.toggle(item, place, level);
    twist.addEventListener("click", toggle);
    line.querySelector(".bar").addEventListener("click", toggle);
    if (level === 1 && (this.children[place].length || this.few)) this.toggle(item, place, level);
    return item;
  }

  toggle(item, place, level) {
    const open = item.getAttribute("aria-expanded") !== "true";
    item.setAttribute("aria-expanded", String(open));
    item.querySelector(".twist").textContent = open ? "▾" : "▸";
    if (!open) return item.querySelector("ul").remove();
    const node = this.model.doc.prefix.nodes[place];
    const list = el("ul", { role: "group" });
    this.fill(list, this.children[place], level + 1, 40);
    const within = new Set(this.children[place].flatMap((child) => this.model.doc.prefix.nodes[child].requests));
    const here = node.requests.filter((request) => !within.has(request));
    if (node.blocks.length) {
      list.append(this.chips("held in ", node.blocks, 24, (id) => el("button", { type: "button", text: `block ${id}`,
        onclick: () => this.app.go(`#events?block=${id}`) })));
    }
    if (here.length) {
      list.append(this.chips("goes on alone: ", here, 60, (request) => el("button", { type: "button", text: this.model.short(request),
        title: this.model.name(request), onclick: () => this.app.go(`#requests?request=${request}`) })));
    }
    item.append(list);
  }

  chips(label, all, limit, make) {
    const box = el("span.chips", {}, all.slice(0, limit).map(make));
    const more = el("button.link", { type: "button", text: `and ${all.length - limit} more`, onclick: () => {
      box.append(...all.slice(limit).map(make));
      box.children[limit].focus();
      more.remove();
    } });
    return el("li", {}, el("span.quiet", { text: label }), box, all.length > limit ? more : null);
  }

  onKey(event) {
    const items = [...this.tree.querySelectorAll("[role=treeitem]")];
    const item = event.target.closest("[role=treeitem]");
    if (event.target !== item) return;
    const at = items.indexOf(item);
    const open = item.getAttribute("aria-expanded") === "true";
    const place = Number(item.dataset.node);
    let next = null;
    if (event.key === "ArrowDown") next = items[at + 1];
    else if (event.key === "ArrowUp") next = items[at - 1];
    else if (event.key === "ArrowRight" && open) next = items[at + 1];
    else if (event.key === "ArrowLeft" && !open) next = item.parentNode.closest("[role=treeitem]");
    else if (["ArrowRight", "ArrowLeft", "Enter", " "].includes(event.key)) this.toggle(item, place, Number(item.getAttribute("aria-level")));
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (next) {
      item.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
  }
}
