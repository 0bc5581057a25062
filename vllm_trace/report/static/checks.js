// What the invariants and the replay through the from-scratch engine say.

const STATE_WORDS = { holds: "✓ holds", violated: "✗ violated", unjudged: "? not judged", raised: "! raised" };

class Checks {
  constructor(app, body) {
    this.app = app;
    this.model = app.model;
    this.draw = () => {};
    const { invariants, replays } = this.model.doc;
    body.replaceChildren(this.replays(replays), ...replays.filter((one) => one.divergence).slice(0, 1).map((one) => this.divergence(one)),
      this.invariants(invariants));
  }

  replays(rows) {
    const box = el("div.box", {}, el("h3", { text: "Replay: the same inputs through an engine written from scratch" }));
    if (!rows.length) {
      box.append(el("p.quiet", { text: "Not replayed (--no-replay)." }));
      return box;
    }
    box.append(el("div.wide", {}, el("table", { id: "replay-table" },
      el("thead", {}, el("tr", {}, ["replay", "events", "consumed", "compared", "verdict"].map((text, i) => el(i > 0 && i < 4 ? "th.r" : "th", { text })))),
      el("tbody", {}, rows.map((one) => {
        const verdict = one.passed ? "identical" : one.divergence ? "diverges" : "unjudged";
        return el("tr", {}, el("td", { text: one.mode }), el("td.r", { text: one.events }),
          el("td.r", { text: one.events ? `${((100 * one.consumed) / one.events).toFixed(1)} %` : "–" }), el("td.r", { text: one.compared }),
          el("td", {}, el(`span.state.${verdict}`, { text: { identical: "✓ identical", diverges: "✗ diverges", unjudged: "? not judged" }[verdict] }),
            one.divergence ? el("span", {}, " at ", eventLink(one.divergence.event), `: ${one.divergence.kind}`) : "",
            one.not_judged.map((why) => el("div.quiet", { text: why }))));
      })))));
    return box;
  }

  divergence(one) {
    const found = one.divergence;
    const side = (title, text) => el("div.side.differs", {}, el("h3", { text: title }), el("code", { text }));
    const [theirs, ours] = [found.recorded_state, found.mini_state];
    const counts = (state) => Object.entries(state.ref_cnts).filter(([, count]) => count > 1).map(([id, count]) => `${id}: ${count}`).join(", ") || "–";
    const table = (state, name) => (state.tables[name] || []).map((row) => some(row, 60)).join(" | ");
    const names = [...new Set([...Object.keys(theirs.tables), ...Object.keys(ours.tables)])];
    const differ = (name) => (table(theirs, name) === table(ours, name) ? 1 : 0);
    names.sort((one, other) => differ(one) - differ(other));
    const row = (title, left, right) => el(left === right ? "tr" : "tr.differs", {}, el("th", { text: title }), el("td.num", { text: left }), el("td.num", { text: right }));
    return el("div.box", { id: "divergence" }, el("h3", {}, `First divergence of the ${one.mode} replay, of class “${found.kind}”, at `, eventLink(found.event)),
      found.note ? el("p", { text: found.note }) : "",
      el("div.sides", {}, side("recorded", found.recorded), side("mini", found.mini)),
      el("h3", { text: "Both sides after that call" }),
      el("div.wide", {}, el("table", {}, el("thead", {}, el("tr", {}, ["", "recorded", "mini"].map((text) => el("th", { text })))),
        el("tbody", {}, row("free queue", some(theirs.free_list, 40), some(ours.free_list, 40)),
          names.slice(0, 40).map((name) => row(`table of ${name}`, table(theirs, name), table(ours, name))),
          row("counts above 1", counts(theirs), counts(ours))))),
      el("h3", { text: "Before it" }), el("ol.happened", {}, found.story.map((line) => told(line))),
      el("details", {}, el("summary", { text: "A script that shows it again" }), el("pre", { text: found.script })));
  }

  invariants(given) {
    const box = el("div.box", {}, el("h3", { text: `Invariants: ${given.verdict}` }));
    if (!given.invariants.length) {
      box.append(el("p.quiet", { text: given.why === "--no-check" ? "Not judged (--no-check)." : given.why || "There is none." }));
      return box;
    }
    const rank = { violated: 0, raised: 1, unjudged: 2, holds: 3 };
    const rows = [...given.invariants].sort((a, b) => rank[a.status] - rank[b.status]);
    box.append(el("div.wide", {}, el("table", { id: "invariant-table" }, el("tbody", {}, rows.map((one) => el("tr", { "data-id": one.id },
      el("td", {}, el(`span.state.${one.status}`, { text: STATE_WORDS[one.status] })),
      el("td", {}, el("code", { text: one.id })),
      el("td", {}, one.sentence, one.reason ? el("div.quiet", { text: one.reason }) : null, this.violation(one))))))));
    return box;
  }

  violation(one) {
    if (!one.message) return null;
    return el("div", {}, el("p", {}, eventLink(one.event), one.step === null ? "" : `, step ${one.step}`, `: ${one.message}`),
      el("ol.happened", {}, one.story.map((line) => told(line))));
  }
}

const some = (list, most) => (list.length > most ? `${list.slice(0, most).join(" ")} … ${list.length} in all` : list.join(" ")) || "empty";

// "event 12 …" or "event 12: …" with its number as a link.
function told(line) {
  const match = /^event (\d+):? +(.*)$/s.exec(line);
  return match ? el("li", {}, link(match[1], `#events?n=${match[1]}`), ` ${match[2]}`) : el("li", { text: line });
}
